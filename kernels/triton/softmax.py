"""Softmax of rows. Rows that fit in registers are read once, several short ones by one block; a longer one is walked over twice, with a
running maximum and sum (Milakov and Gimelshein 2018, arXiv 1805.02867), and comes from the L2 cache the second time.

N rows, C columns.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.triton.launch import Calls, launch
from cllm.kernels.triton.rows import LONGEST_ROW, long_row_warps, row_start, row_tile, rows_of
from cllm.runtime.gpu import GPU, gpu_of

LONGEST_BACKWARD_ROW = LONGEST_ROW // 2  # two inputs beside each other
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax_forward_kernel(x_ptr, x_inner, x_outer_stride, x_inner_stride, y_ptr, num_rows, num_columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows)[:, None] & (column < num_columns)
    start = row_start(row, x_inner, x_outer_stride, x_inner_stride)[:, None]
    x = tl.load(x_ptr + start + column, mask=inside, other=float("-inf")).to(tl.float32)
    p = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2_E)
    tl.store(y_ptr + row[:, None] * num_columns + column, p / tl.sum(p, 1)[:, None], mask=inside)


@triton.jit
def softmax_forward_long_kernel(x_ptr, x_inner, x_outer_stride, x_inner_stride, y_ptr, num_columns, DEPTH: tl.constexpr, LANES: tl.constexpr):
    # A tile has DEPTH values for each of LANES lanes: a lane rescales its sum once a tile, not once a value, because exponentials
    # (16 a clock and multiprocessor) would otherwise be slower than the memory.
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row_start(row, x_inner, x_outer_stride, x_inner_stride)
    y_ptr += row * num_columns
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    largest = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for first in range(0, num_columns, DEPTH * LANES):
        column = first + tile
        x = tl.load(x_ptr + column, mask=column < num_columns, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        finite = tl.where(larger == float("-inf"), 0.0, larger)  # a lane that saw only -inf adds nothing
        total = total * tl.exp2((largest - finite) * LOG2_E) + tl.sum(tl.exp2((x - finite[None, :]) * LOG2_E), 0)
        largest = larger
    top = tl.max(largest, 0)
    whole = tl.sum(total * tl.exp2((largest - top) * LOG2_E), 0)
    for first in range(0, num_columns, DEPTH * LANES):
        column = first + tile
        inside = column < num_columns
        x = tl.load(x_ptr + column, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        tl.store(y_ptr + column, tl.exp2((x - top) * LOG2_E) / whole, mask=inside)


@triton.jit
def softmax_backward_kernel(dy_ptr, y_ptr, dx_ptr, num_rows, num_columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows)[:, None] & (column < num_columns)
    offset = row[:, None] * num_columns + column
    dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offset, y * (dy - tl.sum(dy * y, 1)[:, None]), mask=inside)


@triton.jit
def softmax_backward_long_kernel(dy_ptr, y_ptr, dx_ptr, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * num_columns
    inner = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < num_columns
        dy = tl.load(dy_ptr + row + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        y = tl.load(y_ptr + row + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        inner += dy * y
    total = tl.sum(inner, 0)
    for first in range(0, num_columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < num_columns
        dy = tl.load(dy_ptr + row + column, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = tl.load(y_ptr + row + column, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(dx_ptr + row + column, y * (dy - total), mask=inside)


def forward(x: Tensor) -> Tensor:
    """Softmax over the last dimension of x (..., C), any strides -> contiguous, in x's dtype."""
    num_columns, num_rows = x.shape[-1], math.prod(x.shape[:-1])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_columns == 0:
        return y
    rows = rows_of(x)
    if num_columns > LONGEST_ROW:
        num_warps = long_row_warps(num_columns * x.element_size(), gpu_of(x.device).warp_size)
        launch(
            softmax_forward_long_kernel, (num_rows,), *rows, y, num_columns,
            DEPTH=4, LANES=num_warps * 32 * (16 // x.element_size()), num_warps=num_warps,
        )  # fmt: skip
        return y
    in_block, block, num_warps = row_tile(num_columns)
    grid = (triton.cdiv(num_rows, in_block),)
    launch(softmax_forward_kernel, grid, *rows, y, num_rows, num_columns, ROWS=in_block, BLOCK=block, num_warps=num_warps)
    return y


def backward(dy: Tensor, y: Tensor) -> Tensor:
    """dy and y (..., C) contiguous -> dx, contiguous."""
    num_columns, num_rows = y.shape[-1], math.prod(y.shape[:-1])
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if num_columns == 0:
        return dx
    if num_columns > LONGEST_BACKWARD_ROW:
        num_warps = long_row_warps(2 * num_columns * y.element_size(), gpu_of(y.device).warp_size)
        launch(softmax_backward_long_kernel, (num_rows,), dy, y, dx, num_columns, BLOCK=512 * num_warps, num_warps=num_warps)
        return dx
    in_block, block, num_warps = row_tile(num_columns)
    grid = (triton.cdiv(num_rows, in_block),)
    launch(softmax_backward_kernel, grid, dy, y, dx, num_rows, num_columns, ROWS=in_block, BLOCK=block, num_warps=num_warps)
    return dx


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    for columns in (65, 128, 1024, 4096, 8192, 16384, 32768, 50304, 131072):
        x = torch.empty((4096, columns), dtype=dtype, device="meta")
        yield f"softmax forward {columns}", partial(forward, x)
        yield f"softmax backward {columns}", partial(backward, x, x)
    slices = torch.empty((512, 8, 3, 128), dtype=dtype, device="meta")[:, :, 1]
    yield "softmax forward of slices", partial(forward, slices[:, 1:, :64])
