"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split convention of Llama.

B batch, T tokens, H heads, D head dim, P positions in the table. A block takes several tokens and several heads of each, and reads cos and sin
once for all of those heads.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.gpu.launch import Calls, launch, next_power_of_2
from cllm.runtime.gpu import GPU

TILE_PAIRS = 1024  # of one block of 128 threads: a load of 16 bytes for each half
MOST_HEADS = 8


@triton.jit
def rotary_kernel(
    x_ptr, cos_ptr, sin_ptr, positions_ptr, y_ptr, num_tokens, num_rows, num_heads, num_positions, x_batch_stride, x_token_stride, x_head_stride,
    x_stride, cos_stride, sin_stride, positions_batch_stride, positions_stride, INVERSE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)  # of B T tokens
    batch = row // num_tokens
    token = row - batch * num_tokens
    position = token
    if positions_ptr is not None:
        position = tl.load(positions_ptr + batch * positions_batch_stride + token * positions_stride, mask=row < num_rows, other=0)
    d = tl.arange(0, BLOCK)
    known = ((position >= 0) & (position < num_positions) & (row < num_rows))[:, None] & (d < HALF)[None, :]  # the others turn into NaN
    cos = tl.load(cos_ptr + position[:, None] * cos_stride + d[None, :], mask=known, other=float("nan"))[:, None, :]
    sin = tl.load(sin_ptr + position[:, None] * sin_stride + d[None, :], mask=known, other=float("nan"))[:, None, :]
    if INVERSE:
        sin = -sin
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = (row < num_rows)[:, None, None] & (head < num_heads)[None, :, None] & (d < HALF)[None, None, :]
    start = (batch * x_batch_stride + token * x_token_stride)[:, None, None] + (head.to(tl.int64) * x_head_stride)[None, :, None]
    x_ptr += start
    first = tl.load(x_ptr + d.to(tl.int64)[None, None, :] * x_stride, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + (d + HALF).to(tl.int64)[None, None, :] * x_stride, mask=inside, other=0.0).to(tl.float32)
    out = y_ptr + (row[:, None, None] * num_heads + head[None, :, None]) * (2 * HALF) + d[None, None, :]
    tl.store(out, first * cos - second * sin, mask=inside)
    tl.store(out + HALF, second * cos + first * sin, mask=inside)


def apply(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    """Rotate the pairs (x[d], x[d + D/2]) of x (B, T, H, D), any strides, by the angle of each token's position; `inverse` rotates back.

    cos and sin (P, D/2) float32, positions int64 (T,) or (B, T) -> (B, T, H, D) contiguous in x's dtype. A position outside the table gives NaN.
    """
    num_batch, num_tokens, num_heads, head_dim = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    cos, sin = (table if table.stride(1) == 1 else table.contiguous() for table in (cos, sin))
    positions_strides = (0, 0) if positions is None else (0, *positions.stride()) if positions.dim() == 1 else positions.stride()
    block = next_power_of_2(head_dim // 2)
    heads = min(next_power_of_2(num_heads), MOST_HEADS)
    tokens = max(1, TILE_PAIRS // (block * heads))
    launch(
        rotary_kernel, (triton.cdiv(num_batch * num_tokens, tokens), triton.cdiv(num_heads, heads)), x, cos, sin, positions, y, num_tokens,
        num_batch * num_tokens, num_heads, cos.shape[0], *x.stride(), cos.stride(0), sin.stride(0), *positions_strides,
        INVERSE=inverse, TOKENS=tokens, HEADS=heads, HALF=head_dim // 2, BLOCK=block,
    )  # fmt: skip
    return y


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    for num_heads, head_dim in ((1, 64), (2, 128), (12, 64), (32, 128), (8, 256), (5, 2), (3, 80)):
        x = torch.empty((2, 512, num_heads + 2, head_dim), dtype=dtype, device="meta")[:, :, :num_heads]
        table = torch.empty((1024, head_dim // 2), dtype=torch.float32, device="meta")
        yield f"rotary {num_heads} heads of {head_dim}", partial(apply, x, table, table, None, False)
    positions = torch.empty((2, 512), dtype=torch.int64, device="meta")
    yield "rotary at given positions, inverse", partial(apply, x, table, table, positions, True)
