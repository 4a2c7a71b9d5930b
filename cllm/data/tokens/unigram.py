"""A unigram language model of subwords (Kudo 2018) over bytes: of all ways to write a word as entries, the likeliest is taken.

Learned as SentencePiece does: from all substrings that occur at least twice, entries are dropped in rounds. Each round fits the probabilities of
the entries to the text by expectation maximisation, and drops those without which the text loses the least likelihood. Words are those of GPT-2's
pattern, in its printable stand-ins for bytes, and the 256 bytes are never dropped, so that any text can be encoded and comes back unchanged.

The tokenizers library learns such models as well, but adds up in the order of its hash tables, and gives other entries in every run. Here words are
in the order of their bytes and sums in the order of the words: the same text gives the same vocabulary.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from cllm.data.tokens.vocabulary import (
    BPE_SPECIALS,
    added_token,
    byte_level_bytes,
    byte_level_name,
    byte_level_steps,
    check_vocab_size,
    fill_up,
    pattern_of,
    round_up,
    without_long_runs,
)
from cllm.runtime.errors import DataError

_PIECE, _WORD = 16, 64  # bytes of an entry, and of a word, at most
_WORDS = 200_000  # different ones, the most frequent
_SEEDS = 1_000_000  # entries to begin with, at most
_KEPT = 0.75  # of the entries in each round
_SPARE = 1.1  # entries for each that is wanted at the end of the rounds: the likeliest of them stay
_RARE = 0.5  # occurrences, expected, below which an entry is dropped


class _Words(NamedTuple):
    """The different words, one after the other: their bytes, where each begins (and the last ends), and how often it occurs."""

    text: np.ndarray  # (n,) uint8
    starts: np.ndarray  # (words + 1,) int64
    counts: np.ndarray  # (words,) float64


def learn_unigram(stream: Iterator[str], vocab_size: int, pre_tokenizer: str) -> dict[str, Any]:
    """The content of a tokenizer.json, its vocabulary rounded up to a multiple of 64. Raises UserError as `learn_bpe` does, DataError for no text."""
    pattern = pattern_of(pre_tokenizer)
    check_vocab_size(vocab_size, 256)
    words = _words(stream, pattern)
    pieces, scores = _learn(words, round_up(vocab_size) - len(BPE_SPECIALS))
    vocabulary = [[name, 0.0] for name in BPE_SPECIALS] + [[byte_level_name(piece), round(float(score), 6)] for piece, score in zip(pieces, scores)]
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [added_token(i, name) for i, name in enumerate(BPE_SPECIALS)],
        "normalizer": None, "pre_tokenizer": byte_level_steps(pattern), "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "Unigram", "unk_id": None, "vocab": vocabulary, "byte_fallback": False},
    }  # fmt: skip
    return fill_up(content)


def _words(stream: Iterator[str], pattern: str | None) -> _Words:
    from tokenizers import Regex, pre_tokenizers

    if pattern is None:
        split: pre_tokenizers.PreTokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        split = pre_tokenizers.Sequence(parts)
    counts: Counter[str] = Counter()
    for text in stream:
        for part in without_long_runs(text):
            counts.update(word for word, _ in split.pre_tokenize_str(part))
    short: Counter[bytes] = Counter()
    for word, count in counts.items():
        content = byte_level_bytes(word)
        for start in range(0, len(content), _WORD):
            short[content[start : start + _WORD]] += count
    if not short:
        raise DataError("There is no text to learn a vocabulary from.")
    kept = sorted(sorted(short, key=lambda word: (-short[word], word))[:_WORDS])
    starts = np.cumsum([0, *map(len, kept)], dtype=np.int64)
    return _Words(np.frombuffer(b"".join(kept), dtype=np.uint8), starts, np.array([short[word] for word in kept], dtype=np.float64))


# -- entries ------------------------------------------------------------------------------------------------------------------------


class _Seeds(NamedTuple):
    """The entries to begin with, of which the first 256 are the bytes. `edges[n - 1, i]` is the entry that is the n bytes from place i, or -1."""

    edges: np.ndarray  # (_PIECE, n) int32
    places: np.ndarray  # (entries,) int64: where one stands in the text; -1 for a byte that does not occur
    lengths: np.ndarray  # (entries,) int64
    counts: np.ndarray  # (entries,) float64


def _seeds(words: _Words) -> _Seeds:
    """All substrings that occur twice, and of very many those that stand for most bytes. A substring can only occur twice where the one without its
    last byte does: each length is found from the one before, as pairs of a number and a byte."""
    text, n = words.text, len(words.text)
    ends = np.repeat(words.starts[1:], np.diff(words.starts))
    weights = np.repeat(words.counts, np.diff(words.starts))
    places, numbers = np.arange(n), text.astype(np.int64)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []  # of each length from 2: counts, first places, places, number at each
    for length in range(2, _PIECE + 1):
        fits = places + length <= ends[places]
        places = places[fits]
        keys = numbers[fits] * 256 + text[places + length - 1]
        _, first, numbers = np.unique(keys, return_index=True, return_inverse=True)
        counts = np.bincount(numbers, weights=weights[places], minlength=len(first))
        renumbered = np.cumsum(counts >= 2) - 1
        frequent = counts[numbers] >= 2
        first_places = places[first][counts >= 2]
        places, numbers = places[frequent], renumbered[numbers[frequent]]
        if not len(places):
            break
        found.append((counts[counts >= 2], first_places, places, numbers))
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *(np.full(len(each[0]), i) for i, each in enumerate(found, 2))])
    counts = np.concatenate([np.zeros(0), *(each[0] for each in found)])
    best = np.argsort(-counts * lengths, kind="stable")[:_SEEDS]
    chosen = np.full(len(counts), -1, dtype=np.int32)
    chosen[np.sort(best)] = 256 + np.arange(len(best), dtype=np.int32)
    edges = np.full((_PIECE, n), -1, dtype=np.int32)
    edges[0] = text
    start = 0
    for i, (own, _, where, number) in enumerate(found, 1):
        edges[i, where] = chosen[start + number]
        start += len(own)
    firsts = np.full(256, -1, dtype=np.int64)
    seen, where = np.unique(text, return_index=True)
    firsts[seen] = where
    kept = np.sort(best)
    all_firsts = np.concatenate([np.zeros(0, dtype=np.int64), *(each[1] for each in found)])
    return _Seeds(
        edges,
        np.concatenate([firsts, all_firsts[kept]]),
        np.concatenate([np.ones(256, dtype=np.int64), lengths[kept]]),
        np.concatenate([np.bincount(text, weights=weights, minlength=256), counts[kept]]),
    )


def _learn(words: _Words, wanted: int) -> tuple[list[bytes], np.ndarray]:
    """The entries and the logarithms of their probabilities: the 256 bytes, then others, the likeliest first, at most `wanted` together."""
    seeds = _seeds(words)
    is_byte = np.arange(len(seeds.places)) < 256
    alive = np.ones(len(seeds.places), dtype=np.bool_)
    shares = np.maximum(seeds.counts * np.where(is_byte, 1, seeds.lengths), 1.0)
    scores = np.log(shares / shares.sum())
    while True:
        for _ in range(2):
            expected = np.zeros(len(scores))
            _expect(seeds.edges, words.starts, words.counts, scores, expected)
            alive &= is_byte | (expected >= _RARE)
            expected = np.where(alive, np.maximum(expected, _RARE), 0.0)
            scores = np.where(alive, _digamma(np.where(alive, expected, 1.0)) - _digamma(np.array([expected.sum()]))[0], -np.inf)
        left = int(alive.sum())
        least = max(int(_SPARE * wanted), wanted)
        if left <= least:
            break
        losses = np.full(len(scores), np.inf)
        _losses(seeds.edges, seeds.places, seeds.lengths, scores, expected, losses)
        losses[is_byte] = np.inf
        losses[~alive] = -np.inf
        dropped = np.argsort(losses, kind="stable")[: len(scores) - max(least, int(_KEPT * left))]
        alive[dropped] = False
        scores = np.where(alive, scores, -np.inf)
    others = np.flatnonzero(alive & ~is_byte)
    others = others[np.argsort(-scores[others], kind="stable")][: max(0, wanted - 256)]
    seen = seeds.places[:256] >= 0
    lowest = min(scores[:256][seen].min(), scores[others].min(initial=0.0))
    byte_scores = np.where(seen, scores[:256], lowest - 1.0)
    text = words.text.tobytes()
    names = [text[seeds.places[i] : seeds.places[i] + seeds.lengths[i]] for i in others]
    return [*(bytes([byte]) for byte in range(256)), *names], np.concatenate([byte_scores, scores[others]])


@njit(cache=True)
def _expect(edges: np.ndarray, starts: np.ndarray, counts: np.ndarray, scores: np.ndarray, expected: np.ndarray) -> None:
    """Adds to `expected` (entries,) how often each entry is used, by the probabilities of all ways to write each word."""
    forward, backward = np.empty(_WORD + 1), np.empty(_WORD + 1)
    for word in range(len(counts)):
        begin, n = starts[word], starts[word + 1] - starts[word]
        forward[0], backward[n] = 0.0, 0.0
        for end in range(1, n + 1):
            total = -np.inf
            for start in range(max(0, end - _PIECE), end):
                entry = edges[end - start - 1, begin + start]
                if entry >= 0 and scores[entry] > -np.inf:
                    total = _log_sum(total, forward[start] + scores[entry])
            forward[end] = total
        for start in range(n - 1, -1, -1):
            total = -np.inf
            for end in range(start + 1, min(n, start + _PIECE) + 1):
                entry = edges[end - start - 1, begin + start]
                if entry >= 0 and scores[entry] > -np.inf:
                    total = _log_sum(total, backward[end] + scores[entry])
            backward[start] = total
        for start in range(n):
            for end in range(start + 1, min(n, start + _PIECE) + 1):
                entry = edges[end - start - 1, begin + start]
                if entry >= 0 and scores[entry] > -np.inf:
                    expected[entry] += counts[word] * np.exp(forward[start] + scores[entry] + backward[end] - forward[n])


@njit(cache=True)
def _log_sum(a: float, b: float) -> float:
    """log(exp(a) + exp(b)); a may be -inf."""
    if a < b:
        a, b = b, a
    return a if b == -np.inf else a + np.log1p(np.exp(b - a))


@njit(cache=True)
def _losses(edges: np.ndarray, places: np.ndarray, lengths: np.ndarray, scores: np.ndarray, expected: np.ndarray, losses: np.ndarray) -> None:
    """Writes to `losses` (entries,) what the text loses without each entry: its expected number, times how much likelier it is than the best other
    way to write it."""
    best = np.empty(_PIECE + 1)
    for entry in range(256, len(scores)):
        if scores[entry] == -np.inf:
            continue
        place, n = places[entry], lengths[entry]
        best[0] = 0.0
        for end in range(1, n + 1):
            best[end] = -np.inf
            for start in range(end):
                other = edges[end - start - 1, place + start]
                if other >= 0 and other != entry:
                    best[end] = max(best[end], best[start] + scores[other])
        losses[entry] = expected[entry] * (scores[entry] - best[n])


def _digamma(x: np.ndarray) -> np.ndarray:
    """The derivative of log gamma at x > 0: by its recurrence up to 7, then the asymptotic series (Abramowitz and Stegun 6.3.5, 6.3.18)."""
    x, result = x.astype(np.float64), np.zeros(len(x))
    for _ in range(7):
        small = x < 7
        result = np.where(small, result - 1 / np.where(small, x, 1.0), result)
        x = np.where(small, x + 1, x)
    inverse = 1 / (x * x)
    return result + np.log(x) - 0.5 / x - inverse * (1 / 12 - inverse * (1 / 120 - inverse * (1 / 252 - inverse / 240)))
