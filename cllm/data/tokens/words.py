"""Ids of much text, by remembering those of each word: the tokenizers library is asked only for words that were not seen before.

A tokenizer whose first step splits text by GPT-2's pattern encodes each word by itself, whatever stands around it, so that the ids of a text are
those of its words one after the other. Natural text repeats its words, and to find one in a table takes far less time than to take it apart:

    's|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+

What a letter, a number and a blank is comes from the library's own patterns.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cllm.data.tokens.compiling import jit

_OTHER, _LETTER, _NUMBER, _BLANK, _UNKNOWN = range(5)
_SLOTS = 1 << 20  # of the table; no more than half of them are used
_LONGEST = 48  # characters of a word that is remembered
_PROBE = "It's  we'll I'D x'\n\n \t1st 2 34,5;--  \u00a0Gr\u00fc\u00dfe\u3000\u65e5\u672c\u8a9e \u0663\u2167 e\u0301 \U0001f642\u200b\r\n'' ' s  "


class Words:
    """Encodes texts; `encode` is the library's way to encode a list of words, each by itself."""

    def __init__(self, encode: Callable[[list[str]], list[list[int]]]):
        self._encode = encode
        self._kinds = np.full(0x110000, _UNKNOWN, dtype=np.uint8)  # of each character
        self._lock = threading.Lock()
        self._clear()

    def agrees(self) -> bool:
        """Whether a text with every kind of word is encoded as the library encodes it: a guard against one that splits otherwise."""
        return bool(self.encode([_PROBE])[0].tolist() == self._encode([_PROBE])[0])

    def _clear(self) -> None:
        self._hashes = np.zeros(_SLOTS, dtype=np.uint64)
        self._slots = np.full(_SLOTS, -1, dtype=np.int32)  # the number of the word in each; -1 for none
        self._points = _Growing(np.uint32)  # the characters of all words that are remembered
        self._point_ends = _Growing(np.int64)
        self._ids = _Growing(np.int64)
        self._id_ends = _Growing(np.int64)
        for ends in (self._point_ends, self._id_ends):
            ends.extend([0])

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64. Raises UnicodeEncodeError for half of a surrogate pair."""
        with self._lock:
            return self._encoded(texts)

    def _encoded(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._point_ends.size > _SLOTS // 2:
            self._clear()
        bounds = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        points = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
        unknown = np.unique(points[self._kinds[points] == _UNKNOWN])
        if len(unknown):
            _classified(unknown, self._kinds)
        ends, last_words = np.empty(len(points), dtype=np.int64), np.empty(len(texts), dtype=np.int64)
        count = _split(points, self._kinds, bounds, ends, last_words)
        ends = ends[:count]
        starts = np.concatenate([np.zeros(min(1, count), dtype=np.int64), ends[:-1]])
        hashes, found = np.empty(count, dtype=np.uint64), np.empty(count, dtype=np.int32)
        _find(points, starts, ends, hashes, found, self._hashes, self._slots, self._points.array, self._point_ends.array)
        remembered = self._learn(points, starts, ends, hashes, found)
        sizes = np.diff(self._id_ends.array[: self._id_ends.size])
        id_ends = np.cumsum(sizes[found]) if count else np.zeros(0, dtype=np.int64)
        ids = np.empty(int(id_ends[-1]) if count else 0, dtype=np.int64)
        _gather(found, self._ids.array, self._id_ends.array, ids)
        self._id_ends.size = remembered + 1  # words that are too long are asked for again each time
        self._ids.size = int(self._id_ends.array[remembered])
        text_ends = np.where(last_words > 0, id_ends[np.maximum(last_words, 1) - 1] if count else 0, 0)
        return [ids[start:end] for start, end in zip([0, *text_ends[:-1].tolist()], text_ends.tolist())]

    def _learn(self, points: np.ndarray, starts: np.ndarray, ends: np.ndarray, hashes: np.ndarray, found: np.ndarray) -> int:
        """Fills in the words that were not found; returns how many words are remembered, which the others follow."""
        missing = np.flatnonzero(found < 0)
        raw, places = points.tobytes(), zip(missing.tolist(), starts[missing].tolist(), ends[missing].tolist())
        occurrences: dict[str, list[int]] = {}
        for number, start, end in places:
            occurrences.setdefault(raw[4 * start : 4 * end].decode("utf-32-le"), []).append(number)
        words = sorted(occurrences, key=lambda word: len(word) > _LONGEST)  # those that are remembered first
        for word, ids in zip(words, self._encode(words)):
            number, first = self._id_ends.size - 1, occurrences[word][0]
            self._ids.extend(ids)
            self._id_ends.extend([self._ids.size])
            found[occurrences[word]] = number
            if len(word) <= _LONGEST and number < _SLOTS // 2 + _SLOTS // 4:
                self._points.extend(points[starts[first] : ends[first]])
                self._point_ends.extend([self._points.size])
                _insert(hashes[first], number, self._hashes, self._slots)
        return self._point_ends.size - 1


class _Growing:
    """An array that grows at its end."""

    def __init__(self, dtype: Any):
        self.array = np.zeros(1 << 16, dtype=dtype)
        self.size = 0

    def extend(self, values: Any) -> None:
        end = self.size + len(values)
        if end > len(self.array):
            self.array = np.concatenate([self.array, np.zeros(max(end - len(self.array), len(self.array)), dtype=self.array.dtype)])
        self.array[self.size : end] = values
        self.size = end


def _classified(points: np.ndarray, table: np.ndarray) -> None:
    """Fills in `table` (0x110000,) for these characters: a letter, a number, a blank or something else, as the tokenizers library has it."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    text = points.tobytes().decode("utf-32-le")
    table[points] = _OTHER
    for kind, pattern in ((_LETTER, r"\p{L}+"), (_NUMBER, r"\p{N}+"), (_BLANK, r"\s+")):
        for _, (start, end) in Split(Regex(pattern), "removed", invert=True).pre_tokenize_str(text):
            table[points[start:end]] = kind


@jit
def _split(points: np.ndarray, kinds: np.ndarray, bounds: np.ndarray, ends: np.ndarray, last_words: np.ndarray) -> int:
    """Writes where each word ends, and of each text the number of words up to its end; returns the number of all words."""
    count = 0
    for text in range(len(bounds) - 1):
        i, n = bounds[text], bounds[text + 1]
        while i < n:
            end = i
            if points[i] == 39 and i + 1 < n:  # an apostrophe
                second = points[i + 1]
                third = points[i + 2] if i + 2 < n else np.uint32(0)
                if second == 115 or second == 116 or second == 109 or second == 100:  # s t m d
                    end = i + 2
                elif ((second == 114 or second == 118) and third == 101) or (second == 108 and third == 108):  # re ve ll
                    end = i + 3
            if end == i:
                first = i + 1 if points[i] == 32 and i + 1 < n else i
                kind = kinds[points[first]]
                if kind == _BLANK:
                    first, kind = i, kinds[points[i]]
                end = first + 1
                while end < n and kinds[points[end]] == kind:
                    end += 1
                if kind == _BLANK and end < n and end - i > 1:
                    end -= 1  # the last blank belongs to what follows
            ends[count] = end
            count += 1
            i = end
        last_words[text] = count
    return count


@jit
def _find(points, starts, ends, hashes, found, table, slots, own_points, own_ends):
    """Writes the hash of each word, and its number where it is remembered, otherwise -1."""
    for word in range(len(starts)):
        start, end = starts[word], ends[word]
        value = np.uint64(0x9E3779B97F4A7C15)
        for i in range(start, end):
            value = (value ^ np.uint64(points[i])) * np.uint64(0xD6E8FEB86659FD93)
            value ^= value >> np.uint64(32)
        hashes[word] = value
        found[word] = -1
        slot = np.int64(value & np.uint64(_SLOTS - 1))
        while slots[slot] >= 0:
            number = slots[slot]
            begin = own_ends[number]
            if table[slot] == value and own_ends[number + 1] - begin == end - start:
                same = True
                for i in range(end - start):
                    if own_points[begin + i] != points[start + i]:
                        same = False
                        break
                if same:
                    found[word] = number
                    break
            slot = (slot + 1) & (_SLOTS - 1)


@jit
def _insert(value, number, table, slots):
    slot = np.int64(value & np.uint64(_SLOTS - 1))
    while slots[slot] >= 0:
        slot = (slot + 1) & (_SLOTS - 1)
    table[slot] = value
    slots[slot] = number


@jit
def _gather(found, ids, id_ends, out):
    """Writes the ids of the words one after the other."""
    place = 0
    for word in found:
        for i in range(id_ends[word], id_ends[word + 1]):
            out[place] = ids[i]
            place += 1
