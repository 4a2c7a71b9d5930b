"""Hashed n-grams: the row of a table that belongs to a token and the ones before it, by integer arithmetic alone.

A quarter of an embedding of the last two or three tokens is added to that of the token: what follows often is looked up instead of computed (Roy et
al. 2022, arXiv 2207.06881, have such tables; so have modded-nanogpt and parameter-golf). All n-grams share the rows of a table by the hash

    row = ((sum of MULTIPLIERS[i] * t_i mod 2^64) >> 33) mod rows

of t_0, the token itself, t_1, the one before, and so on: multiply-shift for vectors (Dietzfelbinger 1996). A token that is not there, because its
document begins later, counts as -1, so that n-grams at the beginning of a document have rows of their own and never show what was packed before it.
The hash is part of a trained model: another one would look up other rows.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

# The first 64 binary places of the fractions of the square roots of 2, 5 and 11, the last place set, so that all are odd.
MULTIPLIERS = (0x6A09E667F3BCC909, 0x3C6EF372FE94F82B, 0x510E527FADE682D1)
NONE = -1  # in the place of a token that is not there
_BITS = (1 << 31) - 1

Tokens = TypeVar("Tokens", int, Tensor)


def row_of(newest_first: Sequence[Tokens], rows: int) -> Tokens:
    """The row of n tokens, the newest first, within [0, rows): of whole numbers, or of int64 tensors of one shape element by element.

    Python's numbers do not overflow and int64 tensors do, modulo 2^64; of either, the bits 33 to 63 are the same.
    """
    mixed = newest_first[0] * MULTIPLIERS[0]
    for token, multiplier in zip(newest_first[1:], MULTIPLIERS[1:]):
        mixed = mixed + token * multiplier
    return ((mixed >> 33) & _BITS) % rows


def tokens_before(tokens: Tensor, positions: Tensor | None, distance: int) -> Tensor:
    """Of each of tokens (B, T) the one so many places before it, NONE where its document has not begun.

    positions: of each token in its document, of a shape that broadcasts; None where every row is one document from its beginning.
    """
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens.roll(distance, 1).masked_fill(positions < distance, NONE)
