"""Embedding look-up on the CPU, with a gradient that every row of the table sums in the order of the tokens.

V rows of the table, E columns, N tokens.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.launch import (
    Kernel,
    as_rows,
    at_most,
    copy_bytes,
    int64_at,
    is_half,
    jit,
    load,
    load_whole,
    num_workers,
    row_bytes,
    store,
    store_whole,
)
from cllm.kernels.numba.simd import W, vadd, vzero
from cllm.kernels.operations import Shapes

TOKENS_PER_TASK = 16
ROWS_PER_TASK = 16


class _Forward(NamedTuple):
    """Addresses, in bytes the distance from row to row, and whether the rows are bfloat16."""

    weight: int
    weight_row: int
    weight_half: int
    tokens: int  # int64
    out: int
    out_row: int
    out_half: int
    num_tokens: int
    columns: int


class _Backward(NamedTuple):
    """Addresses, in bytes the distance from row to row, and whether the rows are bfloat16."""

    dy: int
    dy_row: int
    dy_half: int
    order: int  # int64: the tokens, grouped by the row that they looked up
    starts: int  # int64: where the group of each row begins in `order`
    dweight: int
    dweight_row: int
    dweight_half: int
    num_rows: int
    columns: int


FWD, _forward_arguments = fields(_Forward)
BWD, _backward_arguments = fields(_Backward)


def _forward(p, f, task, worker):
    columns, half, out_half = p[FWD.columns], p[FWD.weight_half], p[FWD.out_half]
    size = 2 if half else 4
    whole = columns - columns % W
    for token in range(task * TOKENS_PER_TASK, min((task + 1) * TOKENS_PER_TASK, p[FWD.num_tokens])):
        row, out = p[FWD.weight] + int64_at(p[FWD.tokens], token) * p[FWD.weight_row], p[FWD.out] + token * p[FWD.out_row]
        if half == out_half:
            copy_bytes(out, row, columns * size)
            continue
        for c in range(0, whole, W):
            store_whole(out, out_half, c, load_whole(row, half, c))
        if whole < columns:
            store(out, out_half, whole, load(row, half, whole, columns - whole), columns - whole)


def _backward(p, f, task, worker):
    dy, half, columns = p[BWD.dy], p[BWD.dy_half], p[BWD.columns]
    for row in range(task * ROWS_PER_TASK, min((task + 1) * ROWS_PER_TASK, p[BWD.num_rows])):
        start, end = int64_at(p[BWD.starts], row), int64_at(p[BWD.starts], row + 1)
        out = p[BWD.dweight] + row * p[BWD.dweight_row]
        for c in range(0, columns, 2 * W):
            n = columns - c
            low, high = vzero(), vzero()
            for i in range(start, end):
                source = dy + int64_at(p[BWD.order], i) * p[BWD.dy_row]
                low, high = vadd(low, load(source, half, c, n)), vadd(high, load(source, half, c + W, n - W))
            store(out, p[BWD.dweight_half], c, low, n)
            store(out, p[BWD.dweight_half], c + W, high, n - W)


_forward_kernel, _backward_kernel = Kernel(_forward), Kernel(_backward)


@jit
def _group_by_row(tokens, starts, order):
    """starts (V + 1,): where each row's tokens begin in `order`, which lists them in rising order. Counting sort."""
    starts[:] = 0
    for token in tokens:
        starts[token + 1] += 1
    for row in range(starts.size - 1):
        starts[row + 1] += starts[row]
    for i in range(tokens.size):  # starts[row] moves to the end of the row, which is the start of the next
        order[starts[tokens[i]]] = i
        starts[tokens[i]] += 1
    for row in range(starts.size - 1, 0, -1):
        starts[row] = starts[row - 1]
    starts[0] = 0


def _tasks(num_tokens: int) -> int:
    return -(-num_tokens // TOKENS_PER_TASK)


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers the forward pass uses."""
    tokens, (_, columns) = shapes
    return at_most(planned, _tasks(math.prod(tokens))) if columns else 1


def forward(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """tokens int64 (...), weight (V, E) -> (..., E) in dtype."""
    table, flat = as_rows(weight), tokens.reshape(-1).contiguous()
    out = torch.empty((flat.numel(), table.shape[1]), dtype=dtype)
    if out.numel():
        _forward_kernel(
            _tasks(flat.numel()),
            num_workers("embedding", (tokens.shape, weight.shape), dtype),
            _forward_arguments(
                weight=table.data_ptr(),
                weight_row=row_bytes(table),
                weight_half=is_half(table),
                tokens=flat.data_ptr(),
                out=out.data_ptr(),
                out_row=row_bytes(out),
                out_half=is_half(out),
                num_tokens=flat.numel(),
                columns=table.shape[1],
            ),
        )
    return out.view(*tokens.shape, table.shape[1])


def _sum_rows(dy: Tensor, order: Tensor, starts: Tensor, most_rows: int, dtype: torch.dtype) -> Tensor:
    """dy (..., E) -> (rows, E) in dtype: row i is the sum of the rows order[starts[i]:starts[i + 1]] of dy. Planned for `most_rows`, which does
    not change from batch to batch."""
    source, columns = as_rows(dy), dy.shape[-1]
    sums = torch.empty((starts.numel() - 1, columns), dtype=dtype)
    if sums.numel():
        _backward_kernel(
            -(-sums.shape[0] // ROWS_PER_TASK),
            num_workers("embedding", ((order.numel(),), (most_rows, columns)), dy.dtype, backward=True),
            _backward_arguments(
                dy=source.data_ptr(),
                dy_row=row_bytes(source),
                dy_half=is_half(source),
                order=order.data_ptr(),
                starts=starts.data_ptr(),
                dweight=sums.data_ptr(),
                dweight_row=row_bytes(sums),
                dweight_half=is_half(sums),
                num_rows=sums.shape[0],
                columns=columns,
            ),
        )
    return sums


def _grouped(tokens: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """(starts (V + 1,), order (N,)) of `_group_by_row`."""
    flat = tokens.reshape(-1).contiguous()
    starts, order = torch.empty(num_rows + 1, dtype=torch.int64), torch.empty(flat.numel(), dtype=torch.int64)
    _group_by_row(flat.numpy(), starts.numpy(), order.numpy())
    return starts, order


def backward(dy: Tensor, tokens: Tensor, num_rows: int, weight_dtype: torch.dtype) -> Tensor:
    """dy (..., E), tokens int64 (...) -> (V, E) in weight_dtype."""
    starts, order = _grouped(tokens, num_rows)
    return _sum_rows(dy, order, starts, num_rows, weight_dtype)


def backward_rows(dy: Tensor, tokens: Tensor, num_rows: int, weight_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows (U,) that were looked up, rising; their gradients (U, E)): what is not zero of `backward`."""
    starts, order = _grouped(tokens, num_rows)
    rows = starts.diff().nonzero().flatten()
    return rows, _sum_rows(dy, order, torch.cat((starts[rows], starts[-1:])), min(num_rows, tokens.numel()), weight_dtype)
