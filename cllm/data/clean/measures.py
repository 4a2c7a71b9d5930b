"""What filters measure in a text: shares of repeated lines and words, and how its lines look. Compiled, since each document passes here."""

from typing import NamedTuple

import numpy as np

from cllm.data.clean import words as parts
from cllm.data.clean.compiling import jit
from cllm.data.clean.words import BRACE_LINE, BULLET_LINE, ELLIPSIS_LINE, HAS_LETTER, STOP_LINE, Words, between, mixed, power, prefixes

WINDOW = 10_000  # words that are searched for repetitions together
_SHORT_LINE = 30  # characters (FineWeb)
_WRAPPED = (50, 100)  # characters of a line that can be the middle of a paragraph which a program or a typist has wrapped
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Measures(NamedTuple):
    """Shares are numbers from 0 to 1. Those of an empty text are 0."""

    word_length: float
    letter_words: float
    stop_words: float
    """Different ones out of those that were asked for."""
    bullet_lines: float
    ellipsis_lines: float
    stop_lines: float
    short_lines: float
    brace_lines: float
    lines_per_word: float
    longest_line: float
    mean_line: float
    duplicate_lines: float
    duplicate_line_characters: float
    duplicate_paragraphs: float
    duplicate_paragraph_characters: float
    top_2: float
    top_3: float
    top_4: float
    duplicate_5: float
    duplicate_6: float
    duplicate_7: float
    duplicate_8: float
    duplicate_9: float
    duplicate_10: float


def measure(words: Words, stop_words: np.ndarray) -> Measures:
    """Everything at once. `stop_words`: (S,) uint64 hashes of words, as in `Words.hashes`."""
    scale = 2 if 2 * words.ideographs > len(words.hashes) else 1
    found = _measure(words.hashes, words.lengths, words.flags, words.lines, words.line_lengths, words.line_flags, stop_words, scale, words.word_count)
    return Measures(*found.tolist())


def word_hashes(*words: str) -> np.ndarray:
    """Hashes of single words, as in `Words.hashes`."""
    return np.concatenate([parts.split(word).hashes for word in words]) if words else np.empty(0, np.uint64)


@jit
def slot(table, key):
    """Where a key stands in a table of 2^k places, or the free place for it. Keys are not 0."""
    mask = np.uint64(len(table) - 1)
    place = (key * _MULTIPLIER >> np.uint64(32)) & mask
    while table[place] != np.uint64(0) and table[place] != key:
        place = (place + np.uint64(1)) & mask
    return place


@jit
def table_size(entries):
    size = 16
    while size < 2 * entries:
        size *= 2
    return size


@jit
def _repeats(keys, lengths):
    """How many of the keys that are not 0 stood before, how many characters those have, and the same of all keys."""
    table = np.zeros(table_size(len(keys)), np.uint64)
    repeated = repeated_characters = total = characters = 0
    for i in range(len(keys)):
        if keys[i] == np.uint64(0):
            continue
        total += 1
        characters += lengths[i]
        place = slot(table, keys[i])
        if table[place] == keys[i]:
            repeated += 1
            repeated_characters += lengths[i]
        table[place] = keys[i]
    return repeated, repeated_characters, total, characters


@jit
def _paragraphs(lines, lengths):
    """A key and the characters of each run of lines between blank ones."""
    keys, sizes = np.zeros(len(lines), np.uint64), np.zeros(len(lines), np.int32)
    count = 0
    for i in range(len(lines)):
        if lines[i] == np.uint64(0):
            count += sizes[count] > 0
        else:
            keys[count] = mixed(keys[count] * _MULTIPLIER + lines[i])
            sizes[count] += lengths[i]
    return keys, sizes


@jit
def _top(sums, ends, first, last, n, table, counts):
    """Characters in all occurrences of the commonest n words in a row, where they occur more than once."""
    table[:] = np.uint64(0)
    base_power = power(n)
    most = best = 0
    for i in range(first, last - n + 1):
        key = between(sums, i, i + n, base_power) | np.uint64(1)
        place = slot(table, key)
        if table[place] != key:
            table[place] = key
            counts[place] = 0
        counts[place] += 1
        if counts[place] > 1:
            characters = counts[place] * (ends[i + n] - ends[i])
            if counts[place] > most or (counts[place] == most and characters > best):
                most, best = counts[place], characters
    return best


@jit
def _duplicated(sums, ends, first, last, n, table):
    """Characters in n words in a row that stood before, each counted once."""
    table[:] = np.uint64(0)
    base_power = power(n)
    characters = 0
    i = first
    while i <= last - n:
        key = between(sums, i, i + n, base_power) | np.uint64(1)
        place = slot(table, key)
        if table[place] == key:
            characters += ends[i + n] - ends[i]
            i += n
        else:
            table[place] = key
            i += 1
    return characters


@jit
def _repetition(hashes, lengths, scale, found):
    """Fills `found` with the shares of the commonest 2 to 4 and of repeated 5 to 10 words, of which `scale` letters make one."""
    num = len(hashes)
    ends = np.zeros(num + 1, np.int64)
    for i in range(num):
        ends[i + 1] = ends[i] + lengths[i]
    if not ends[num]:
        return
    sums = prefixes(hashes)
    window = WINDOW * scale
    size = table_size(min(num, window))
    table, counts = np.empty(size, np.uint64), np.empty(size, np.int32)
    for first in range(0, num, window):
        last = min(first + window, num)
        for n in range(2, 5):
            found[n - 2] += _top(sums, ends, first, last, n * scale, table, counts)
        for n in range(5, 11):
            found[n - 2] += _duplicated(sums, ends, first, last, n * scale, table)
    for i in range(9):
        found[i] /= ends[num]


@jit
def _measure(hashes, lengths, flags, lines, line_lengths, line_flags, stop_words, scale, word_count):
    found = np.zeros(24)
    num = len(hashes)
    seen = np.zeros(len(stop_words), np.uint8)
    characters = letter_words = 0
    for i in range(num):
        characters += lengths[i]
        letter_words += flags[i] & HAS_LETTER
        for j in range(len(stop_words)):
            seen[j] |= hashes[i] == stop_words[j]
    if num:
        found[0], found[1], found[2] = characters / num, letter_words / num, seen.sum()

    written = bullets = ellipses = stops = ended = short = braces = longest = total = 0
    for i in range(len(lines)):
        length = line_lengths[i]
        if not length:
            continue
        written += 1
        total += length
        longest = max(longest, length)
        short += length <= _SHORT_LINE
        bullets += line_flags[i] & BULLET_LINE != 0
        ellipses += line_flags[i] & ELLIPSIS_LINE != 0
        braces += line_flags[i] & BRACE_LINE != 0
        stop = line_flags[i] & STOP_LINE != 0
        stops += stop
        goes_on = _WRAPPED[0] <= length <= _WRAPPED[1] and i + 1 < len(lines) and line_lengths[i + 1] > 0
        ended += stop or not goes_on
    if written:
        found[3], found[4], found[6], found[7] = bullets / written, ellipses / written, short / written, braces / written
        found[5] = stops / ended if ended else 0.0
        found[8] = (len(lines) - 1) / max(word_count, 1)
        found[9], found[10] = longest, total / written

    repeated, repeated_characters, count, line_characters = _repeats(lines, line_lengths)
    if count:
        found[11], found[12] = repeated / count, repeated_characters / line_characters
    keys, sizes = _paragraphs(lines, line_lengths)
    repeated, repeated_characters, count, line_characters = _repeats(keys, sizes)
    if count:
        found[13], found[14] = repeated / count, repeated_characters / line_characters
    _repetition(hashes, lengths, scale, found[15:])
    return found
