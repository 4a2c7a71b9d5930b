"""Near duplicates: documents that share most of their word 5-grams.

    bands = signature(words)                          # (20,) uint64 for each document; equal keys make candidates
    pairs = edges(keys, documents)                    # all bands in one memory or part by part: see components
    for group in groups(num_documents, pairs):
        dropped |= verify(group, bands[group], shingles_of, 0.8)

MinHash (Broder 1997) with banding (Leskovec et al., Mining of Massive Datasets, chapter 3). FineWeb has 14 bands of 8 values, which miss 7.6 % of the
pairs of Jaccard similarity 0.80 and 1.2 % of those of 0.85. Since candidates are verified here before anything is dropped, false ones only cost time:
20 bands of 6 miss 0.2 % and 0.01 %, with about the same number of values.

A document is dropped only when its exact similarity with one that is *kept* reaches the threshold. A chain of similar documents therefore never falls
as a whole, as it does where groups are dropped down to one.
"""

from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from cllm.data.clean import words as parts
from cllm.data.clean.compiling import jit
from cllm.data.clean.components import edges, groups
from cllm.data.clean.words import Words, distinct, mixed, ngrams
from cllm.runtime.errors import DataError

SHINGLE = 5  # words
BANDS, ROWS = 20, 6
MOST_COMPARISONS = 32  # of a document with kept ones of its group, those that share most bands first
_MOST_OF_A_KEY = 64  # kept documents that are remembered for it: a key of more is that of a template, and true pairs share others besides
_SEED = 42
_RENSA = 2  # ALGORITHM_VERSION of its signatures
VERSION = f"words {parts.VERSION}, rensa {_RENSA}, {BANDS} x {ROWS}"  # of the keys: part of a recipe's digest
_CACHED = 4096  # documents whose shingles are held while a group is verified
_BASE = np.uint64(0x9E3779B97F4A7C15)

Dropped = dict[int, tuple[int, float]]
"""From a dropped document to the kept one that it repeats, and how similar they are."""


def signature(words: Words) -> np.ndarray:
    """(20,) uint64: the keys of a document's bands, all 0 for one of fewer than five words, which has exact duplicates only.

    Raises DataError where rensa is missing or makes other signatures than the ones we store.
    """
    return bands_of(ngrams(words.hashes, SHINGLE))


def bands_of(hashes: np.ndarray, num_bands: int = BANDS, num_rows: int = ROWS) -> np.ndarray:
    """(num_bands,) uint64: the keys of a set of hashes, (M,) uint64 in any order; all 0 where there are none. Raises as `signature` does."""
    if not len(hashes):
        return np.zeros(num_bands, np.uint64)
    offsets = np.array([0, len(hashes)], np.uint64)
    rows = _rensa().digest_matrix_from_flat_token_hashes(hashes, offsets, num_bands * num_rows, _SEED).to_rows()
    return _bands(np.array(rows[0], np.uint64), num_bands)


def shingles(words: Words) -> np.ndarray:
    """(U,) uint64, ascending: hashes of the different 5-grams of a document's words."""
    return distinct(ngrams(words.hashes, SHINGLE))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Shared entries of two ascending arrays without repetitions, as a part of all their entries; 0 where both are empty."""
    shared = _shared(a, b)
    return shared / max(len(a) + len(b) - shared, 1)


def verify(documents: np.ndarray, bands: np.ndarray, shingles_of: Callable[[int], np.ndarray], threshold: float, first: int = 0) -> Dropped:
    """Which documents of a group are dropped, and for which one that stays.

    `documents`: (G,) ascending; each is looked at in this order, so the smallest is kept. `bands`: (G, B) uint64, their keys. `shingles_of`: the
    `shingles` of a document. Documents below `first` are never dropped: those of data sets that exist already.
    """
    load = lru_cache(_CACHED)(shingles_of)
    kept: dict[int, list[int]] = {}  # by the key of a band
    dropped: Dropped = {}
    for document, keys in zip(documents.tolist(), bands.tolist()):
        keys = [key for key in keys if key]
        if document >= first:
            shared = Counter(other for key in keys for other in kept.get(key, ()))
            mine = load(document) if shared else None
            for other, _ in sorted(shared.items(), key=lambda item: (-item[1], item[0]))[:MOST_COMPARISONS]:
                assert mine is not None
                similarity = jaccard(mine, load(other))
                if similarity >= threshold:
                    dropped[document] = other, similarity
                    break
        if document not in dropped:
            for key in keys:
                if len(same := kept.setdefault(key, [])) < _MOST_OF_A_KEY:
                    same.append(document)
    return dropped


def deduplicate(bands: np.ndarray, shingles_of: Callable[[int], np.ndarray], threshold: float, first: int = 0) -> Dropped:
    """Near duplicates among documents 0 .. N - 1, all in memory: 14 bytes a band and document. `bands`: (N, B) uint64. See `verify`."""
    numbers = np.arange(len(bands), dtype=np.uint32)
    pairs = np.concatenate([edges(np.ascontiguousarray(keys), numbers) for keys in bands.T]) if len(bands) else np.empty((0, 2), np.uint32)
    dropped: Dropped = {}
    for group in groups(len(bands), pairs):
        dropped |= verify(group, bands[group], shingles_of, threshold, first)
    return dropped


@lru_cache(1)
def _rensa() -> Any:
    try:
        import rensa
    except ImportError:
        raise DataError("finding near duplicates needs rensa, which is not installed. Install it with: pip install 'cllm[data]'") from None
    if rensa.RMinHash.ALGORITHM_VERSION != _RENSA:
        raise DataError(
            f"this rensa makes signatures of version {rensa.RMinHash.ALGORITHM_VERSION}, and those of cllm are of version {_RENSA}. "
            "Install the right one with: pip install 'cllm[data]'"
        )
    return rensa.RMinHash


@jit
def _bands(values, num_bands):
    """(num_bands,) uint64: a key for each band of values, never 0, different for equal values in different bands."""
    rows = len(values) // num_bands
    keys = np.empty(num_bands, np.uint64)
    for band in range(num_bands):
        key = np.uint64(band + 1)
        for i in range(band * rows, (band + 1) * rows):
            key = mixed(key * _BASE + values[i])
        keys[band] = max(key, np.uint64(1))
    return keys


@jit
def _shared(a, b):
    """How many entries two ascending arrays have in common."""
    i = j = shared = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            shared += 1
            i += 1
            j += 1
        elif a[i] < b[j]:
            i += 1
        else:
            j += 1
    return shared
