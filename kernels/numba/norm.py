"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450) on the CPU, with an optional residual added first.

N rows of E elements. The gradients of weight and bias are summed over blocks of rows whose size depends on N only, and
the blocks are added up by a tree of fan-out 12.
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
    inline,
    is_half,
    load,
    load_once,
    load_whole,
    num_workers,
    put_float32,
    row_bytes,
    rows_per_block,
    scratch,
    store,
    store_whole,
)
from cllm.kernels.numba.simd import W, vadd, vfma, vhsum, vlanes_below, vload, vmul, vselect, vset, vstore, vsub, vzero
from cllm.kernels.numba.sums import add_up
from cllm.kernels.operations import Shapes

ROWS_PER_TASK = 16


class Forward(NamedTuple):
    """Addresses (0 where there is no such tensor), and in bytes the distance from row to row."""

    x: int
    x_row: int
    residual: int
    residual_row: int
    h: int  # x + residual
    h_row: int
    y: int
    y_row: int
    half: int  # whether x, residual, h and y are bfloat16
    weight: int
    weight_half: int
    bias: int
    bias_half: int
    mean: int  # of each row, float32; 0 for RMSNorm
    rstd: int
    rows: int
    columns: int


class Options(NamedTuple):
    eps: float


class _Backward(NamedTuple):
    """Addresses (0 where there is no such tensor), and in bytes the distance from row to row."""

    dy: int
    dy_row: int
    dh: int  # what else flows into h, past the norm
    dh_row: int
    h: int
    h_row: int
    dx: int
    dx_row: int
    half: int  # whether dy, dh, h and dx are bfloat16
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


FWD, forward_arguments = fields(Forward)
BWD, _backward_arguments = fields(_Backward)
F, options = fields(Options)

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


# Sums over a row run in four chains of vectors, so that each addition need not wait for the last one; then the ragged end.


@inline
def _add_residual(p, row, h):
    x, residual, half = p[FWD.x] + row * p[FWD.x_row], p[FWD.residual] + row * p[FWD.residual_row], p[FWD.half]
    whole = p[FWD.columns] - p[FWD.columns] % W
    for c in range(0, whole, W):
        store_whole(h, half, c, vadd(load_once(x, half, c), load_once(residual, half, c)))
    if whole < p[FWD.columns]:
        n = p[FWD.columns] - whole
        store(h, half, whole, vadd(load(x, half, whole, n), load(residual, half, whole, n)), n)


@inline
def sum_of(h, half, columns):
    t0, t1, t2, t3 = vzero(), vzero(), vzero(), vzero()
    whole = columns - columns % (4 * W)
    for c in range(0, whole, 4 * W):
        t0 = vadd(t0, load_once(h, half, c))
        t1 = vadd(t1, load_once(h, half, c + W))
        t2 = vadd(t2, load_once(h, half, c + 2 * W))
        t3 = vadd(t3, load_once(h, half, c + 3 * W))
    for c in range(whole, columns, W):
        t0 = vadd(t0, load(h, half, c, columns - c))
    return vhsum(vadd(vadd(t0, t1), vadd(t2, t3)))


@inline
def _centred_squares(h, half, columns, mean):
    """Sum of (h - mean)^2 over a row."""
    m = vset(mean)
    t0, t1, t2, t3 = vzero(), vzero(), vzero(), vzero()
    whole = columns - columns % (4 * W)
    for c in range(0, whole, 4 * W):
        v0, v1 = vsub(load_whole(h, half, c), m), vsub(load_whole(h, half, c + W), m)
        v2, v3 = vsub(load_whole(h, half, c + 2 * W), m), vsub(load_whole(h, half, c + 3 * W), m)
        t0, t1, t2, t3 = vfma(v0, v0, t0), vfma(v1, v1, t1), vfma(v2, v2, t2), vfma(v3, v3, t3)
    for c in range(whole, columns, W):
        n = columns - c
        v = vselect(vlanes_below(n), vsub(load(h, half, c, n), m), vzero())
        t0 = vfma(v, v, t0)
    return vhsum(vadd(vadd(t0, t1), vadd(t2, t3)))


@inline
def inverse_rms(h, half, columns, mean, eps):
    """1 / sqrt(mean((h - mean)^2) + eps) of a row."""
    return np.float32(_ONE / math.sqrt(_centred_squares(h, half, columns, mean) / np.float32(columns) + np.float32(eps)))


@inline
def normalise(h, y, half, columns, mean, rstd, weight, weight_half, bias, bias_half):
    """A row y = weight * (h - mean) * rstd + bias; no bias where its address is 0."""
    m, r, whole = vset(mean), vset(rstd), columns - columns % W
    for c in range(0, whole, W):
        v = vmul(vmul(vsub(load_whole(h, half, c), m), r), load_whole(weight, weight_half, c))
        if bias != 0:
            v = vadd(v, load_whole(bias, bias_half, c))
        store_whole(y, half, c, v)
    if whole < columns:
        n = columns - whole
        v = vmul(vmul(vsub(load(h, half, whole, n), m), r), load(weight, weight_half, whole, n))
        if bias != 0:
            v = vadd(v, load(bias, bias_half, whole, n))
        store(y, half, whole, v, n)


def _forward(p, f, task, worker):
    """MEAN is 0 for RMSNorm."""
    half, columns = p[FWD.half], p[FWD.columns]
    for row in range(task * ROWS_PER_TASK, min((task + 1) * ROWS_PER_TASK, p[FWD.rows])):
        h = p[FWD.x] + row * p[FWD.x_row]
        if p[FWD.residual] != 0:
            h = p[FWD.h] + row * p[FWD.h_row]
            _add_residual(p, row, h)
        mean = _ZERO
        if p[FWD.mean] != 0:
            mean = sum_of(h, half, columns) / np.float32(columns)
            put_float32(p[FWD.mean], row, mean)
        rstd = inverse_rms(h, half, columns, mean, f[F.eps])
        put_float32(p[FWD.rstd], row, rstd)
        normalise(h, p[FWD.y] + row * p[FWD.y_row], half, columns, mean, rstd, p[FWD.weight], p[FWD.weight_half], p[FWD.bias], p[FWD.bias_half])


@inline
def clear(partial, columns):
    for c in range(0, columns, W):
        store(partial, False, c, vzero(), columns - c)


@inline
def differentiate(dy, dh, h, dx, half, columns, centred, mean, rstd, weight, weight_half, partial, partial_bias):
    """A row of dx, and what it adds to the float32 rows at `partial` (dweight) and `partial_bias`. dx may be dy; dh and partial_bias may be 0."""
    m, r, whole = vset(mean), vset(rstd), columns - columns % W
    dot, total = vzero(), vzero()
    for c in range(0, whole, W):
        g, normed = load_once(dy, half, c), vmul(vsub(load_once(h, half, c), m), r)
        scaled = vmul(g, load_whole(weight, weight_half, c))
        dot, total = vfma(scaled, normed, dot), vadd(scaled, total)
        vstore(partial, c, vfma(g, normed, vload(partial, c)))
        if partial_bias != 0:
            vstore(partial_bias, c, vadd(g, vload(partial_bias, c)))
    if whole < columns:
        n = columns - whole
        g, normed = load(dy, half, whole, n), vmul(vsub(load(h, half, whole, n), m), r)
        scaled = vmul(g, load(weight, weight_half, whole, n))
        dot, total = vfma(scaled, vselect(vlanes_below(n), normed, vzero()), dot), vadd(scaled, total)
        store(partial, False, whole, vfma(g, normed, load(partial, False, whole, n)), n)
        if partial_bias != 0:
            store(partial_bias, False, whole, vadd(g, load(partial_bias, False, whole, n)), n)
    size = np.float32(columns)
    along, offset = vset(vhsum(dot) / size), vzero()
    if centred:
        offset = vset(vhsum(total) / size)
    for c in range(0, whole, W):
        normed = vmul(vsub(load_whole(h, half, c), m), r)
        scaled = vmul(load_whole(dy, half, c), load_whole(weight, weight_half, c))
        v = vmul(r, vsub(vsub(scaled, offset), vmul(normed, along)))
        if dh != 0:
            v = vadd(v, load_whole(dh, half, c))
        store_whole(dx, half, c, v)
    if whole < columns:
        n = columns - whole
        normed = vmul(vsub(load(h, half, whole, n), m), r)
        scaled = vmul(load(dy, half, whole, n), load(weight, weight_half, whole, n))
        v = vmul(r, vsub(vsub(scaled, offset), vmul(normed, along)))
        if dh != 0:
            v = vadd(v, load(dh, half, whole, n))
        store(dx, half, whole, v, n)


def _backward(p, f, task, worker):
    """One block of rows: its rows of dx, and its part of dweight (and dbias)."""
    columns, centred = p[BWD.columns], p[BWD.mean] != 0
    partial, partial_bias = p[BWD.partial] + task * p[BWD.partial_row], 0
    clear(partial, columns)
    if p[BWD.partial_bias] != 0:
        partial_bias = p[BWD.partial_bias] + task * p[BWD.partial_row]
        clear(partial_bias, columns)
    for row in range(task * p[BWD.block_rows], min((task + 1) * p[BWD.block_rows], p[BWD.rows])):
        dh = p[BWD.dh] + row * p[BWD.dh_row] if p[BWD.dh] != 0 else 0
        mean = float32_at(p[BWD.mean], row) if centred else _ZERO
        differentiate(
            p[BWD.dy] + row * p[BWD.dy_row], dh, p[BWD.h] + row * p[BWD.h_row], p[BWD.dx] + row * p[BWD.dx_row], p[BWD.half], columns, centred, mean,
            float32_at(p[BWD.rstd], row), p[BWD.weight], p[BWD.weight_half], partial, partial_bias,
        )  # fmt: skip


_forward_kernel, _backward_kernel = Kernel(_forward), Kernel(_backward)


def _tasks(num_rows: int) -> int:
    return -(-num_rows // ROWS_PER_TASK)


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers the forward pass uses."""
    ((*rows, columns),) = shapes
    return at_most(planned, _tasks(math.prod(rows))) if columns else 1


def address_of(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _norm(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """(y, h, rstd, mean)."""
    y = torch.empty(x.shape, dtype=x.dtype)
    h = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if op == "layer_norm" else None
    if x.numel():
        rows, added = as_rows(x), None if residual is None else as_rows(residual)
        weight = dense(weight)
        bias = None if bias is None else dense(bias)
        row = rows.shape[1] * y.element_size()  # of y and h
        _forward_kernel(
            _tasks(rows.shape[0]),
            num_workers(op, (x.shape,), x.dtype, residual=residual is not None),
            forward_arguments(
                x=rows.data_ptr(),
                x_row=row_bytes(rows),
                residual=address_of(added),
                residual_row=0 if added is None else row_bytes(added),
                h=address_of(h),
                h_row=row,
                y=y.data_ptr(),
                y_row=row,
                half=is_half(x),
                weight=weight.data_ptr(),
                weight_half=is_half(weight),
                bias=address_of(bias),
                bias_half=0 if bias is None else is_half(bias),
                mean=address_of(mean),
                rstd=rstd.data_ptr(),
                rows=rows.shape[0],
                columns=rows.shape[1],
            ),
            options(eps=eps),
        )
    return y, h, rstd, mean


def _norm_backward(
    op: str, dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, mean: Tensor | None, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    dx = torch.empty(h.shape, dtype=h.dtype)
    dweight = torch.empty(weight.shape, dtype=weight.dtype)
    dbias = torch.empty_like(dweight) if has_bias else None
    if not h.numel():
        return dx, dweight.zero_(), None if dbias is None else dbias.zero_()
    g, rows, also = as_rows(dy), as_rows(h), None if dh is None else as_rows(dh)
    weight, rstd = dense(weight), dense(rstd)
    mean = None if mean is None else dense(mean)
    num_rows, columns = rows.shape
    block_rows = rows_per_block(num_rows, ROWS_PER_TASK)
    num_blocks = -(-num_rows // block_rows)
    padded = -(-columns // W) * W * 4
    owner, partial = scratch("norm", 2 * num_blocks * padded)
    partial_bias = partial + num_blocks * padded if has_bias else 0
    workers = num_workers(op, (h.shape,), h.dtype, backward=True)
    _backward_kernel(
        num_blocks,
        workers,
        _backward_arguments(
            dy=g.data_ptr(),
            dy_row=row_bytes(g),
            dh=address_of(also),
            dh_row=0 if also is None else row_bytes(also),
            h=rows.data_ptr(),
            h_row=row_bytes(rows),
            dx=dx.data_ptr(),
            dx_row=columns * dx.element_size(),
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
        ),
    )
    for sums, total in ((partial, dweight), (partial_bias, dbias)):
        if total is not None:
            add_up(sums, padded, num_blocks, total, workers)
    del owner
    return dx, dweight, dbias


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """(y, h = x + residual or None, rstd)."""
    y, h, rstd, _ = _norm("rms_norm", x, weight, None, eps, residual)
    return y, h, rstd


def rms_norm_backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed (h, which is x when there was no residual) and of the weight."""
    dx, dweight, _ = _norm_backward("rms_norm", dy, dh, h, weight, None, rstd, False)
    return dx, dweight


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, h = x + residual or None, mean, rstd)."""
    y, h, rstd, mean = _norm("layer_norm", x, weight, bias, eps, residual)
    assert mean is not None
    return y, h, mean, rstd


def layer_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of what was normed, of the weight and of the bias."""
    return _norm_backward("layer_norm", dy, dh, h, weight, mean, rstd, has_bias)
