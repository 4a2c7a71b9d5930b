"""Softmax over the last dimension on the CPU: N rows of E elements. Each row is one chain of fixed order."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.launch import (
    Kernel,
    as_rows,
    at_most,
    is_half,
    load,
    load_once,
    load_whole,
    num_workers,
    row_bytes,
    scratch,
    store,
    store_whole,
)
from cllm.kernels.numba.simd import W, vadd, vexp_normal, vfma, vhmax, vhsum, vlanes_below, vload, vmax, vmul, vselect, vset, vstore, vsub, vzero
from cllm.kernels.operations import Shapes

ELEMENTS_PER_TASK = 8192  # a task is as many whole rows as this holds, and at least one


class _Arguments(NamedTuple):
    """Addresses, and in bytes the distance from row to row."""

    x: int  # forward the input, backward the gradient of the output
    x_row: int
    y: int  # backward the output
    y_row: int
    out: int
    out_row: int
    half: int  # whether the elements are bfloat16
    rows: int
    columns: int
    task_rows: int
    exponentials: int  # work space: a float32 row of each worker
    exponentials_row: int


P, _arguments = fields(_Arguments)
_LOWEST = np.float32(-np.inf)
_ONE = np.float32(1.0)


# A loop over a row keeps four independent chains of vectors, so that no step waits for the one before, and then handles what is left.


def _forward(p, f, task, worker):
    half, columns = p[P.half], p[P.columns]
    lowest = vset(_LOWEST)
    e = p[P.exponentials] + worker * p[P.exponentials_row]
    whole = columns - columns % (4 * W)
    for row in range(task * p[P.task_rows], min((task + 1) * p[P.task_rows], p[P.rows])):
        x, out = p[P.x] + row * p[P.x_row], p[P.out] + row * p[P.out_row]
        m0, m1, m2, m3 = lowest, lowest, lowest, lowest
        for c in range(0, whole, 4 * W):
            m0, m1 = vmax(load_once(x, half, c), m0), vmax(load_once(x, half, c + W), m1)
            m2, m3 = vmax(load_once(x, half, c + 2 * W), m2), vmax(load_once(x, half, c + 3 * W), m3)
        for c in range(whole, columns, W):
            n = columns - c
            m0 = vmax(vselect(vlanes_below(n), load(x, half, c, n), lowest), m0)
        m = vset(vhmax(vmax(vmax(m0, m1), vmax(m2, m3))))
        t0, t1, t2, t3 = vzero(), vzero(), vzero(), vzero()
        for c in range(0, whole, 4 * W):
            e0, e1 = vexp_normal(vsub(load_whole(x, half, c), m)), vexp_normal(vsub(load_whole(x, half, c + W), m))
            e2, e3 = vexp_normal(vsub(load_whole(x, half, c + 2 * W), m)), vexp_normal(vsub(load_whole(x, half, c + 3 * W), m))
            vstore(e, c, e0)
            vstore(e, c + W, e1)
            vstore(e, c + 2 * W, e2)
            vstore(e, c + 3 * W, e3)
            t0, t1, t2, t3 = vadd(t0, e0), vadd(t1, e1), vadd(t2, e2), vadd(t3, e3)
        for c in range(whole, columns, W):
            n = columns - c
            e0 = vselect(vlanes_below(n), vexp_normal(vsub(load(x, half, c, n), m)), vzero())
            vstore(e, c, e0)
            t0 = vadd(t0, e0)
        scale = vset(_ONE / vhsum(vadd(vadd(t0, t1), vadd(t2, t3))))
        for c in range(0, whole, W):
            store_whole(out, half, c, vmul(vload(e, c), scale))
        for c in range(whole, columns, W):
            store(out, half, c, vmul(vload(e, c), scale), columns - c)


def _backward(p, f, task, worker):
    half, columns = p[P.half], p[P.columns]
    whole = columns - columns % (4 * W)
    for row in range(task * p[P.task_rows], min((task + 1) * p[P.task_rows], p[P.rows])):
        dy, y, out = p[P.x] + row * p[P.x_row], p[P.y] + row * p[P.y_row], p[P.out] + row * p[P.out_row]
        t0, t1, t2, t3 = vzero(), vzero(), vzero(), vzero()
        for c in range(0, whole, 4 * W):
            t0 = vfma(load_once(dy, half, c), load_once(y, half, c), t0)
            t1 = vfma(load_once(dy, half, c + W), load_once(y, half, c + W), t1)
            t2 = vfma(load_once(dy, half, c + 2 * W), load_once(y, half, c + 2 * W), t2)
            t3 = vfma(load_once(dy, half, c + 3 * W), load_once(y, half, c + 3 * W), t3)
        for c in range(whole, columns, W):
            n = columns - c
            t0 = vfma(load(dy, half, c, n), load(y, half, c, n), t0)
        dot = vset(vhsum(vadd(vadd(t0, t1), vadd(t2, t3))))
        for c in range(0, whole, W):
            store_whole(out, half, c, vmul(load_whole(y, half, c), vsub(load_whole(dy, half, c), dot)))
        for c in range(whole, columns, W):
            n = columns - c
            store(out, half, c, vmul(load(y, half, c, n), vsub(load(dy, half, c, n), dot)), n)


_forward_kernel, _backward_kernel = Kernel(_forward), Kernel(_backward)


def _tasks(num_rows: int, columns: int) -> tuple[int, int]:
    """(number of tasks, rows of each)."""
    task_rows = max(1, ELEMENTS_PER_TASK // columns)
    return -(-num_rows // task_rows), task_rows


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers the forward pass uses."""
    ((*rows, columns),) = shapes
    return at_most(planned, _tasks(math.prod(rows), columns)[0]) if columns else 1


def _run(kernel: Kernel, x: Tensor, y: Tensor | None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        rows, result = as_rows(x), out.view(-1, x.shape[-1])
        other = rows if y is None else as_rows(y)
        tasks, task_rows = _tasks(*rows.shape)
        workers = num_workers("softmax", (x.shape,), x.dtype, backward=y is not None)
        exponentials_row = -(-rows.shape[1] // W) * W * 4 + 64
        owner, exponentials = scratch("softmax", workers * exponentials_row)
        kernel(
            tasks,
            workers,
            _arguments(
                x=rows.data_ptr(),
                x_row=row_bytes(rows),
                y=other.data_ptr(),
                y_row=row_bytes(other),
                out=result.data_ptr(),
                out_row=row_bytes(result),
                half=is_half(x),
                rows=rows.shape[0],
                columns=rows.shape[1],
                task_rows=task_rows,
                exponentials=exponentials,
                exponentials_row=exponentials_row,
            ),
        )
        del owner
    return out


def forward(x: Tensor) -> Tensor:
    return _run(_forward_kernel, x, None)


def backward(dy: Tensor, y: Tensor) -> Tensor:
    return _run(_backward_kernel, dy, y)
