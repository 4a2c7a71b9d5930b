"""Sums over the rows of a matrix, for gradients of biases: blocks of rows, then a tree over the blocks.

The blocks depend on the number of rows only, so the bits do not depend on the workers. N rows of C elements.
"""

import torch
from torch import Tensor

from cllm.kernels.numba.launch import FANOUT, Kernel, as_rows, is_half, load, load_whole, num_workers, row_bytes, rows_per_block, scratch, store
from cllm.kernels.numba.simd import W, vadd, vstore, vzero

ROWS_PER_BLOCK = 32
TREE_COLUMNS = 8 * W

X, X_ROW, HALF, PARTIAL, PARTIAL_ROW, ROWS, COLUMNS, BLOCK_ROWS = range(8)
SUMS, SUMS_ROW, NUM_SUMS, TOTAL, TOTAL_HALF, NUM_COLUMNS = range(6)


def _block(p, f, task, worker):
    """The sum of one block's rows, from its first to its last."""
    half, columns, row_step = p[HALF], p[COLUMNS], p[X_ROW]
    x, partial = p[X] + task * p[BLOCK_ROWS] * row_step, p[PARTIAL] + task * p[PARTIAL_ROW]
    rows = min(p[BLOCK_ROWS], p[ROWS] - task * p[BLOCK_ROWS])
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
    for c in range(task * TREE_COLUMNS, min((task + 1) * TREE_COLUMNS, p[NUM_COLUMNS]), W):
        n = p[NUM_COLUMNS] - c
        step = 1
        while step < p[NUM_SUMS]:
            for first in range(0, p[NUM_SUMS], FANOUT * step):
                at = p[SUMS] + first * p[SUMS_ROW]
                v = load(at, False, c, n)
                for row in range(first + step, min(first + FANOUT * step, p[NUM_SUMS]), step):
                    v = vadd(v, load(p[SUMS] + row * p[SUMS_ROW], False, c, n))
                store(at, False, c, v, n)
            step *= FANOUT
        store(p[TOTAL], p[TOTAL_HALF], c, load(p[SUMS], False, c, n), n)


_block_kernel, _tree_kernel = Kernel(_block), Kernel(_tree)


def add_up(sums: int, sums_row: int, num_sums: int, total: Tensor, workers: int) -> None:
    """Float32 rows at an address, `sums_row` bytes apart -> total (C,); the rows are overwritten."""
    columns = total.numel()
    _tree_kernel(-(-columns // TREE_COLUMNS), workers, (sums, sums_row, num_sums, total.data_ptr(), is_half(total), columns))


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (N, C) -> (C,) in dtype, summed in float32."""
    total = torch.zeros(x.shape[1], dtype=dtype)
    if x.numel():
        rows = as_rows(x)
        num_rows, columns = rows.shape
        block_rows = rows_per_block(num_rows, ROWS_PER_BLOCK)
        blocks, padded = -(-num_rows // block_rows), -(-columns // W) * W * 4
        owner, partial = scratch("column sums", blocks * padded)
        workers = num_workers("matmul", (x.shape,), x.dtype, work=float(x.numel() * x.element_size()))
        _block_kernel(blocks, workers, (rows.data_ptr(), row_bytes(rows), is_half(rows), partial, padded, num_rows, columns, block_rows))
        add_up(partial, padded, blocks, total, workers)
        del owner
    return total
