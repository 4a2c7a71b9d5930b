"""Softmax over the last dimension on the CPU: N rows of E elements. Each row is one chain of fixed order."""

import numpy as np
import torch
from torch import Tensor

from cllm.kernels.cpu.launch import Kernel, as_rows, is_half, load, num_workers, row_bytes, store
from cllm.kernels.cpu.simd import W, vadd, vexp, vfma, vhmax, vhsum, vlanes_below, vmax, vmul, vselect, vset, vsub, vzero

ELEMENTS_PER_TASK = 8192  # a task is at least one row

X, X_ROW, Y, Y_ROW, OUT, OUT_ROW, HALF, ROWS, COLUMNS, TASK_ROWS = range(10)

_LOWEST = np.float32(-np.inf)
_ONE = np.float32(1.0)


def _forward(p, f, task, worker):
    half, columns = p[HALF], p[COLUMNS]
    lowest = vset(_LOWEST)
    for row in range(task * p[TASK_ROWS], min((task + 1) * p[TASK_ROWS], p[ROWS])):
        x, out = p[X] + row * p[X_ROW], p[OUT] + row * p[OUT_ROW]
        largest = lowest
        for c in range(0, columns, W):
            n = columns - c
            largest = vmax(vselect(vlanes_below(n), load(x, half, c, n), lowest), largest)
        m = vset(vhmax(largest))
        total = vzero()
        for c in range(0, columns, W):
            n = columns - c
            total = vadd(total, vselect(vlanes_below(n), vexp(vsub(load(x, half, c, n), m)), vzero()))
        scale = vset(_ONE / vhsum(total))
        for c in range(0, columns, W):
            n = columns - c
            store(out, half, c, vmul(vexp(vsub(load(x, half, c, n), m)), scale), n)


def _backward(p, f, task, worker):
    half, columns = p[HALF], p[COLUMNS]
    for row in range(task * p[TASK_ROWS], min((task + 1) * p[TASK_ROWS], p[ROWS])):
        dy, y, out = p[X] + row * p[X_ROW], p[Y] + row * p[Y_ROW], p[OUT] + row * p[OUT_ROW]
        total = vzero()
        for c in range(0, columns, W):
            n = columns - c
            total = vfma(load(dy, half, c, n), load(y, half, c, n), total)
        dot = vset(vhsum(total))
        for c in range(0, columns, W):
            n = columns - c
            store(out, half, c, vmul(load(y, half, c, n), vsub(load(dy, half, c, n), dot)), n)


_forward_kernel, _backward_kernel = Kernel(_forward), Kernel(_backward)


def _run(kernel: Kernel, x: Tensor, y: Tensor | None) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        rows, result = as_rows(x), out.view(-1, x.shape[-1])
        other = rows if y is None else as_rows(y)
        task_rows = max(1, ELEMENTS_PER_TASK // rows.shape[1])
        kernel(
            -(-rows.shape[0] // task_rows),
            num_workers("softmax", (tuple(x.shape),), x.dtype, 2.0 * x.numel() * x.element_size()),
            (rows.data_ptr(), row_bytes(rows), other.data_ptr(), row_bytes(other), result.data_ptr(), row_bytes(result),
             is_half(x), rows.shape[0], rows.shape[1], task_rows),
        )  # fmt: skip
    return out


def forward(x: Tensor) -> Tensor:
    return _run(_forward_kernel, x, None)


def backward(dy: Tensor, y: Tensor) -> Tensor:
    return _run(_backward_kernel, dy, y)
