"""A text cut into words and lines once, as arrays: filters, duplicates and decontamination all work on these.

A word is a run of letters, digits, marks and underscores in any script, compared in small letters: punctuation and layout do not matter. Scripts that
put no spaces between words (Han, kana, Thai, Lao, Khmer, Burmese) count each letter as a word of its own; about two of them make a word of such a
language, which `word_count` and the filters allow for.
"""

import functools
import unicodedata
from typing import NamedTuple

import numpy as np

from cllm.data.clean.compiling import jit

VERSION = 1  # of what a word is and how it is hashed: part of a recipe's digest

# Flags of a word.
HAS_LETTER, IS_IDEOGRAPH = 1, 2
# Flags of a line.
BULLET_LINE, STOP_LINE, ELLIPSIS_LINE, BRACE_LINE = 1, 2, 4, 8
# Places in `counts`.
CHARACTERS, INK, NUMBER_SIGNS, ELLIPSES, DAMAGED, SENTENCES, LETTERS = range(7)

_SIZE = 0x20000  # code points in the table; almost all above are ideographs
_CODE_POINT = (1 << 21) - 1
_LETTER, _OTHER_WORD, _IDEOGRAPH, _MARK, _SPACE, _STOP, _BULLET, _QUOTE = (1 << bit for bit in range(21, 29))
_IN_WORD = _LETTER | _OTHER_WORD
_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3040, 0x312F), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF), (0xFF66, 0xFF9F), (0x1B000, 0x1B16F),
)  # fmt: skip
_STOPS = ".!?\u2026\u3002\uff0e\uff01\uff1f\u0964\u0965\u061f\u06d4\u1362\u1367\u104b\u17d4\u2047\u2048\u2049\u203d\u037e\u0589"
_QUOTES = "\"'\u201d\u2019\u00bb\u300d\u300f\u201c"
_BULLETS = "\u2022\u2023\u25e6\u25aa\u25cf\u25cb\u2043\u00b7-*+"

_OFFSET, _PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)  # FNV-1a
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)  # the finalizer of MurmurHash3
_S33 = np.uint64(33)


class Words(NamedTuple):
    """A text of N words in L lines. Lines end at "\\n"; those of nothing but white space are blank."""

    hashes: np.ndarray
    """(N,) uint64, equal for words that differ in case alone."""
    lengths: np.ndarray
    """(N,) int32: characters."""
    flags: np.ndarray
    """(N,) uint8: HAS_LETTER, IS_IDEOGRAPH."""
    lines: np.ndarray
    """(L,) uint64: a hash of the line without white space around it; 0 where it is blank."""
    line_lengths: np.ndarray
    """(L,) int32: characters without white space around them."""
    line_words: np.ndarray
    """(L,) int32: words before the line, so that words[line_words[i] : line_words[i + 1]] are those of line i."""
    line_flags: np.ndarray
    """(L,) uint8: BULLET_LINE, STOP_LINE (ends like a sentence), ELLIPSIS_LINE, BRACE_LINE (holds a curly bracket)."""
    counts: np.ndarray
    """(7,) int64: CHARACTERS, INK (not white space), NUMBER_SIGNS (#), ELLIPSES, DAMAGED (U+FFFD), SENTENCES, LETTERS."""

    @property
    def ideographs(self) -> int:
        return int(np.count_nonzero(self.flags & IS_IDEOGRAPH))

    @property
    def word_count(self) -> int:
        """Words as a reader counts them: two letters of a script without spaces make one."""
        ideographs = self.ideographs
        return len(self.hashes) - ideographs + (ideographs + 1) // 2


@functools.cache
def _table() -> np.ndarray:
    """(131072,) uint32: for each code point its small letter in the low 21 bits, and what kind of character it is above."""
    table = np.zeros(_SIZE, np.uint32)
    for number in range(_SIZE):
        character = chr(number)
        category = unicodedata.category(character)
        small = character.lower() if category in ("Lu", "Lt") else character
        flags = {"L": _LETTER, "N": _OTHER_WORD, "M": _MARK}.get(category[0], 0)
        table[number] = (ord(small) if len(small) == 1 else number) | flags | (_SPACE if character.isspace() else 0)
    for first, last in _WITHOUT_SPACES:
        part = table[first : last + 1]
        part[part & _LETTER > 0] |= _IDEOGRAPH
    table[ord("_")] |= _OTHER_WORD
    for characters, flag in ((_STOPS, _STOP), (_QUOTES, _QUOTE), (_BULLETS, _BULLET)):
        table[[ord(each) for each in characters]] |= flag
    return table


def split(text: str) -> Words:
    """The words and lines of a text."""
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
    return Words(*_split(data, _table()))


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """(max(N - n + 1, 0),) uint64: a hash of each n words that follow each other. `hashes`: (N,) uint64."""
    return _ngrams(hashes, n)


def distinct(keys: np.ndarray) -> np.ndarray:
    """(U,) uint64, ascending: the keys, each once. Several times as fast as numpy.unique for a few hundred."""
    keys = np.sort(keys)
    new = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    return keys[new]


@jit
def mixed(h):
    """A uint64 of which every bit depends on every bit of `h`."""
    h ^= h >> _S33
    h *= _MIX_1
    h ^= h >> _S33
    h *= _MIX_2
    return h ^ (h >> _S33)


@jit
def prefixes(hashes):
    """(N + 1,) uint64: the polynomial hash of the first i words, from which that of any words in a row follows by `between`."""
    sums = np.empty(len(hashes) + 1, np.uint64)
    sums[0] = np.uint64(0)
    for i in range(len(hashes)):
        sums[i + 1] = sums[i] * _BASE + hashes[i]
    return sums


@jit
def power(n):
    """What `between` needs for n words."""
    result = np.uint64(1)
    for _ in range(n):
        result *= _BASE
    return result


@jit
def between(sums, first, last, base_power):
    """The hash of the words first .. last - 1."""
    return mixed(sums[last] - sums[first] * base_power)


@jit
def _ngrams(hashes, n):
    sums, base_power = prefixes(hashes), power(n)
    found = np.empty(max(len(hashes) - n + 1, 0), np.uint64)
    for i in range(len(found)):
        found[i] = between(sums, i, i + n, base_power)
    return found


@jit
def _split(data, table):
    size = len(data)
    num_lines = 1
    for byte in data:
        num_lines += byte == 10
    most = size // 2 + 1  # a word and the space after it take two bytes, an ideograph takes three
    hashes, lengths, flags = np.empty(most, np.uint64), np.empty(most, np.int32), np.empty(most, np.uint8)
    lines, line_lengths = np.zeros(num_lines, np.uint64), np.zeros(num_lines, np.int32)
    line_words, line_flags = np.zeros(num_lines + 1, np.int32), np.zeros(num_lines, np.uint8)
    counts = np.zeros(7, np.int64)
    characters = ink = signs = ellipses = damaged = sentences = letters = 0
    words = line = 0
    inside = 0  # 1: in a word, 2: after an ideograph, to which marks still belong
    word_hash, word_length, word_flags = _OFFSET, 0, 0
    line_hash, line_length, trailing = _OFFSET, 0, 0
    last = before_last = third_last = 0  # the last characters of the line that are not white space
    last_kind = kind = 0
    after_stop = False
    i = 0
    while i < size:
        byte = int(data[i])
        if byte < 0x80:
            point = byte
            i += 1
        elif byte < 0xE0:
            point = (byte & 0x1F) << 6 | int(data[i + 1] & 0x3F)
            i += 2
        elif byte < 0xF0:
            point = (byte & 0x0F) << 12 | int(data[i + 1] & 0x3F) << 6 | int(data[i + 2] & 0x3F)
            i += 3
        else:
            point = (byte & 7) << 18 | int(data[i + 1] & 0x3F) << 12 | int(data[i + 2] & 0x3F) << 6 | int(data[i + 3] & 0x3F)
            i += 4
        if point < _SIZE:
            kind = int(table[point])
        elif point < 0x323B0:
            kind = point | _LETTER | _IDEOGRAPH
        else:
            kind = point | (_MARK if 0xE0100 <= point < 0xE01F0 else 0)
        characters += 1
        letters += kind & _LETTER != 0

        if kind & _IN_WORD and not kind & _IDEOGRAPH:
            if inside != 1:
                if inside == 2:
                    hashes[words], lengths[words], flags[words] = mixed(word_hash), word_length, word_flags
                    words += 1
                inside, word_hash, word_length, word_flags = 1, _OFFSET, 0, 0
            word_hash = (word_hash ^ np.uint64(kind & _CODE_POINT)) * _PRIME
            word_length += 1
            if kind & _LETTER:
                word_flags |= HAS_LETTER
        elif kind & _MARK and inside:
            word_hash = (word_hash ^ np.uint64(kind & _CODE_POINT)) * _PRIME
            word_length += 1
        else:
            if inside:
                hashes[words], lengths[words], flags[words] = mixed(word_hash), word_length, word_flags
                words += 1
                inside = 0
            if kind & _IDEOGRAPH:
                inside, word_length, word_flags = 2, 1, HAS_LETTER | IS_IDEOGRAPH
                word_hash = (_OFFSET ^ np.uint64(kind & _CODE_POINT)) * _PRIME

        if kind & _SPACE:
            if after_stop and last_kind & (_STOP | _QUOTE):
                sentences += 1
                after_stop = False
            if point == 10:
                if line_length:
                    lines[line], line_lengths[line] = mixed(line_hash), line_length
                    if last_kind & (_STOP | _QUOTE):
                        line_flags[line] |= STOP_LINE
                    if last == 0x2026 or (last == 46 and before_last == 46 and third_last == 46):
                        line_flags[line] |= ELLIPSIS_LINE
                line += 1
                line_words[line] = words
                line_hash, line_length, trailing = _OFFSET, 0, 0
                last = before_last = third_last = last_kind = 0
                after_stop = False
            elif line_length:
                trailing += 1
            continue

        ink += 1
        if line_length == 0 and kind & _BULLET and (point > 127 or (i < size and data[i] == 32)):
            line_flags[line] |= BULLET_LINE
        follows = line_length > 0 and trailing == 0
        if trailing:
            # White space inside of a line counts by its length: the lines of a table differ by it.
            line_hash = (line_hash ^ np.uint64(32 + trailing)) * _PRIME
            line_length += trailing
            trailing = 0
        line_hash = (line_hash ^ np.uint64(point)) * _PRIME
        line_length += 1
        if kind & _STOP:
            if point > 127 and point != 0x2026:
                sentences += not after_stop
                after_stop = False
            elif follows:
                after_stop = True
        elif not kind & _QUOTE:
            after_stop = False
        if point == 35:
            signs += last != 0 and last != 35  # those at the beginning of a line make a heading
        elif point == 0x2026 or (point == 46 and last == 46 and before_last == 46 and third_last != 46):
            ellipses += 1
        elif point == 0xFFFD:
            damaged += 1
        elif point == 123 or point == 125:
            line_flags[line] |= BRACE_LINE
        third_last, before_last, last, last_kind = before_last, last, point, kind
    if inside:
        hashes[words], lengths[words], flags[words] = mixed(word_hash), word_length, word_flags
        words += 1
    if after_stop:
        sentences += 1
    if line_length:
        lines[line], line_lengths[line] = mixed(line_hash), line_length
        if last_kind & (_STOP | _QUOTE):
            line_flags[line] |= STOP_LINE
        if last == 0x2026 or (last == 46 and before_last == 46 and third_last == 46):
            line_flags[line] |= ELLIPSIS_LINE
    line_words[line + 1] = words
    counts[0], counts[1], counts[2], counts[3], counts[4], counts[5], counts[6] = characters, ink, signs, ellipses, damaged, sentences, letters
    return hashes[:words].copy(), lengths[:words].copy(), flags[:words].copy(), lines, line_lengths, line_words, line_flags, counts
