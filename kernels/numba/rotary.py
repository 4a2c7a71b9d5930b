"""Rotary position embedding on the CPU, alone and behind an RMSNorm of each head. B batch, T tokens, H heads, D head dim, P table positions.

Su et al. 2021, arXiv 2104.09864; pairs are (x[d], x[d + D/2]). The norm's rows are those of `norm.py`, with each head's own weight, and what one
operation hands to the other is rounded as if they ran one after the other: the bits are the same.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba import norm
from cllm.kernels.numba.fields import fields
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


class _Arguments(NamedTuple):
    """Addresses, and strides in bytes."""

    x: int
    x_batch: int
    x_token: int
    x_head: int
    half: int  # whether x, dy and the output are bfloat16
    out: int  # contiguous; backward dx
    cos: int
    sin: int
    positions: int  # int64; 0: the tokens are at 0, 1, 2, ...
    positions_batch: int  # in elements; 0: the same for every sequence
    num_tokens: int
    all_tokens: int
    heads: int
    pairs: int  # half of the head size
    inverse: int  # turns by the negative angle
    weight: int = 0  # of the norm before the rotation; 0: there is none
    weight_head: int = 0
    weight_half: int = 0
    rstd: int = 0  # float32, one for each head of each token


class _Backward(NamedTuple):
    """What the gradient of the norm reads behind the fields above."""

    dy: int  # contiguous
    partial: int  # float32 sums of each block of tokens, for dweight
    partial_row: int
    block_tokens: int


class _Options(NamedTuple):
    eps: float


P, _arguments = fields(_Arguments)
B, _backward_arguments = fields(_Backward, start=len(P))
F, _options = fields(_Options)

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
    b, t = token // p[P.num_tokens], token % p[P.num_tokens]
    position = t if p[P.positions] == 0 else int64_at(p[P.positions], b * p[P.positions_batch] + t)
    return p[P.x] + b * p[P.x_batch] + t * p[P.x_token], position * p[P.pairs] * 4


def _forward(p, f, task, worker):
    """WEIGHT is 0 where there is no norm."""
    half, head_dim = p[P.half], 2 * p[P.pairs]
    row_bytes = head_dim * (2 if half else 4)
    for token in range(task * TOKENS_PER_TASK, min((task + 1) * TOKENS_PER_TASK, p[P.all_tokens])):
        heads, at = _token(p, token)
        for h in range(p[P.heads]):
            row = token * p[P.heads] + h
            x, out = heads + h * p[P.x_head], p[P.out] + row * row_bytes
            if p[P.weight] != 0:
                rstd = norm.inverse_rms(x, half, head_dim, _ZERO, f[F.eps])
                put_float32(p[P.rstd], row, rstd)
                norm.normalise(x, out, half, head_dim, _ZERO, rstd, p[P.weight] + h * p[P.weight_head], p[P.weight_half], 0, 0)
                x = out
            _turn(x, out, half, p[P.cos] + at, p[P.sin] + at, p[P.pairs], p[P.inverse])


def _norm_backward(p, f, task, worker):
    """One block of tokens: its rows of dx (OUT), into which dy is turned back first, and its part of dweight."""
    half, head_dim = p[P.half], 2 * p[P.pairs]
    row_bytes, partial = head_dim * (2 if half else 4), p[B.partial] + task * p[B.partial_row]
    norm.clear(partial, p[P.heads] * head_dim)
    for token in range(task * p[B.block_tokens], min((task + 1) * p[B.block_tokens], p[P.all_tokens])):
        heads, at = _token(p, token)
        for h in range(p[P.heads]):
            row = token * p[P.heads] + h
            dx = p[P.out] + row * row_bytes
            _turn(p[B.dy] + row * row_bytes, dx, half, p[P.cos] + at, p[P.sin] + at, p[P.pairs], 1)
            norm.differentiate(
                dx, 0, heads + h * p[P.x_head], dx, half, head_dim, False, _ZERO, float32_at(p[P.rstd], row), p[P.weight] + h * p[P.weight_head],
                p[P.weight_half], partial + h * head_dim * 4, 0,
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


def _prepared(
    x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool, weight: Tensor | None, rstd: Tensor | None
) -> tuple[tuple[int, ...], tuple[object, ...]]:
    """The kernel's arguments, and whatever they hold addresses of."""
    batch, num_tokens, heads, head_dim = x.shape
    x, cos, sin = _dense(x), cos.detach().float().contiguous(), sin.detach().float().contiguous()
    positions = None if positions is None else positions.contiguous()
    weight = None if weight is None else _dense(weight)
    rstd = None if rstd is None else rstd.contiguous()
    size, (batch_stride, token_stride, head_stride, _) = x.element_size(), x.stride()
    arguments = _arguments(
        x=x.data_ptr(),
        x_batch=batch_stride * size,
        x_token=token_stride * size,
        x_head=head_stride * size,
        half=is_half(x),
        out=out.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        positions=0 if positions is None else positions.data_ptr(),
        positions_batch=num_tokens if positions is not None and positions.dim() == 2 else 0,
        num_tokens=num_tokens,
        all_tokens=batch * num_tokens,
        heads=heads,
        pairs=head_dim // 2,
        inverse=int(inverse),
        weight=0 if weight is None else weight.data_ptr(),
        weight_head=0 if weight is None else weight.stride(0) * weight.element_size(),
        weight_half=0 if weight is None else is_half(weight),
        rstd=0 if rstd is None else rstd.data_ptr(),
    )
    return arguments, (x, cos, sin, positions, weight, rstd)


def apply(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    """x (B, T, H, D), cos and sin (P, D/2) float32, positions int64 (T,), (B, T) or None for 0 .. T-1 -> (B, T, H, D)."""
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        arguments, kept = _prepared(x, out, cos, sin, positions, inverse, None, None)
        _forward_kernel(_tasks(x.shape[0] * x.shape[1]), num_workers("rotary", (x.shape,), x.dtype), arguments)
        del kept
    return out


def norm_forward(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head of x with its row of weight (H, D), then the rotation -> (B, T, H, D), and rstd (B, T, H) float32."""
    out, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[:3], dtype=torch.float32)
    if out.numel():
        arguments, kept = _prepared(x, out, cos, sin, positions, False, weight, rstd)
        _forward_kernel(_tasks(x.shape[0] * x.shape[1]), num_workers("rotary", (x.shape,), x.dtype), arguments, _options(eps=eps))
        del kept
    return out, rstd


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx (B, T, H, D) and dweight (H, D). Sums over tokens run in blocks that follow from their number alone, then in a tree."""
    dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.empty(weight.shape, dtype=weight.dtype)
    if not dx.numel():
        dweight.zero_()
    else:
        dy = dy.detach().contiguous()
        arguments, kept = _prepared(x, dx, cos, sin, positions, True, weight, rstd)
        all_tokens = x.shape[0] * x.shape[1]
        block_tokens = rows_per_block(all_tokens, TOKENS_PER_TASK)
        num_blocks, padded = -(-all_tokens // block_tokens), -(-dweight.numel() // W) * W * 4
        owner, partial = scratch("norm", num_blocks * padded)
        workers = num_workers("rotary", (x.shape,), x.dtype, backward=True)
        own = _backward_arguments(dy=dy.data_ptr(), partial=partial, partial_row=padded, block_tokens=block_tokens)
        _norm_backward_kernel(num_blocks, workers, (*arguments, *own))
        add_up(partial, padded, num_blocks, dweight, workers)
        del kept, owner
    return dx, dweight
