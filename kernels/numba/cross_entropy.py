"""Cross entropy of given logits on the CPU: N rows of V logits, each row one task of fixed order.

The formulas stand in kernels/torch/cross_entropy.py.
"""

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
    float32_at,
    inline,
    int64_at,
    is_half,
    load,
    num_workers,
    put_float32,
    row_bytes,
    store,
)
from cllm.kernels.numba.simd import W, vadd, vany, veq, vexp_normal, vfma, vhmax, vhsum, vlanes_below, vmax, vmul, vselect, vset, vsub, vtanh, vzero
from cllm.kernels.operations import Shapes

ELEMENTS_PER_TASK = 16384  # a task is as many whole rows as this holds, and at least one


class _Arguments(NamedTuple):
    """Addresses, and in bytes the distance from row to row."""

    logits: int
    logits_row: int
    half: int  # whether logits and their gradient are bfloat16
    targets: int  # int64
    rows: int
    columns: int
    task_rows: int
    ignore: int  # the target of rows that do not count
    losses: int  # forward the loss of each row, backward the gradient of that loss; float32 as all that follows
    lse: int
    plain: int = 0
    correct: int = 0
    dlogits: int = 0
    dlogits_row: int = 0


class _Options(NamedTuple):
    smoothing: float
    z_loss: float
    softcap: float  # 0 where there is none


P, _arguments = fields(_Arguments)
F, _options = fields(_Options)

_ZERO, _ONE, _LOWEST = np.float32(0.0), np.float32(1.0), np.float32(-np.inf)


@inline
def _capped(address, half, c, n, cap):
    z = load(address, half, c, n)
    if cap != _ZERO:
        return vmul(vset(cap), vtanh(vmul(z, vset(_ONE / cap))))
    return z


@inline
def _first_lane(v):
    return vhsum(vselect(vlanes_below(1), v, vzero()))


def _forward(p, f, task, worker):
    half, columns = p[P.half], p[P.columns]
    smoothing, z_loss, cap = np.float32(f[F.smoothing]), np.float32(f[F.z_loss]), np.float32(f[F.softcap])
    lowest = vset(_LOWEST)
    for row in range(task * p[P.task_rows], min((task + 1) * p[P.task_rows], p[P.rows])):
        x, target = p[P.logits] + row * p[P.logits_row], int64_at(p[P.targets], row)
        largest = lowest
        for c in range(0, columns, W):
            n = columns - c
            largest = vmax(vselect(vlanes_below(n), _capped(x, half, c, n, cap), lowest), largest)
        largest_z = vhmax(largest)
        m, exps, total = vset(largest_z), vzero(), vzero()
        for c in range(0, columns, W):
            n = columns - c
            z, inside = _capped(x, half, c, n, cap), vlanes_below(n)
            exps = vadd(exps, vselect(inside, vexp_normal(vsub(z, m)), vzero()))
            total = vadd(total, vselect(inside, vsub(z, m), vzero()))
        # Losses from differences to the maximum: through lse they would lose the digits of an offset that all logits share.
        log_mass = np.float32(math.log(vhsum(exps)))
        lse = log_mass + largest_z
        put_float32(p[P.lse], row, lse)
        loss, plain, correct = _ZERO, _ZERO, False
        if target != p[P.ignore]:
            target_z = _first_lane(_capped(x, half, target, columns - target, cap))
            plain = log_mass + (largest_z - target_z)
            loss = plain
            if smoothing != _ZERO:
                loss = (_ONE - smoothing) * plain + smoothing * (log_mass - vhsum(total) / np.float32(columns))
            if z_loss != _ZERO:
                loss += z_loss * lse * lse
            if target_z == largest_z:  # the first of equal maxima is the prediction
                correct = True
                for c in range(0, target, W):
                    z = vselect(vlanes_below(target - c), _capped(x, half, c, columns - c, cap), lowest)
                    if vany(veq(z, m)):
                        correct = False
                        break
        put_float32(p[P.losses], row, loss)
        put_float32(p[P.plain], row, plain)
        put_float32(p[P.correct], row, _ONE if correct else _ZERO)


def _backward(p, f, task, worker):
    half, columns = p[P.half], p[P.columns]
    smoothing, z_loss, cap = np.float32(f[F.smoothing]), np.float32(f[F.z_loss]), np.float32(f[F.softcap])
    for row in range(task * p[P.task_rows], min((task + 1) * p[P.task_rows], p[P.rows])):
        x, out, target = p[P.logits] + row * p[P.logits_row], p[P.dlogits] + row * p[P.dlogits_row], int64_at(p[P.targets], row)
        if target == p[P.ignore]:
            for c in range(0, columns, W):
                store(out, half, c, vzero(), columns - c)
            continue
        scale, lse = float32_at(p[P.losses], row), float32_at(p[P.lse], row)
        weight, minus_lse = vset(scale * (_ONE + np.float32(2.0) * z_loss * lse)), vset(-lse)
        minus_even = vset(-scale * smoothing / np.float32(columns))
        ones, inverse = vset(_ONE), vset(_ONE / cap if cap != _ZERO else _ZERO)
        for c in range(0, columns + W, W):
            # After the row, the lane of the target again, with what only it receives.
            last = c >= columns
            n = columns - c
            if last:
                c = target
                n = 1
            z = _capped(x, half, c, n, cap)
            dz = vfma(vexp_normal(vadd(z, minus_lse)), weight, minus_even)
            if last:
                dz = vadd(dz, vset(scale * (smoothing - _ONE)))
            if cap != _ZERO:
                t = vmul(z, inverse)
                dz = vmul(dz, vsub(ones, vmul(t, t)))
            store(out, half, c, dz, n)
            if last:
                break


_forward_kernel, _backward_kernel = Kernel(_forward), Kernel(_backward)


def _tasks(num_rows: int, columns: int) -> tuple[int, int]:
    """(number of tasks, rows of each)."""
    task_rows = max(1, ELEMENTS_PER_TASK // columns)
    return -(-num_rows // task_rows), task_rows


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers the forward pass uses."""
    ((*rows, columns),) = shapes
    return at_most(planned, _tasks(math.prod(rows), columns)[0]) if columns else 1


def forward(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (N, V), targets int64 (N,) -> (total loss, plain cross entropy, correct, log-sum-exp), each (N,)."""
    rows, targets = as_rows(logits), targets.contiguous()
    losses, plain, correct, lse = (torch.empty(rows.shape[0]) for _ in range(4))
    if rows.numel():
        tasks, task_rows = _tasks(*rows.shape)
        _forward_kernel(
            tasks,
            num_workers("cross_entropy", (rows.shape,), rows.dtype),
            _arguments(
                logits=rows.data_ptr(),
                logits_row=row_bytes(rows),
                half=is_half(rows),
                targets=targets.data_ptr(),
                rows=rows.shape[0],
                columns=rows.shape[1],
                task_rows=task_rows,
                ignore=ignore_index,
                losses=losses.data_ptr(),
                lse=lse.data_ptr(),
                plain=plain.data_ptr(),
                correct=correct.data_ptr(),
            ),
            _options(smoothing=label_smoothing, z_loss=z_loss, softcap=softcap),
        )
    return losses, plain, correct.bool(), lse


def backward(
    dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Gradient of the logits, given the gradient of each row's total loss."""
    rows, targets = as_rows(logits), targets.contiguous()
    dlosses, lse = dlosses.detach().float().contiguous(), lse.detach().float().contiguous()
    dlogits = torch.empty(logits.shape, dtype=logits.dtype)
    if rows.numel():
        tasks, task_rows = _tasks(*rows.shape)
        _backward_kernel(
            tasks,
            num_workers("cross_entropy", (rows.shape,), rows.dtype, backward=True),
            _arguments(
                logits=rows.data_ptr(),
                logits_row=row_bytes(rows),
                half=is_half(rows),
                targets=targets.data_ptr(),
                rows=rows.shape[0],
                columns=rows.shape[1],
                task_rows=task_rows,
                ignore=ignore_index,
                losses=dlosses.data_ptr(),
                lse=lse.data_ptr(),
                dlogits=dlogits.data_ptr(),
                dlogits_row=rows.shape[1] * rows.element_size(),
            ),
            _options(smoothing=label_smoothing, z_loss=z_loss, softcap=softcap),
        )
    return dlogits
