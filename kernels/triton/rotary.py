"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split convention of Llama, alone and behind an RMSNorm of each head.

B batch, T tokens, H heads, D head dim, P positions in the table. A block takes several tokens and several heads of each, and reads cos and sin
once for all of those heads. Sums of the norm's dweight go by groups of tokens, as those of `norm.py` by groups of rows.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.triton.launch import Calls, launch, next_power_of_2
from cllm.kernels.triton.norm import add_up_groups, group_rows
from cllm.runtime.gpu import GPU

TILE_PAIRS = 1024  # of one block of 128 threads: a load of 16 bytes for each half
MOST_HEADS = 8


@triton.jit
def angles(
    row, num_rows, num_tokens, num_positions, positions_ptr, positions_batch_stride, positions_stride, cos_ptr, sin_ptr, cos_stride, sin_stride,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """cos and sin [TOKENS, 1, BLOCK] of tokens `row` of B T; NaN at positions outside the table."""
    batch = row // num_tokens
    position = row - batch * num_tokens
    if positions_ptr is not None:
        position = tl.load(positions_ptr + batch * positions_batch_stride + position * positions_stride, mask=row < num_rows, other=0)
    d = tl.arange(0, BLOCK)
    known = ((position >= 0) & (position < num_positions) & (row < num_rows))[:, None] & (d < HALF)[None, :]
    cos = tl.load(cos_ptr + position[:, None] * cos_stride + d[None, :], mask=known, other=float("nan"))[:, None, :]
    sin = tl.load(sin_ptr + position[:, None] * sin_stride + d[None, :], mask=known, other=float("nan"))[:, None, :]
    return cos, sin


@triton.jit
def heads_of(row, head, d, num_tokens, batch_stride, token_stride, head_stride, stride):
    """Offsets [TOKENS, HEADS, BLOCK] of the elements d of heads of x, whose batches and tokens are counted together in `row`."""
    batch = row // num_tokens
    start = batch * batch_stride + (row - batch * num_tokens) * token_stride
    return start[:, None, None] + (head.to(tl.int64) * head_stride)[None, :, None] + d.to(tl.int64)[None, None, :] * stride


@triton.jit
def rotary_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, positions_ptr, y_ptr, rstd_ptr, num_tokens, num_rows, num_heads, num_positions, x_batch_stride,
    x_token_stride, x_head_stride, x_stride, weight_stride, cos_stride, sin_stride, positions_batch_stride, positions_stride, eps,
    INVERSE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight None: no norm."""
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # of B T tokens
    cos, sin = angles(
        row, num_rows, num_tokens, num_positions, positions_ptr, positions_batch_stride, positions_stride, cos_ptr, sin_ptr, cos_stride, sin_stride,
        HALF, BLOCK,
    )  # fmt: skip
    if INVERSE:
        sin = -sin
    d = tl.arange(0, BLOCK)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    here = (row < num_rows)[:, None] & (head < num_heads)[None, :]
    inside = here[:, :, None] & (d < HALF)[None, None, :]
    x_ptr += heads_of(row, head, d, num_tokens, x_batch_stride, x_token_stride, x_head_stride, x_stride)
    x_first = tl.load(x_ptr, mask=inside, other=0.0)
    x_second = tl.load(x_ptr + HALF * x_stride, mask=inside, other=0.0)
    first, second = x_first.to(tl.float32), x_second.to(tl.float32)
    at = row[:, None] * num_heads + head[None, :]
    if weight_ptr is not None:
        weight_ptr += head[:, None] * weight_stride + d[None, :]
        weight_inside = (head < num_heads)[:, None] & (d < HALF)[None, :]
        weight_first = tl.load(weight_ptr, mask=weight_inside, other=0.0).to(tl.float32)[None, :, :]
        weight_second = tl.load(weight_ptr + HALF, mask=weight_inside, other=0.0).to(tl.float32)[None, :, :]
        rstd = tl.rsqrt(tl.sum(first * first + second * second, 2) / (2 * HALF) + eps)
        tl.store(rstd_ptr + at, rstd, mask=here)
        first = (first * rstd[:, :, None] * weight_first).to(x_first.dtype).to(tl.float32)  # rounded as the norm alone would store it
        second = (second * rstd[:, :, None] * weight_second).to(x_first.dtype).to(tl.float32)
    out = y_ptr + at[:, :, None] * (2 * HALF) + d[None, None, :]
    tl.store(out, first * cos - second * sin, mask=inside)
    tl.store(out + HALF, second * cos + first * sin, mask=inside)


@triton.jit
def norm_rotary_backward_kernel(
    dy_ptr, x_ptr, weight_ptr, rstd_ptr, cos_ptr, sin_ptr, positions_ptr, dx_ptr, dweight_ptr, num_tokens, num_rows, num_heads, num_positions,
    x_batch_stride, x_token_stride, x_head_stride, x_stride, weight_stride, cos_stride, sin_stride, positions_batch_stride, positions_stride,
    group_tokens, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block walks over one group of tokens for some heads, writes their dx and keeps the group's sums of dweight in registers."""
    group = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    weight_inside = (head < num_heads)[:, None] & (d < HALF)[None, :]
    weight_ptr += head[:, None] * weight_stride + d[None, :]
    weight_first = tl.load(weight_ptr, mask=weight_inside, other=0.0).to(tl.float32)[None, :, :]
    weight_second = tl.load(weight_ptr + HALF, mask=weight_inside, other=0.0).to(tl.float32)[None, :, :]
    dweight_first = tl.zeros([TOKENS, HEADS, BLOCK], tl.float32)
    dweight_second = tl.zeros([TOKENS, HEADS, BLOCK], tl.float32)
    for done in tl.range(0, group_tokens, TOKENS, num_stages=2):
        row = group * group_tokens + done + tl.arange(0, TOKENS)
        cos, sin = angles(
            row, num_rows, num_tokens, num_positions, positions_ptr, positions_batch_stride, positions_stride, cos_ptr, sin_ptr, cos_stride,
            sin_stride, HALF, BLOCK,
        )  # fmt: skip
        here = (row < num_rows)[:, None] & (head < num_heads)[None, :]
        inside = here[:, :, None] & (d < HALF)[None, None, :]
        at = row[:, None] * num_heads + head[None, :]
        out = at[:, :, None] * (2 * HALF) + d[None, None, :]
        dy_first = tl.load(dy_ptr + out, mask=inside, other=0.0)
        dy_second = tl.load(dy_ptr + out + HALF, mask=inside, other=0.0)
        first, second = dy_first.to(tl.float32), dy_second.to(tl.float32)
        g_first = (first * cos + second * sin).to(dy_first.dtype).to(tl.float32)  # turned back, and rounded as the rotation alone would store it
        g_second = (second * cos - first * sin).to(dy_first.dtype).to(tl.float32)
        g_first, g_second = tl.where(inside, g_first, 0.0), tl.where(inside, g_second, 0.0)
        x = x_ptr + heads_of(row, head, d, num_tokens, x_batch_stride, x_token_stride, x_head_stride, x_stride)
        rstd = tl.load(rstd_ptr + at, mask=here, other=0.0)[:, :, None]
        n_first = tl.load(x, mask=inside, other=0.0).to(tl.float32) * rstd
        n_second = tl.load(x + HALF * x_stride, mask=inside, other=0.0).to(tl.float32) * rstd
        dweight_first += g_first * n_first
        dweight_second += g_second * n_second
        g_first *= weight_first
        g_second *= weight_second
        along = (tl.sum(g_first * n_first + g_second * n_second, 2) / (2 * HALF))[:, :, None]
        tl.store(dx_ptr + out, rstd * (g_first - n_first * along), mask=inside)
        tl.store(dx_ptr + out + HALF, rstd * (g_second - n_second * along), mask=inside)
    dweight_ptr += (group * num_heads + head[:, None]) * (2 * HALF) + d[None, :]
    tl.store(dweight_ptr, tl.sum(dweight_first, 0), mask=weight_inside)
    tl.store(dweight_ptr + HALF, tl.sum(dweight_second, 0), mask=weight_inside)


class Tile(NamedTuple):
    """A block's share of tokens and heads, and D / 2 rounded up to a power of two."""

    tokens: int
    heads: int
    block: int


def _tile(num_heads: int, head_dim: int) -> Tile:
    block = next_power_of_2(head_dim // 2)
    heads = min(next_power_of_2(num_heads), MOST_HEADS)
    return Tile(max(1, TILE_PAIRS // (block * heads)), heads, block)


def _strides(cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[int, ...]:
    return cos.stride(0), sin.stride(0), *((0, 0) if positions is None else (0, *positions.stride()) if positions.dim() == 1 else positions.stride())


def _dense(*tensors: Tensor) -> Iterator[Tensor]:
    return (t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def apply(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    """Rotate the pairs (x[d], x[d + D/2]) of x (B, T, H, D), any strides, by the angle of each token's position; `inverse` rotates back.

    cos and sin (P, D/2) float32, positions int64 (T,) or (B, T) -> (B, T, H, D) contiguous in x's dtype. A position outside the table gives NaN.
    """
    return _forward(x, None, 0.0, cos, sin, positions, inverse, None)


def norm_forward(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head of x with its row of weight (H, D), then the rotation -> (B, T, H, D), and rstd (B, T, H) float32."""
    rstd = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    return _forward(x, weight, eps, cos, sin, positions, False, rstd), rstd


def _forward(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool, rstd: Tensor | None
) -> Tensor:  # fmt: skip
    num_batch, num_tokens, num_heads, head_dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    cos, sin = _dense(cos, sin)
    if weight is not None:
        (weight,) = _dense(weight)
    tokens, heads, block = _tile(num_heads, head_dim)
    launch(
        rotary_kernel, (triton.cdiv(num_batch * num_tokens, tokens), triton.cdiv(num_heads, heads)), x, weight, cos, sin, positions, y, rstd,
        num_tokens, num_batch * num_tokens, num_heads, cos.shape[0], *x.stride(), 0 if weight is None else weight.stride(0),
        *_strides(cos, sin, positions), eps, INVERSE=inverse, TOKENS=tokens, HEADS=heads, HALF=head_dim // 2, BLOCK=block,
    )  # fmt: skip
    return y


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx (B, T, H, D) and dweight (H, D), whose sums run over groups of tokens and then over the groups, in a fixed order; dy contiguous."""
    num_batch, num_tokens, num_heads, head_dim = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    if weight.numel() == 0:
        return dx, dweight
    cos, sin, weight = _dense(cos, sin, weight)
    tokens, heads, block = _tile(num_heads, head_dim)
    group_tokens = group_rows(num_batch * num_tokens, tokens)
    num_groups = triton.cdiv(num_batch * num_tokens, group_tokens)
    groups = torch.empty((num_groups, dweight.numel()), dtype=torch.float32, device=x.device)
    launch(
        norm_rotary_backward_kernel, (num_groups, triton.cdiv(num_heads, heads)), dy, x, weight, rstd, cos, sin, positions, dx, groups, num_tokens,
        num_batch * num_tokens, num_heads, cos.shape[0], *x.stride(), weight.stride(0), *_strides(cos, sin, positions), group_tokens,
        TOKENS=tokens, HEADS=heads, HALF=head_dim // 2, BLOCK=block,
    )  # fmt: skip
    add_up_groups(groups, None, dweight, None)
    return dx, dweight


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    float32 = torch.float32
    for num_heads, head_dim in ((1, 64), (2, 128), (12, 64), (32, 128), (8, 256), (5, 2), (3, 80)):
        x = empty(2, 512, num_heads + 2, head_dim)[:, :, :num_heads]
        table, rstd = empty(1024, head_dim // 2, of=float32), empty(2, 512, num_heads, of=float32)
        name = f"{num_heads} heads of {head_dim}"
        yield f"rotary {name}", partial(apply, x, table, table, None, False)
        for weight in (empty(num_heads, head_dim, of=float32), empty(1, head_dim).expand(num_heads, head_dim)):
            yield f"norm and rotary {name}", partial(norm_forward, x, weight, 1e-6, table, table, None)
            yield f"norm and rotary backward {name}", partial(norm_backward, empty(*x.shape), x, weight, rstd, table, table, None)
    positions = empty(2, 512, of=torch.int64)
    yield "rotary at given positions, inverse", partial(apply, x, table, table, positions, True)
    yield "norm and rotary at given positions", partial(norm_forward, x, weight, 1e-6, table, table, positions)
    yield "norm and rotary backward at given positions", partial(norm_backward, empty(*x.shape), x, weight, rstd, table, table, positions)
