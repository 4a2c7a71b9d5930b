"""What a figure of a model is held against: counting n-grams of the same training tokens, and programs that compress."""

from __future__ import annotations

import gzip
import lzma
from typing import TYPE_CHECKING

import numpy as np

from cllm.evaluate.ngram import MOST_TOKENS, ORDER, NGrams

if TYPE_CHECKING:
    from cllm.data import TokenSplit

FEW_TOKENS = 400_000
_PIECE = 1 << 16  # tokens of a piece, where the split is too large to be counted whole


def count_ngrams(train: TokenSplit, order: int = ORDER, most_tokens: int = MOST_TOKENS) -> NGrams:
    """The n-grams of a training split: of all of it, or of at most `most_tokens` in pieces at even distances, each as if a document began there."""
    pieces = max(1, most_tokens // _PIECE)
    if train.num_tokens <= most_tokens:
        tokens, starts = train.read(0, train.num_tokens), np.array(train.document_starts, dtype=np.int64)
    else:
        length = min(_PIECE, most_tokens)
        firsts = [number * (train.num_tokens - length) // max(1, pieces - 1) for number in range(pieces)]
        tokens = np.concatenate([train.read(first, length) for first in firsts])
        begins = []
        for number, first in enumerate(firsts):
            low, high = np.searchsorted(train.document_starts, [first, first + length])
            begins.append(np.unique(np.append(0, np.asarray(train.document_starts[low:high]) - first)) + number * length)
        starts = np.concatenate(begins)
    return NGrams.count(tokens, starts, train.vocab_size, order)


def ngram_bits_per_byte(train: TokenSplit, val: TokenSplit, order: int) -> float:
    """Bits per byte of validation text under n-grams of the training text, both of at most FEW_TOKENS tokens in pieces from all over them. A second's
    work, which tells how hard a text is before anything is trained."""
    ngrams = count_ngrams(train, order, FEW_TOKENS)
    length = min(_PIECE // 16, val.num_tokens)
    pieces = min(FEW_TOKENS // 10 // length, -(-val.num_tokens // length))
    firsts = [number * (val.num_tokens - length) // max(1, pieces - 1) for number in range(pieces)]
    bits = sum(float(ngrams.bits(val.read(first, length), np.zeros(1, dtype=np.int64)).sum()) for first in firsts)
    return bits / (pieces * length) * val.num_tokens / max(1, val.num_bytes)


def compressed_bits_per_byte(content: bytes) -> dict[str, float]:
    """Bits for each byte of `content` that gzip and xz need at their best. They learn from this text alone, while they read it."""
    size = max(1, len(content))
    return {"gzip": 8 * len(gzip.compress(content, 9, mtime=0)) / size, "xz": 8 * len(lzma.compress(content, preset=9)) / size}
