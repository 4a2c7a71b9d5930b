"""Rows of a tensor (..., E), for kernels that work along the last dimension: where each begins, and how many one block takes."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.triton.launch import LARGEST_INT32, next_power_of_2

LONGEST_ROW = 16384  # columns that one block holds in registers: 32 values for each of 512 threads
TILE_ELEMENTS = 2048  # short rows share a block, so that every thread has 16 values to load at once


class Rows(NamedTuple):
    """Row r begins at (r // inner) * outer_stride + (r % inner) * inner_stride, or at r * outer_stride where inner is None."""

    tensor: Tensor
    inner: int | None
    outer_stride: int
    inner_stride: int


@triton.jit
def row_start(row, inner, outer_stride, inner_stride):
    """Offsets of int64 row numbers, as `Rows` says. The division is of 32 bits: one of 64 costs as much as a short row."""
    if inner is None:
        start = row * outer_stride
    else:
        outer = (row.to(tl.int32) // inner).to(tl.int64)
        start = outer * outer_stride + (row - outer * inner) * inner_stride
    return start


def rows_of(x: Tensor) -> Rows:
    """Rows of x (..., E) with dense rows: a view where the other dimensions collapse into two, as in heads of a fused projection; else a copy."""
    num_columns = x.shape[-1]
    if x.is_contiguous():
        return Rows(x, None, num_columns, 0)
    levels: list[tuple[int, int]] = []  # (size, stride), the outermost first
    for size, stride in zip(x.shape[:-1], x.stride()[:-1]):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if (num_columns > 1 and x.stride(-1) != 1) or len(levels) > 2 or x.numel() > LARGEST_INT32 * max(num_columns, 1):
        return Rows(x.contiguous(), None, num_columns, 0)
    if len(levels) < 2:
        return Rows(x, None, levels[0][1] if levels else 0, 0)
    return Rows(x, levels[1][0], levels[0][1], levels[1][1])


def row_tile(num_columns: int) -> tuple[int, int, int]:
    """(rows of one block, columns rounded up to a power of two, warps). It follows from the width alone: so do the bits of a row."""
    block = next_power_of_2(num_columns)
    return max(1, TILE_ELEMENTS // block), block, 4 if block <= TILE_ELEMENTS else 8 if block <= 8192 else 16


def long_row_warps(row_bytes: int, warp_size: int) -> int:
    """Warps for a row that is walked over twice: the longer it is the larger the block, so that all rows under way together (at most some
    2048 threads of a multiprocessor) stay in the L2 cache until their second reading."""
    return (256 if row_bytes <= 1 << 16 else 512 if row_bytes <= 1 << 17 else 1024) // warp_size
