"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) and LayerNorm (Ba et al. 2016, arXiv 1607.06450), with an optional residual added first.

N rows, E columns. One kernel serves both norms: CENTRE takes the mean away. Forward: a block holds one row or several short ones in registers;
a row too long for that is walked over twice. Backward: rows come in groups, whose size follows from the shape alone; a block walks over one group,
writes dx and keeps the group's sums of dweight and dbias in registers; a second kernel adds the groups' sums in a fixed order, so that no bit
depends on how many blocks run at once. Rows too long for that have dx and the sums computed by two kernels.
"""

import math
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.triton.dropout import NO_DROPOUT, kept_elements, kept_tile
from cllm.kernels.triton.launch import Calls, launch
from cllm.kernels.triton.rows import LONGEST_ROW, long_row_warps, row_start, row_tile, rows_of
from cllm.runtime.gpu import GPU, gpu_of

LONGEST_FUSED_BACKWARD = 8192  # columns: h, dy, weight and the sums of dweight and dbias beside each other in registers
NO_ROWS: tuple[None, None, int, int] = (None, None, 0, 0)


@triton.jit
def sum_with_residual(x, r_ptr, r_start, column, inside, dtype: tl.constexpr):
    """h = x + residual, rounded as it is stored."""
    return (x.to(tl.float32) + tl.load(r_ptr + r_start + column, mask=inside, other=0.0).to(tl.float32)).to(dtype)


@triton.jit
def with_dropout(x, row, first, key_ptr, dropped, place, kept, BLOCK: tl.constexpr):
    """float32 rows of BLOCK columns from `first` on (ROWS, BLOCK), or one row (BLOCK,), zeroed or scaled; row n is token n of the draws."""
    rows = row
    if len(x.shape) == 1:
        rows = tl.zeros([1], tl.int64) + row
    if BLOCK >= 128:
        keep = kept_tile(key_ptr, place, dropped, rows, (rows * 0).to(tl.int32) + first, BLOCK)
    else:
        keep = kept_elements(key_ptr, place, dropped, rows[:, None], first + tl.arange(0, BLOCK)[None, :])
    return tl.where(tl.reshape(keep, x.shape), x.to(tl.float32) * kept, 0.0)


@triton.jit(do_not_specialize=["dropped", "place"])
def norm_forward_kernel(
    x_ptr, x_inner, x_outer_stride, x_inner_stride, r_ptr, r_inner, r_outer_stride, r_inner_stride, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr,
    rstd_ptr, num_rows, num_columns, eps, key_ptr, dropped, place, kept, CENTRE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows)[:, None] & (column < num_columns)
    start = row_start(row, x_inner, x_outer_stride, x_inner_stride)[:, None]
    out = row[:, None] * num_columns + column
    x = tl.load(x_ptr + start + column, mask=inside, other=0.0)
    branch = x
    if key_ptr is not None:
        branch = with_dropout(x, row, 0, key_ptr, dropped, place, kept, BLOCK)
    if r_ptr is not None:
        x = sum_with_residual(branch, r_ptr, row_start(row, r_inner, r_outer_stride, r_inner_stride)[:, None], column, inside, x.dtype)
    else:
        x = branch.to(x.dtype)
    if h_ptr is not None:
        tl.store(h_ptr + out, x, mask=inside)
    h = x.to(tl.float32)
    if CENTRE:
        mean = tl.sum(h, 1) / num_columns
        tl.store(mean_ptr + row, mean, mask=row < num_rows)
        h = tl.where(inside, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(h * h, 1) / num_columns + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    y = h * rstd[:, None] * tl.load(weight_ptr + column, mask=column < num_columns, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < num_columns, other=0.0, eviction_policy="evict_last").to(tl.float32)
    tl.store(y_ptr + out, y, mask=inside)


@triton.jit(do_not_specialize=["dropped", "place"])
def norm_forward_long_kernel(
    x_ptr, x_inner, x_outer_stride, x_inner_stride, r_ptr, r_inner, r_outer_stride, r_inner_stride, weight_ptr, bias_ptr, y_ptr, h_ptr, mean_ptr,
    rstd_ptr, num_rows, num_columns, eps, key_ptr, dropped, place, kept, CENTRE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row_start(row, x_inner, x_outer_stride, x_inner_stride)
    r_start = row_start(row, r_inner, r_outer_stride, r_inner_stride)
    out = row * num_columns
    lane = tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float32)  # of each lane's own values, with the sum of their squared distances from it (Welford 1962)
    squares = tl.zeros([BLOCK], tl.float32)
    count = 0.0
    for first in range(0, num_columns, BLOCK):
        inside = first + lane < num_columns
        x = tl.load(x_ptr + first + lane, mask=inside, other=0.0, eviction_policy="evict_last")
        branch = x
        if key_ptr is not None:
            branch = with_dropout(x, row, first, key_ptr, dropped, place, kept, BLOCK)
        if r_ptr is not None:
            x = sum_with_residual(branch, r_ptr, r_start, first + lane, inside, x.dtype)
        else:
            x = branch.to(x.dtype)
        h = x.to(tl.float32)
        if CENTRE:
            count += 1.0
            distance = tl.where(inside, h - mean, 0.0)
            mean += distance / count
            squares += distance * tl.where(inside, h - mean, 0.0)
        else:
            squares += h * h
    if CENTRE:  # lanes hold as many values as they met chunks, the last chunk may be ragged
        weight = ((num_columns - lane + BLOCK - 1) // BLOCK).to(tl.float32) / num_columns
        row_mean = tl.sum(mean * weight, 0)
        tl.store(mean_ptr + row, row_mean)
        variance = tl.sum(squares, 0) / num_columns + tl.sum((mean - row_mean) * (mean - row_mean) * weight, 0)
    else:
        variance = tl.sum(squares, 0) / num_columns
    rstd = tl.rsqrt(variance + eps)
    tl.store(rstd_ptr + row, rstd)
    for first in range(0, num_columns, BLOCK):
        column = first + lane
        inside = column < num_columns
        x = tl.load(x_ptr + column, mask=inside, other=0.0, eviction_policy="evict_first")
        branch = x  # made again, not read back: another thread may have stored it
        if key_ptr is not None:
            branch = with_dropout(x, row, first, key_ptr, dropped, place, kept, BLOCK)
        if r_ptr is not None:
            x = sum_with_residual(branch, r_ptr, r_start, column, inside, x.dtype)
        else:
            x = branch.to(x.dtype)
        if h_ptr is not None:
            tl.store(h_ptr + out + column, x, mask=inside)
        h = x.to(tl.float32)
        if CENTRE:
            h -= row_mean
        y = h * rstd * tl.load(weight_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        tl.store(y_ptr + out + column, y, mask=inside)


@triton.jit(do_not_specialize=["dropped", "place"])
def norm_backward_kernel(
    dy_ptr, dh_ptr, h_ptr, h_inner, h_outer_stride, h_inner_stride, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dr_ptr, dweight_ptr, dbias_ptr, num_rows,
    num_columns, group_rows, key_ptr, dropped, place, kept, CENTRE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < num_columns, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in tl.range(0, group_rows, ROWS, num_stages=2):  # the next rows are on their way while these are reduced
        row = group * group_rows + first + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < num_columns)
        at = row[:, None] * num_columns + column
        h = tl.load(h_ptr + row_start(row, h_inner, h_outer_stride, h_inner_stride)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        if CENTRE:
            mean = tl.load(mean_ptr + row, mask=row < num_rows, other=0.0)
            h = tl.where(inside, h - mean[:, None], 0.0)
        normed = h * rstd
        dnormed = dy * weight
        dx = dnormed - normed * (tl.sum(dnormed * normed, 1) / num_columns)[:, None]
        if CENTRE:
            dx -= (tl.sum(dnormed, 1) / num_columns)[:, None]
        dx *= rstd
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if dr_ptr is not None:
            tl.store(dr_ptr + at, dx, mask=inside)
        if key_ptr is not None:
            dx = with_dropout(dx, row, 0, key_ptr, dropped, place, kept, BLOCK)
        tl.store(dx_ptr + at, dx, mask=inside)
        dweight += dy * normed
        if dbias_ptr is not None:
            dbias += dy
    here = tl.arange(0, BLOCK)
    tl.store(dweight_ptr + group * num_columns + here, tl.sum(dweight, 0), mask=here < num_columns)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + group * num_columns + here, tl.sum(dbias, 0), mask=here < num_columns)


@triton.jit(do_not_specialize=["dropped", "place"])
def norm_backward_long_kernel(
    dy_ptr, dh_ptr, h_ptr, h_inner, h_outer_stride, h_inner_stride, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dr_ptr, num_columns, key_ptr, dropped,
    place, kept, CENTRE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h_ptr += row_start(row, h_inner, h_outer_stride, h_inner_stride)
    at = row * num_columns
    lane = tl.arange(0, BLOCK)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if CENTRE:
        mean = tl.load(mean_ptr + row)
    along = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_columns, BLOCK):
        column = first + lane
        inside = column < num_columns
        h = tl.load(h_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dy = tl.load(dy_ptr + at + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dnormed = dy * tl.load(weight_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        along += dnormed * (h - mean)
        if CENTRE:
            plain += dnormed
    along_normed = tl.sum(along, 0) * rstd / num_columns
    shift = tl.sum(plain, 0) / num_columns
    for first in range(0, num_columns, BLOCK):
        column = first + lane
        inside = column < num_columns
        h = tl.load(h_ptr + column, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dy = tl.load(dy_ptr + at + column, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dnormed = dy * tl.load(weight_ptr + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dx = rstd * (dnormed - shift - (h - mean) * rstd * along_normed)
        if dh_ptr is not None:
            dx += tl.load(dh_ptr + at + column, mask=inside, other=0.0).to(tl.float32)
        if dr_ptr is not None:
            tl.store(dr_ptr + at + column, dx, mask=inside)
        if key_ptr is not None:
            dx = with_dropout(dx, row, first, key_ptr, dropped, place, kept, BLOCK)
        tl.store(dx_ptr + at + column, dx, mask=inside)


@triton.jit
def group_sums_kernel(
    dy_ptr, h_ptr, h_inner, h_outer_stride, h_inner_stride, mean_ptr, rstd_ptr, dweight_ptr, dbias_ptr, num_rows, num_columns, group_rows,
    CENTRE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    here = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in tl.range(0, group_rows, ROWS, num_stages=2):
        row = group * group_rows + first + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (here < num_columns)[None, :]
        start = row_start(row, h_inner, h_outer_stride, h_inner_stride)[:, None]
        h = tl.load(h_ptr + start + here[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row[:, None] * num_columns + here[None, :], mask=inside, other=0.0).to(tl.float32)
        if CENTRE:
            h -= tl.load(mean_ptr + row, mask=row < num_rows, other=0.0)[:, None]
        dweight += dy * (h * tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)[:, None])
        dbias += dy
    tl.store(dweight_ptr + group * num_columns + here, tl.sum(dweight, 0), mask=here < num_columns)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + group * num_columns + here, tl.sum(dbias, 0), mask=here < num_columns)


@triton.jit
def column_sums_kernel(
    dweight_groups_ptr, dbias_groups_ptr, dweight_ptr, dbias_ptr, num_groups, num_columns, GROUPS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    dweight = tl.zeros([GROUPS, COLUMNS], tl.float32)
    dbias = tl.zeros([GROUPS, COLUMNS], tl.float32)
    for first in range(0, num_groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        inside = (group < num_groups)[:, None] & (column < num_columns)[None, :]
        at = group.to(tl.int64)[:, None] * num_columns + column[None, :]
        dweight += tl.load(dweight_groups_ptr + at, mask=inside, other=0.0)
        if dbias_ptr is not None:
            dbias += tl.load(dbias_groups_ptr + at, mask=inside, other=0.0)
    tl.store(dweight_ptr + column, tl.sum(dweight, 0), mask=column < num_columns)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + column, tl.sum(dbias, 0), mask=column < num_columns)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """x and residual (..., E) of any strides -> y, h = x + residual in x's dtype (None without a residual), rstd (...,) float32."""
    y, h, _, rstd = forward(x, weight, None, eps, residual, centre=False)
    return y, h, rstd


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """As `rms_norm_forward`; mean (...,) and rstd (...,) float32."""
    y, h, mean, rstd = forward(x, weight, bias, eps, residual, centre=True)
    assert mean is not None
    return y, h, mean, rstd


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, centre: bool, dropout: tuple[Any, ...] = NO_DROPOUT
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(y, h, mean, rstd) of either norm; h is None where it would be x."""
    num_rows, num_columns = math.prod(x.shape[:-1]), x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = None if residual is None and dropout is NO_DROPOUT else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if centre else None
    added: Any = NO_ROWS if residual is None else rows_of(residual)
    arguments = (
        *rows_of(x), *added, weight.contiguous(), None if bias is None else bias.contiguous(), y, h, mean, rstd, num_rows, num_columns, eps,
        *dropout,
    )  # fmt: skip
    if num_columns > LONGEST_ROW:
        inputs = 1 if residual is None else 2
        num_warps = long_row_warps(inputs * num_columns * x.element_size(), gpu_of(x.device).warp_size)
        launch(norm_forward_long_kernel, (num_rows,), *arguments, CENTRE=centre, BLOCK=256 * num_warps, num_warps=num_warps)
    elif num_columns:
        rows, block, num_warps = row_tile(num_columns)
        grid = (triton.cdiv(num_rows, rows),)
        launch(norm_forward_kernel, grid, *arguments, CENTRE=centre, ROWS=rows, BLOCK=block, num_warps=num_warps)
    return y, h, mean, rstd


def rms_norm_backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed (`h`, any strides, which is x when there was no residual) and of the weight; dy and dh contiguous."""
    dx, _, dweight, _ = backward(dy, dh, h, weight, False, None, rstd)
    return dx, dweight


def layer_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    dx, _, dweight, dbias = backward(dy, dh, h, weight, has_bias, mean, rstd)
    return dx, dweight, dbias


def group_rows(num_rows: int, tile_rows: int) -> int:
    """Rows whose sums of dweight one block keeps: 256 groups or more where there are rows enough to keep all multiprocessors busy, but 32 rows in
    each, so that writing and reading the sums is some hundredth of the traffic, and no more than 1024 groups."""
    rows = max(1, min(32, -(-num_rows // 256)), -(-num_rows // 1024))
    return -(-rows // tile_rows) * tile_rows


def backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor | None, rstd: Tensor,
    dropout: tuple[Any, ...] = NO_DROPOUT, has_residual: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, of the residual where there is one that is not x's own, of the weight and of the bias."""
    num_rows, num_columns = math.prod(h.shape[:-1]), h.shape[-1]
    dx = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    dresidual = torch.empty_like(dx) if has_residual else None
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=h.device)
    dbias = torch.empty(weight.shape, dtype=weight.dtype, device=h.device) if has_bias else None
    if num_columns == 0:
        return dx, dresidual, dweight, dbias
    fused = num_columns <= LONGEST_FUSED_BACKWARD
    rows, block, num_warps = row_tile(num_columns) if fused else (8, 512, 8)
    if fused and block * h.element_size() >= 16384:  # more values of each column to hold than forward has: fewer columns for each thread
        num_warps = 16
    rows_of_group = group_rows(num_rows, rows)
    num_groups = triton.cdiv(num_rows, rows_of_group)
    dweight_groups = torch.empty((num_groups, num_columns), dtype=torch.float32, device=h.device)
    dbias_groups = torch.empty((num_groups, num_columns), dtype=torch.float32, device=h.device) if has_bias else None
    centre, what, contiguous_weight = mean is not None, rows_of(h), weight.contiguous()
    if fused:
        launch(
            norm_backward_kernel, (num_groups,), dy, dh, *what, contiguous_weight, mean, rstd, dx, dresidual, dweight_groups, dbias_groups,
            num_rows, num_columns, rows_of_group, *dropout, CENTRE=centre, ROWS=rows, BLOCK=block, num_warps=num_warps,
        )  # fmt: skip
    else:
        row_warps = long_row_warps(2 * num_columns * h.element_size(), gpu_of(h.device).warp_size)
        launch(
            norm_backward_long_kernel, (num_rows,), dy, dh, *what, contiguous_weight, mean, rstd, dx, dresidual, num_columns, *dropout,
            CENTRE=centre, BLOCK=256 * row_warps, num_warps=row_warps,
        )  # fmt: skip
        launch(
            group_sums_kernel, (num_groups, triton.cdiv(num_columns, block)), dy, *what, mean, rstd, dweight_groups, dbias_groups, num_rows,
            num_columns, rows_of_group, CENTRE=centre, ROWS=rows, COLUMNS=block, num_warps=num_warps,
        )  # fmt: skip
    add_up_groups(dweight_groups, dbias_groups, dweight, dbias)
    return dx, dresidual, dweight, dbias


def add_up_groups(dweight_groups: Tensor, dbias_groups: Tensor | None, dweight: Tensor, dbias: Tensor | None) -> None:
    """Sums of groups, float32 (groups, columns), in a fixed order -> dweight and dbias, contiguous and of as many elements as columns."""
    num_groups, num_columns = dweight_groups.shape
    launch(
        column_sums_kernel, (triton.cdiv(num_columns, 32),), dweight_groups, dbias_groups, dweight, dbias, num_groups, num_columns,
        GROUPS=128, COLUMNS=32, num_warps=8,
    )  # fmt: skip


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    for columns in (128, 4096, 32768) if dtype == torch.float16 else (65, 128, 768, 4096, 8192, 16384, 32768):  # bfloat16 finds the rest
        x, rstd, master = empty(4096, columns), empty(4096, of=torch.float32), empty(columns, of=torch.float32)
        for weight, residual in ((empty(columns), None), (master, x)):  # the lightest and the heaviest of each norm
            name = f"{columns}{'' if residual is None else ' residual, float32 weight'}"
            yield f"rms_norm forward {name}", partial(rms_norm_forward, x, weight, 1e-6, residual)
            yield f"rms_norm backward {name}", partial(rms_norm_backward, x, residual, x, weight, rstd)
            yield f"layer_norm forward {name}", partial(layer_norm_forward, x, weight, None if residual is None else weight, 1e-5, residual)
            yield f"layer_norm backward {name}", partial(layer_norm_backward, x, residual, x, weight, residual is not None, rstd, rstd)
    heads = empty(512, 8, 3, 128)[:, :, 1]
    yield "rms_norm of heads", partial(rms_norm_forward, heads, empty(128), 1e-6, None)
    yield "rms_norm backward of heads", partial(rms_norm_backward, empty(512, 8, 128), None, heads, empty(128), empty(512, 8, of=torch.float32))
