"""Rotary position embedding on the CPU, alone and behind an RMSNorm of each head. B batch, T tokens, H heads, D head dim, P table positions.

Su et al. 2021, arXiv 2104.09864; pairs are (x[d], x[d + D/2]). The norm's rows are those of `norm.py`, with each head's own weight, and what one
operation hands to the other is rounded as if they ran one after the other: the bits are the same.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba import norm
from cllm.kernels.numba.launch import (
    Kernel,
    at_most,
    float32_at,
    inline,
    int64_at,
    is_half,
    load,
    num_workers,
    put_float32,
    rows_per_block,
    scratch,
    store,
)
from cllm.kernels.numba.simd import W, vfma, vmul, vneg
from cllm.kernels.numba.sums import add_up
from cllm.kernels.operations import Shapes

TOKENS_PER_TASK = 16

(X, X_BATCH, X_TOKEN, X_HEAD, HALF, OUT, COS, SIN, POSITIONS, POSITIONS_BATCH, NUM_TOKENS, ALL_TOKENS, HEADS, PAIRS,
 INVERSE, WEIGHT, WEIGHT_HEAD, WEIGHT_HALF, RSTD, DY, PARTIAL, PARTIAL_ROW, BLOCK_TOKENS) = range(23)  # fmt: skip

_ZERO = np.float32(0.0)


@inline
def _turn(x, out, half, cos, sin, pairs, inverse):
    """A row; out may be x."""
    for c in range(0, pairs, W):
        n = pairs - c
        first, second = load(x, half, c, n), load(x, half, pairs + c, n)
        u, v = load(cos, False, c, n), load(sin, False, c, n)
        if inverse:
            v = vneg(v)
        store(out, half, c, vfma(first, u, vneg(vmul(second, v))), n)
        store(out, half, pairs + c, vfma(second, u, vmul(first, v)), n)


@inline
def _token(p, token):
    """(address of a token's first head in x, bytes from the start of the tables to the row of its position)."""
    b, t = token // p[NUM_TOKENS], token % p[NUM_TOKENS]
    position = t if p[POSITIONS] == 0 else int64_at(p[POSITIONS], b * p[POSITIONS_BATCH] + t)
    return p[X] + b * p[X_BATCH] + t * p[X_TOKEN], position * p[PAIRS] * 4


def _forward(p, f, task, worker):
    """WEIGHT is 0 where there is no norm."""
    half, head_dim = p[HALF], 2 * p[PAIRS]
    row_bytes = head_dim * (2 if half else 4)
    for token in range(task * TOKENS_PER_TASK, min((task + 1) * TOKENS_PER_TASK, p[ALL_TOKENS])):
        heads, at = _token(p, token)
        for h in range(p[HEADS]):
            row = token * p[HEADS] + h
            x, out = heads + h * p[X_HEAD], p[OUT] + row * row_bytes
            if p[WEIGHT] != 0:
                rstd = norm.inverse_rms(x, half, head_dim, _ZERO, f[0])
                put_float32(p[RSTD], row, rstd)
                norm.normalise(x, out, half, head_dim, _ZERO, rstd, p[WEIGHT] + h * p[WEIGHT_HEAD], p[WEIGHT_HALF], 0, 0)
                x = out
            _turn(x, out, half, p[COS] + at, p[SIN] + at, p[PAIRS], p[INVERSE])


def _norm_backward(p, f, task, worker):
    """One block of tokens: its rows of dx (OUT), into which dy is turned back first, and its part of dweight."""
    half, head_dim = p[HALF], 2 * p[PAIRS]
    row_bytes, partial = head_dim * (2 if half else 4), p[PARTIAL] + task * p[PARTIAL_ROW]
    norm.clear(partial, p[HEADS] * head_dim)
    for token in range(task * p[BLOCK_TOKENS], min((task + 1) * p[BLOCK_TOKENS], p[ALL_TOKENS])):
        heads, at = _token(p, token)
        for h in range(p[HEADS]):
            row = token * p[HEADS] + h
            dx = p[OUT] + row * row_bytes
            _turn(p[DY] + row * row_bytes, dx, half, p[COS] + at, p[SIN] + at, p[PAIRS], 1)
            norm.differentiate(
                dx, 0, heads + h * p[X_HEAD], dx, half, head_dim, False, _ZERO, float32_at(p[RSTD], row), p[WEIGHT] + h * p[WEIGHT_HEAD],
                p[WEIGHT_HALF], partial + h * head_dim * 4, 0,
            )  # fmt: skip


_forward_kernel, _norm_backward_kernel = Kernel(_forward), Kernel(_norm_backward)


def _dense(t: Tensor) -> Tensor:
    return t.detach() if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.detach().contiguous()


def _tasks(num_tokens: int) -> int:
    return -(-num_tokens // TOKENS_PER_TASK)


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers the forward pass uses."""
    ((batch, num_tokens, heads, head_dim),) = shapes
    return at_most(planned, _tasks(batch * num_tokens)) if heads * head_dim else 1


def _fields(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool, weight: Tensor | None, rstd: Tensor | None
) -> tuple[tuple[int, ...], tuple[object, ...]]:
    """The integers up to RSTD, and whatever they hold addresses of."""
    batch, num_tokens, heads, head_dim = x.shape
    x, cos, sin = _dense(x), cos.detach().float().contiguous(), sin.detach().float().contiguous()
    where, per_batch = 0, 0
    if positions is not None:
        positions = positions.contiguous()
        where, per_batch = positions.data_ptr(), num_tokens if positions.dim() == 2 else 0
    scale = (0, 0, 0, 0)
    if weight is not None and rstd is not None:
        weight, rstd = _dense(weight), rstd.contiguous()
        scale = weight.data_ptr(), weight.stride(0) * weight.element_size(), is_half(weight), rstd.data_ptr()
    strides = (stride * x.element_size() for stride in x.stride()[:3])
    ints = (
        x.data_ptr(), *strides, is_half(x), out.data_ptr(), cos.data_ptr(), sin.data_ptr(), where, per_batch, num_tokens, batch * num_tokens, heads,
        head_dim // 2, int(inverse), *scale,
    )  # fmt: skip
    return ints, (x, cos, sin, positions, weight, rstd)


def apply(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    """x (B, T, H, D), cos and sin (P, D/2) float32, positions int64 (T,), (B, T) or None for 0 .. T-1 -> (B, T, H, D)."""
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        ints, kept = _fields(x, out, cos, sin, positions, inverse, None, None)
        _forward_kernel(_tasks(ints[ALL_TOKENS]), num_workers("rotary", (x.shape,), x.dtype), ints)
        del kept
    return out


def norm_forward(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head of x with its row of weight (H, D), then the rotation -> (B, T, H, D), and rstd (B, T, H) float32."""
    out, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[:3], dtype=torch.float32)
    if out.numel():
        ints, kept = _fields(x, out, cos, sin, positions, False, weight, rstd)
        _forward_kernel(_tasks(ints[ALL_TOKENS]), num_workers("rotary", (x.shape,), x.dtype), ints, (eps,))
        del kept
    return out, rstd


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx (B, T, H, D) and dweight (H, D). Sums over tokens run in blocks that follow from their number alone, then in a tree."""
    dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.zeros(weight.shape, dtype=weight.dtype)
    if dx.numel():
        dy = dy.detach().contiguous()
        ints, kept = _fields(x, dx, cos, sin, positions, True, weight, rstd)
        block_tokens = rows_per_block(ints[ALL_TOKENS], TOKENS_PER_TASK)
        num_blocks, padded = -(-ints[ALL_TOKENS] // block_tokens), -(-dweight.numel() // W) * W * 4
        owner, partial = scratch("norm", num_blocks * padded)
        workers = num_workers("rotary", (x.shape,), x.dtype, backward=True)
        _norm_backward_kernel(num_blocks, workers, (*ints, dy.data_ptr(), partial, padded, block_tokens))
        add_up(partial, padded, num_blocks, dweight, workers)
        del kept, owner
    return dx, dweight
