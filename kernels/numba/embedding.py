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
    inline,
    int64_at,
    is_half,
    load,
    load_whole,
    num_workers,
    put_int64,
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
    add: int  # whether the sums are added to what is there


class _Group(NamedTuple):
    """Addresses of int64 numbers."""

    tokens: int
    starts: int
    order: int
    num_tokens: int
    num_rows: int


FWD, _forward_arguments = fields(_Forward)
BWD, _backward_arguments = fields(_Backward)
GROUP, _group_arguments = fields(_Group)


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
        if p[BWD.add] and start == end:
            continue
        out = p[BWD.dweight] + row * p[BWD.dweight_row]
        for c in range(0, columns, 2 * W):
            n = columns - c
            low, high = vzero(), vzero()
            for i in range(start, end):
                source = dy + int64_at(p[BWD.order], i) * p[BWD.dy_row]
                low, high = vadd(low, load(source, half, c, n)), vadd(high, load(source, half, c + W, n - W))
            if p[BWD.add]:
                low, high = _sum(out, p[BWD.dweight_half], c, low, n), _sum(out, p[BWD.dweight_half], c + W, high, n - W)
            store(out, p[BWD.dweight_half], c, low, n)
            store(out, p[BWD.dweight_half], c + W, high, n - W)


@inline
def _sum(row, half, c, v, n):
    """What is in a row and v, which is rounded as the row is before they are added."""
    before = load(row, half, c, n)
    if half:
        store(row, half, c, v, n)
        v = load(row, half, c, n)
    return vadd(before, v)


def _group(p, f, task, worker):
    """starts (V + 1,): where each row's tokens begin in `order`, which lists them in rising order. Counting sort, in one task."""
    tokens, starts, order = p[GROUP.tokens], p[GROUP.starts], p[GROUP.order]
    for row in range(p[GROUP.num_rows] + 1):
        put_int64(starts, row, 0)
    for i in range(p[GROUP.num_tokens]):
        row = int64_at(tokens, i) + 1
        put_int64(starts, row, int64_at(starts, row) + 1)
    for row in range(p[GROUP.num_rows]):
        put_int64(starts, row + 1, int64_at(starts, row + 1) + int64_at(starts, row))
    for i in range(p[GROUP.num_tokens]):  # starts[row] moves to the end of the row, which is the start of the next
        row = int64_at(tokens, i)
        put_int64(order, int64_at(starts, row), i)
        put_int64(starts, row, int64_at(starts, row) + 1)
    for row in range(p[GROUP.num_rows], 0, -1):
        put_int64(starts, row, int64_at(starts, row - 1))
    put_int64(starts, 0, 0)


_forward_kernel, _backward_kernel, _group_kernel = Kernel(_forward), Kernel(_backward), Kernel(_group)


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


def _sum_rows(dy: Tensor, tokens: Tensor, sums: Tensor, add: bool) -> None:
    """sums (V, E): row i becomes the sum of the rows of dy (..., E) whose token is i, or takes it in."""
    source, (num_rows, columns) = as_rows(dy), sums.shape
    if sums.numel():
        starts, order = _grouped(tokens, num_rows)
        most_rows = min(num_rows, order.numel()) if add else num_rows
        _backward_kernel(
            -(-num_rows // ROWS_PER_TASK),
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
                num_rows=num_rows,
                columns=columns,
                add=add,
            ),
        )


def _grouped(tokens: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """(starts (V + 1,), order (N,)) of `_group`."""
    flat = tokens.reshape(-1).contiguous()
    starts, order = torch.empty(num_rows + 1, dtype=torch.int64), torch.empty(flat.numel(), dtype=torch.int64)
    numbers = {"num_tokens": flat.numel(), "num_rows": num_rows}
    _group_kernel(1, 1, _group_arguments(tokens=flat.data_ptr(), starts=starts.data_ptr(), order=order.data_ptr(), **numbers))
    return starts, order


def backward(dy: Tensor, tokens: Tensor, num_rows: int, weight_dtype: torch.dtype) -> Tensor:
    """dy (..., E), tokens int64 (...) -> (V, E) in weight_dtype."""
    dweight = torch.empty((num_rows, dy.shape[-1]), dtype=weight_dtype)
    _sum_rows(dy, tokens, dweight, False)
    return dweight


def add_rows(dy: Tensor, tokens: Tensor, dweight: Tensor) -> None:
    """Adds `backward` to a contiguous dweight (V, E), whose rows that were not looked up stay as they are."""
    _sum_rows(dy, tokens, dweight, True)
