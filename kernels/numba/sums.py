"""Sums over the rows of a matrix, for gradients of biases: blocks of rows, then a tree over the blocks.

The blocks depend on the number of rows only, so the bits do not depend on the workers. N rows of C elements.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.launch import FANOUT, Kernel, as_rows, is_half, load, load_whole, num_workers, row_bytes, rows_per_block, scratch, store
from cllm.kernels.numba.simd import W, vadd, vstore, vzero

ROWS_PER_BLOCK = 32
TREE_COLUMNS = 8 * W


class _Block(NamedTuple):
    """Addresses, and in bytes the distance from row to row."""

    x: int
    x_row: int
    half: int  # whether x is bfloat16
    partial: int  # a float32 row for each block
    partial_row: int
    rows: int
    columns: int
    block_rows: int


class _Tree(NamedTuple):
    """Addresses, and in bytes the distance from row to row."""

    sums: int  # float32 rows
    sums_row: int
    num_sums: int
    total: int
    total_half: int  # whether the total is bfloat16
    num_columns: int


BLOCK, _block_arguments = fields(_Block)
TREE, _tree_arguments = fields(_Tree)


def _block(p, f, task, worker):
    """The sum of one block's rows, from its first to its last."""
    half, columns, row_step = p[BLOCK.half], p[BLOCK.columns], p[BLOCK.x_row]
    x, partial = p[BLOCK.x] + task * p[BLOCK.block_rows] * row_step, p[BLOCK.partial] + task * p[BLOCK.partial_row]
    rows = min(p[BLOCK.block_rows], p[BLOCK.rows] - task * p[BLOCK.block_rows])
    whole = columns - columns % (4 * W)
    for c in range(0, whole, 4 * W):
        t0, t1, t2, t3 = vzero(), vzero(), vzero(), vzero()
        row = x
        for _ in range(rows):
            t0, t1 = vadd(t0, load_whole(row, half, c)), vadd(t1, load_whole(row, half, c + W))
            t2, t3 = vadd(t2, load_whole(row, half, c + 2 * W)), vadd(t3, load_whole(row, half, c + 3 * W))
            row += row_step
        vstore(partial, c, t0)
        vstore(partial, c + W, t1)
        vstore(partial, c + 2 * W, t2)
        vstore(partial, c + 3 * W, t3)
    for c in range(whole, columns, W):
        t0 = vzero()
        for r in range(rows):
            t0 = vadd(t0, load(x + r * row_step, half, c, columns - c))
        store(partial, False, c, t0, columns - c)


def _tree(p, f, task, worker):
    """Sum over the rows of SUMS for one range of columns; the partial sums of a level replace their first row."""
    for c in range(task * TREE_COLUMNS, min((task + 1) * TREE_COLUMNS, p[TREE.num_columns]), W):
        n = p[TREE.num_columns] - c
        step = 1
        while step < p[TREE.num_sums]:
            for first in range(0, p[TREE.num_sums], FANOUT * step):
                at = p[TREE.sums] + first * p[TREE.sums_row]
                v = load(at, False, c, n)
                for row in range(first + step, min(first + FANOUT * step, p[TREE.num_sums]), step):
                    v = vadd(v, load(p[TREE.sums] + row * p[TREE.sums_row], False, c, n))
                store(at, False, c, v, n)
            step *= FANOUT
        store(p[TREE.total], p[TREE.total_half], c, load(p[TREE.sums], False, c, n), n)


_block_kernel, _tree_kernel = Kernel(_block), Kernel(_tree)


def add_up(sums: int, sums_row: int, num_sums: int, total: Tensor, workers: int) -> None:
    """Float32 rows at an address, `sums_row` bytes apart -> total (C,); the rows are overwritten."""
    columns = total.numel()
    arguments = _tree_arguments(
        sums=sums, sums_row=sums_row, num_sums=num_sums, total=total.data_ptr(), total_half=is_half(total), num_columns=columns
    )
    _tree_kernel(-(-columns // TREE_COLUMNS), workers, arguments)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (N, C) -> (C,) in dtype, summed in float32."""
    total = torch.empty(x.shape[1], dtype=dtype)
    if not x.numel():
        total.zero_()
    else:
        rows = as_rows(x)
        num_rows, columns = rows.shape
        block_rows = rows_per_block(num_rows, ROWS_PER_BLOCK)
        blocks, padded = -(-num_rows // block_rows), -(-columns // W) * W * 4
        owner, partial = scratch("column sums", blocks * padded)
        workers = num_workers("matmul", (x.shape,), x.dtype, work=float(x.numel() * x.element_size()))
        arguments = _block_arguments(
            x=rows.data_ptr(),
            x_row=row_bytes(rows),
            half=is_half(rows),
            partial=partial,
            partial_row=padded,
            rows=num_rows,
            columns=columns,
            block_rows=block_rows,
        )
        _block_kernel(blocks, workers, arguments)
        add_up(partial, padded, blocks, total, workers)
        del owner
    return total
