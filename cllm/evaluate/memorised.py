"""Whether pieces of text stand word for word among the training tokens: one pass over the packed tokens, whatever their number.

    standing = stand_in(train, pieces)          # for each piece, whether it does

The pieces are kept as hashes, and a rolling hash of every window of the same length is looked up among them (Karp and Rabin 1987); what agrees is
compared token by token, so that no answer rests on a hash. Memory is bounded: 32 bytes for each of the 2^20 tokens that are read at a time, and the
pieces. No index is built and nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.data.tokens.shards import PackedTokens

_TOGETHER = 1 << 20  # tokens that are read at a time
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)


def stand_in(train: PackedTokens, pieces: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None) -> np.ndarray:
    """For each piece whether it stands in the training tokens, (len(pieces),) bool; documents do not matter. `progress(done)` is called with tokens.

    Raises UserError where the pieces are empty or of several lengths.
    """
    found = np.zeros(len(pieces), dtype=bool)
    lengths = set(map(len, pieces))
    if not pieces:
        return found
    if len(lengths) > 1 or 0 in lengths:
        raise UserError(f"pieces must all have the same number of tokens, at least 1, got {sorted(lengths)}.")
    (length,) = lengths
    wanted = np.array(pieces, dtype=np.int64)
    hashes = np.array([_hashes(piece, length)[0] for piece in wanted])
    order = np.argsort(hashes, kind="stable")
    ascending = hashes[order]
    for start in range(0, max(1, train.num_tokens - length + 1), _TOGETHER):
        tokens = train.read(start, min(_TOGETHER + length - 1, train.num_tokens - start))
        if len(tokens) < length:
            break
        here = _hashes(tokens, length)
        low = np.searchsorted(ascending, here)
        for place in np.flatnonzero(ascending[np.minimum(low, len(ascending) - 1)] == here):
            window, rank = tokens[place : place + length], int(low[place])
            while rank < len(order) and ascending[rank] == here[place]:
                found[order[rank]] |= np.array_equal(wanted[order[rank]], window)
                rank += 1
        if progress is not None:
            progress(min(train.num_tokens, start + _TOGETHER))
    return found


def _hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """Of each window of `length` tokens, the sum of (token + 1) * BASE^place from its own start, modulo 2^64: (n - length + 1,) uint64."""
    powers = np.cumprod(np.concatenate([np.ones(1, dtype=np.uint64), np.full(len(tokens) - 1, _BASE, dtype=np.uint64)]))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * powers)])
    back = np.cumprod(np.concatenate([np.ones(1, dtype=np.uint64), np.full(len(tokens) - length, _INVERSE, dtype=np.uint64)]))
    return (sums[length:] - sums[:-length]) * back
