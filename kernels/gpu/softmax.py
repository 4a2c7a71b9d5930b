"""Softmax of rows. A row that fits in registers is read once; a longer one is walked over twice, with a running maximum and sum.

N rows, C columns.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.gpu.launch import Calls, launch, next_power_of_2
from cllm.kernels.reference import as_rows
from cllm.runtime.gpu import GPU

LONGEST_ROW = 16384  # columns that one block holds in registers
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax_forward_kernel(x_ptr, y_ptr, x_stride, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < num_columns
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    p = tl.exp2((x - tl.max(x, 0)) * LOG2_E)
    tl.store(y_ptr + row * num_columns + column, p / tl.sum(p, 0), mask=inside)


@triton.jit
def softmax_forward_long_kernel(x_ptr, y_ptr, x_stride, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + column, mask=column < num_columns, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        finite = tl.where(larger == float("-inf"), 0.0, larger)  # a lane that saw only -inf adds nothing
        total = total * tl.exp2((largest - finite) * LOG2_E) + tl.exp2((x - finite) * LOG2_E)
        largest = larger
    top = tl.max(largest, 0)
    whole = tl.sum(total * tl.exp2((largest - top) * LOG2_E), 0)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=float("-inf")).to(tl.float32)
        tl.store(y_ptr + row * num_columns + column, tl.exp2((x - top) * LOG2_E) / whole, mask=inside)


@triton.jit
def softmax_backward_kernel(dy_ptr, y_ptr, dx_ptr, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * num_columns
    inner = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        dy = tl.load(dy_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        inner += dy * tl.load(y_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(inner, 0)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        dy = tl.load(dy_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row + column, y * (dy - total), mask=inside)


def _row_warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


def forward(x: Tensor) -> Tensor:
    rows = as_rows(x)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    num_rows, num_columns = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_columns == 0:
        return y
    block = min(next_power_of_2(num_columns), LONGEST_ROW)
    kernel = softmax_forward_kernel if num_columns <= LONGEST_ROW else softmax_forward_long_kernel
    launch(kernel, (num_rows,), rows, y, rows.stride(0), num_columns, BLOCK=block, num_warps=_row_warps(block))
    return y


def backward(dy: Tensor, y: Tensor) -> Tensor:
    """dy and y contiguous."""
    num_columns = y.shape[-1]
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if num_columns == 0:
        return dx
    block = min(next_power_of_2(num_columns), LONGEST_ROW // 2)  # two inputs beside each other
    launch(softmax_backward_kernel, (as_rows(y).shape[0],), dy, y, dx, num_columns, BLOCK=block, num_warps=_row_warps(block))
    return dx


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    for columns in (65, 4096, 50304):
        x = torch.empty((4096, columns), dtype=dtype, device="meta")
        yield f"softmax forward {columns}", partial(forward, x)
        yield f"softmax backward {columns}", partial(backward, x, x)
