"""Dropout of a branch, the sum with its residual, and RMSNorm or LayerNorm of the sum on the CPU, row by row with the parts of norm.py.

N rows of E elements. The mask of a row is drawn a group of elements at a time, forward and backward, and never stored.
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
    dense,
    float32_at,
    hold,
    inline,
    int64_at,
    is_half,
    load,
    num_workers,
    put_float32,
    row_bytes,
    rows_per_block,
    scratch,
    store,
)
from cllm.kernels.numba.norm import ROWS_PER_TASK, address_of, clear, differentiate, inverse_rms, normalise, sum_of
from cllm.kernels.numba.philox import kept_group
from cllm.kernels.numba.simd import W, vadd, vload, vmul
from cllm.kernels.numba.sums import add_up
from cllm.kernels.operations import Shapes
from cllm.kernels.philox import GROUP, scale_of, threshold_of


class _Mask(NamedTuple):
    """What the mask is drawn from."""

    threshold: int
    key: int  # address of int64: the seed, the step, and the number of row 0 among the tokens that draw
    place: int
    spare: int  # address of GROUP float32 for each worker


class _Forward(NamedTuple):
    """Addresses (0 where there is no such tensor), and in bytes the distance from row to row. h and y are contiguous."""

    x: int
    x_row: int
    residual: int
    residual_row: int
    h: int
    y: int
    row: int  # of h and y
    half: int  # whether x, residual, h and y are bfloat16
    weight: int
    weight_half: int
    bias: int
    bias_half: int
    mean: int  # of each row, float32; 0 for RMSNorm
    rstd: int
    rows: int
    columns: int


class _Backward(NamedTuple):
    """Addresses (0 where there is no such tensor), and in bytes the distance from row to row. All rows are contiguous."""

    dy: int
    dh: int  # what else flows into h, past the norm
    h: int
    dx: int
    dresidual: int  # dx where there is no residual
    row: int
    half: int  # whether these are bfloat16
    weight: int
    weight_half: int
    mean: int  # 0 for RMSNorm
    rstd: int
    partial: int  # float32 sums of each block of rows, for dweight
    partial_row: int
    partial_bias: int  # the same for dbias
    rows: int
    columns: int
    block_rows: int


class _Options(NamedTuple):
    kept: float
    eps: float


MASK, _mask_arguments = fields(_Mask)
FWD, _forward_arguments = fields(_Forward, start=len(MASK))
BWD, _backward_arguments = fields(_Backward, start=len(MASK))
F, _options = fields(_Options)

_ZERO = np.float32(0.0)


@inline
def _drop(p, f, worker, row, x, residual, to, half, columns):
    """A row at `to`: x with dropout, and the row at `residual` added where there is one. `to` may be x."""
    kept = p[MASK.spare] + worker * (GROUP * 4)
    seed, step, token = int64_at(p[MASK.key], 0), int64_at(p[MASK.key], 1), int64_at(p[MASK.key], 2) + row
    for first in range(0, columns, GROUP):
        kept_group(
            kept, np.float32(f[F.kept]), p[MASK.threshold], first // GROUP, token, p[MASK.place], step, seed, seed >> 32,
        )  # fmt: skip
        for c in range(first, min(first + GROUP, columns), W):
            n = columns - c
            v = vmul(load(x, half, c, n), vload(kept, c - first))
            if residual != 0:
                v = vadd(v, load(residual, half, c, n))
            store(to, half, c, v, n)


def _forward(p, f, task, worker):
    half, columns = p[FWD.half], p[FWD.columns]
    for row in range(task * ROWS_PER_TASK, min((task + 1) * ROWS_PER_TASK, p[FWD.rows])):
        h = p[FWD.h] + row * p[FWD.row]
        residual = p[FWD.residual] + row * p[FWD.residual_row] if p[FWD.residual] != 0 else 0
        _drop(p, f, worker, row, p[FWD.x] + row * p[FWD.x_row], residual, h, half, columns)
        mean = _ZERO
        if p[FWD.mean] != 0:
            mean = sum_of(h, half, columns) / np.float32(columns)
            put_float32(p[FWD.mean], row, mean)
        rstd = inverse_rms(h, half, columns, mean, f[F.eps])
        put_float32(p[FWD.rstd], row, rstd)
        normalise(h, p[FWD.y] + row * p[FWD.row], half, columns, mean, rstd, p[FWD.weight], p[FWD.weight_half], p[FWD.bias], p[FWD.bias_half])


def _backward(p, f, task, worker):
    """One block of rows: its rows of dresidual and dx, and its part of dweight (and dbias)."""
    columns, centred = p[BWD.columns], p[BWD.mean] != 0
    partial, partial_bias = p[BWD.partial] + task * p[BWD.partial_row], 0
    clear(partial, columns)
    if p[BWD.partial_bias] != 0:
        partial_bias = p[BWD.partial_bias] + task * p[BWD.partial_row]
        clear(partial_bias, columns)
    for row in range(task * p[BWD.block_rows], min((task + 1) * p[BWD.block_rows], p[BWD.rows])):
        offset = row * p[BWD.row]
        dh, dresidual = p[BWD.dh] + offset if p[BWD.dh] != 0 else 0, p[BWD.dresidual] + offset
        mean = float32_at(p[BWD.mean], row) if centred else _ZERO
        differentiate(
            p[BWD.dy] + offset, dh, p[BWD.h] + offset, dresidual, p[BWD.half], columns, centred, mean, float32_at(p[BWD.rstd], row), p[BWD.weight],
            p[BWD.weight_half], partial, partial_bias,
        )  # fmt: skip
        _drop(p, f, worker, row, dresidual, 0, p[BWD.dx] + offset, p[BWD.half], columns)


_forward_kernel, _backward_kernel = Kernel(_forward), Kernel(_backward)


def _tasks(num_rows: int) -> int:
    return -(-num_rows // ROWS_PER_TASK)


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers the forward pass uses."""
    ((*rows, columns),) = shapes
    return at_most(planned, _tasks(math.prod(rows))) if columns else 1


def _drawn(key: Tensor, rate: float, place: int, spare: int) -> tuple[int, ...]:
    hold(key)
    return _mask_arguments(threshold=threshold_of(rate), key=key.data_ptr(), place=place, spare=spare)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, centre: bool, eps: float, key: Tensor, rate: float, place: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(y, h = dropout(x) + residual, mean or None, rstd)."""
    y, h, key = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype), dense(key)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centre else None
    if x.numel():
        rows, added = as_rows(x), None if residual is None else as_rows(residual)
        weight = dense(weight)
        bias = None if bias is None else dense(bias)
        tasks = _tasks(rows.shape[0])
        workers = at_most(num_workers("norm_dropout", (x.shape,), x.dtype, residual=residual is not None), tasks)
        owner, spare = scratch("dropout", workers * GROUP * 4)
        arguments = _forward_arguments(
            x=rows.data_ptr(),
            x_row=row_bytes(rows),
            residual=address_of(added),
            residual_row=0 if added is None else row_bytes(added),
            h=h.data_ptr(),
            y=y.data_ptr(),
            row=rows.shape[1] * y.element_size(),
            half=is_half(x),
            weight=weight.data_ptr(),
            weight_half=is_half(weight),
            bias=address_of(bias),
            bias_half=0 if bias is None else is_half(bias),
            mean=address_of(mean),
            rstd=rstd.data_ptr(),
            rows=rows.shape[0],
            columns=rows.shape[1],
        )
        _forward_kernel(tasks, workers, (*_drawn(key, rate, place, spare), *arguments), _options(kept=scale_of(rate), eps=eps))
        del owner
    return y, h, mean, rstd


def backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor | None, rstd: Tensor, has_residual: bool,
    key: Tensor, rate: float, place: int,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, of the residual (None without one), of the weight and of the bias."""
    dx = torch.empty(h.shape, dtype=h.dtype)
    dresidual = torch.empty(h.shape, dtype=h.dtype) if has_residual else None
    dweight = torch.zeros(weight.shape, dtype=weight.dtype)
    dbias = torch.zeros_like(dweight) if has_bias else None
    if not h.numel():
        return dx, dresidual, dweight, dbias
    dy, rows, weight, rstd, key = dense(dy), dense(h), dense(weight), dense(rstd), dense(key)
    dh, mean = (None if each is None else dense(each) for each in (dh, mean))
    columns = h.shape[-1]
    num_rows = h.numel() // columns
    block_rows = rows_per_block(num_rows, ROWS_PER_TASK)
    num_blocks = -(-num_rows // block_rows)
    padded = -(-columns // W) * W * 4
    owner, partial = scratch("norm", 2 * num_blocks * padded)
    partial_bias = partial + num_blocks * padded if has_bias else 0
    workers = at_most(num_workers("norm_dropout", (h.shape,), h.dtype, backward=True), num_blocks)
    spare_owner, spare = scratch("dropout", workers * GROUP * 4)
    arguments = _backward_arguments(
        dy=dy.data_ptr(),
        dh=address_of(dh),
        h=rows.data_ptr(),
        dx=dx.data_ptr(),
        dresidual=address_of(dx if dresidual is None else dresidual),
        row=columns * h.element_size(),
        half=is_half(h),
        weight=weight.data_ptr(),
        weight_half=is_half(weight),
        mean=address_of(mean),
        rstd=rstd.data_ptr(),
        partial=partial,
        partial_row=padded,
        partial_bias=partial_bias,
        rows=num_rows,
        columns=columns,
        block_rows=block_rows,
    )
    _backward_kernel(num_blocks, workers, (*_drawn(key, rate, place, spare), *arguments), _options(kept=scale_of(rate), eps=0.0))
    for sums, total in ((partial, dweight), (partial_bias, dbias)):
        if total is not None:
            add_up(sums, padded, num_blocks, total, workers)
    del owner, spare_owner
    return dx, dresidual, dweight, dbias
