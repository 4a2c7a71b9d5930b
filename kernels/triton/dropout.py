"""Which elements dropout keeps (see `kernels/philox.py`), drawn inside other kernels. A kernel gets the address of the key, which it reads itself, so
that a CUDA graph draws anew at every replay."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.philox import DRAW_BITS, GROUP, LANES, scale_of, threshold_of

_LANES, _GROUP, _DRAW_BITS = tl.constexpr(LANES), tl.constexpr(GROUP), tl.constexpr(DRAW_BITS)

NO_DROPOUT: tuple[None, int, int, float] = (None, 0, 0, 1.0)


def drawn(key: Tensor, rate: float, place: int) -> tuple[Any, ...]:
    """(key, threshold, place, scale): what kernels with dropout take; `NO_DROPOUT` where there is none."""
    return key, threshold_of(rate), place, scale_of(rate)


@triton.jit
def words(key_ptr, call, token, place):
    """The four words of calls `call` for tokens `token`, which broadcast; of tokens counted from the first one of the key."""
    call, token = tl.broadcast(call.to(tl.uint32), (token.to(tl.int64) + tl.load(key_ptr + 2)).to(tl.uint32))
    zero = call * 0
    return tl.philox(tl.load(key_ptr), call, token, zero + place, zero + tl.load(key_ptr + 1).to(tl.uint32))


@triton.jit
def halves(word, threshold):
    """(..., 2) int8: whether the draws in the lower and in the upper half of a word keep their elements."""
    lower = (word & 0xFFFF) >= threshold
    upper = (word >> _DRAW_BITS) >= threshold
    return tl.join(lower.to(tl.int8), upper.to(tl.int8))


@triton.jit
def kept_tile(key_ptr, place, threshold, token, first, BLOCK: tl.constexpr):
    """(M, BLOCK) bool for tokens (M,) and the elements from `first` (M,) on, all of them the same number of 16 behind a whole group of 128, and for
    a BLOCK of less than 128 at a multiple of it. BLOCK is a power of 2 from 16 on."""
    rows: tl.constexpr = token.shape[0]
    group = first // _GROUP * _LANES
    if BLOCK >= _GROUP:
        groups: tl.constexpr = BLOCK // _GROUP
        call = group[:, None] + tl.arange(0, BLOCK // _GROUP * _LANES)[None, :]
        w0, w1, w2, w3 = words(key_ptr, call, token[:, None], place)
        pairs = tl.join(tl.join(halves(w0, threshold), halves(w1, threshold)), tl.join(halves(w2, threshold), halves(w3, threshold)))
        pairs = tl.reshape(pairs, (rows, groups, _LANES, 2, 2, 2))
        keep = tl.reshape(tl.permute(pairs, (0, 1, 5, 4, 3, 2)), (rows, BLOCK))
    else:
        w0, w1, w2, w3 = words(key_ptr, group[:, None] + tl.arange(0, _LANES)[None, :], token[:, None], place)
        slot = (first % _GROUP // _LANES)[:, None]  # the first of the block
        if BLOCK == 64:
            pairs = tl.join(halves(tl.where(slot == 0, w0, w2), threshold), halves(tl.where(slot == 0, w1, w3), threshold))
            keep = tl.reshape(tl.permute(pairs, (0, 3, 2, 1)), (rows, BLOCK))
        else:
            word = tl.where(slot < 4, tl.where(slot < 2, w0, w1), tl.where(slot < 6, w2, w3))
            if BLOCK == 32:
                keep = tl.reshape(tl.permute(halves(word, threshold), (0, 2, 1)), (rows, BLOCK))
            else:
                keep = (tl.where(slot % 2 == 0, word & 0xFFFF, word >> _DRAW_BITS) >= threshold).to(tl.int8)
    return keep != 0


@triton.jit
def kept_elements(key_ptr, place, threshold, token, element):
    """Whether each element is kept, wherever it lies; token and element broadcast. A call for each element, of whose eight draws one is used."""
    call = (element // _GROUP * _LANES + element % _LANES).to(tl.uint32)
    w0, w1, w2, w3 = words(key_ptr, call, token, place)
    slot = element % _GROUP // _LANES
    word = tl.where(slot < 4, tl.where(slot < 2, w0, w1), tl.where(slot < 6, w2, w3))
    return tl.where(slot % 2 == 0, word & 0xFFFF, word >> _DRAW_BITS) >= threshold
