"""Cross entropy of rows of logits: one block for a row, which reads it once for maximum, sum and first maximum, and again for a gradient.

N rows, V vocabulary. The second reading of a row finds it in the L2 cache. `row_kernel` is also what linear_cross_entropy.py runs over its chunks.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.triton.launch import Calls, launch, next_power_of_2
from cllm.kernels.triton.rows import long_row_warps
from cllm.runtime.gpu import GPU, gpu_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MOST_COLUMNS = 2048  # of a row that one tile of depth 1 holds
DEPTH = 4


@triton.jit
def capped(z, softcap, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        return softcap * (1.0 - 2.0 / (tl.exp2(z * (2.0 * LOG2_E) / softcap) + 1.0))  # softcap tanh(z / softcap)
    return z


@triton.jit
def row_kernel(
    z_ptr, z_row, dz_ptr, dz_row, targets_ptr, upstream_ptr, losses_ptr, plain_ptr, correct_ptr, lse_ptr, num_columns, ignore_index, upstream,
    smoothing, z_loss, softcap, STATISTICS: tl.constexpr, GRADIENT: tl.constexpr, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, DEPTH: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """STATISTICS: writes total loss, plain loss, correct and log-sum-exp of a row. GRADIENT: writes that of the logits, in place or elsewhere, from
    the row's `upstream_ptr` or one `upstream` for all; without STATISTICS the log-sum-exp is read.

    A tile has DEPTH values for each of LANES lanes, and a lane rescales its sum once a tile: with two exponentials for every value, of which a
    multiprocessor computes 16 a clock, they would take longer than the memory."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * z_row
    target = tl.load(targets_ptr + row)
    valid = target != ignore_index
    tile = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    if STATISTICS:
        at_target = capped(tl.load(z_ptr + tl.where(valid, target, 0)).to(tl.float32), softcap, SOFTCAP)
        largest = tl.full([LANES], float("-inf"), tl.float32)
        place = tl.zeros([LANES], tl.int32) + num_columns
        total = tl.zeros([LANES], tl.float32)
        for first in range(0, num_columns, DEPTH * LANES):
            column = first + tile
            z = tl.load(z_ptr + column, mask=column < num_columns, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
            if SOFTCAP:
                z = tl.where(column < num_columns, capped(z, softcap, SOFTCAP), float("-inf"))
            of_tile = tl.max(z, 0)
            place = tl.where(of_tile > largest, tl.min(tl.where(z == of_tile[None, :], column, num_columns), 0), place)
            larger = tl.maximum(largest, of_tile)
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            total = total * tl.exp2((largest - shift) * LOG2_E) + tl.sum(tl.exp2((z - shift[None, :]) * LOG2_E), 0)
            largest = larger
        top = tl.max(largest, 0)
        best = tl.min(tl.where(largest == top, place, num_columns), 0)
        log_sum = tl.log2(tl.sum(total * tl.exp2((largest - top) * LOG2_E), 0)) * LN_2
        lse = top + log_sum
        plain = log_sum - (at_target - top)  # without the cancellation where all logits share a large offset
        loss = plain
        if SMOOTH:
            distance = tl.zeros([LANES], tl.float32)
            for first in range(0, num_columns, DEPTH * LANES):
                column = first + tile
                z = tl.load(z_ptr + column, mask=column < num_columns, other=0.0, eviction_policy="evict_last").to(tl.float32)
                z = capped(z, softcap, SOFTCAP)
                distance += tl.sum(tl.where(column < num_columns, top - z, 0.0), 0)
            loss = (1.0 - smoothing) * plain + smoothing * (log_sum + tl.sum(distance, 0) / num_columns)
        loss += z_loss * lse * lse
        tl.store(losses_ptr + row, tl.where(valid, loss, 0.0))
        tl.store(plain_ptr + row, tl.where(valid, plain, 0.0))
        tl.store(correct_ptr + row, valid & (best == target))
        tl.store(lse_ptr + row, lse)
    else:
        top = tl.load(lse_ptr + row)
        lse = top
        log_sum = 0.0
    if GRADIENT:
        if upstream_ptr is not None:
            upstream = tl.load(upstream_ptr + row)
        share = 1.0 + 2.0 * z_loss * lse
        for first in range(0, num_columns, DEPTH * LANES):
            column = first + tile
            inside = column < num_columns
            z = capped(tl.load(z_ptr + column, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32), softcap, SOFTCAP)
            dz = tl.exp2((z - top - log_sum) * LOG2_E) * share
            if SMOOTH:
                dz -= smoothing / num_columns
            dz = tl.where(column == target, dz - (1.0 - smoothing), dz) * upstream
            if SOFTCAP:
                dz *= 1.0 - (z / softcap) * (z / softcap)
            tl.store(dz_ptr + row * dz_row + column, tl.where(valid, dz, 0.0), mask=inside)


def _tile(z: Tensor) -> tuple[int, int, int]:
    """(DEPTH, LANES, warps), from the width and the dtype alone: so do the bits of a row not depend on the others."""
    num_columns = z.shape[1]
    if num_columns <= MOST_COLUMNS:
        lanes = next_power_of_2(num_columns)
        return 1, lanes, 4 if lanes <= MOST_COLUMNS // 2 else 8
    warp_size = gpu_of(z.device).warp_size
    num_warps = long_row_warps(num_columns * z.element_size(), warp_size)
    return DEPTH, num_warps * warp_size * (16 // z.element_size()), num_warps


def run_rows(
    z: Tensor, dz: Tensor | None, targets: Tensor, upstream: Tensor | float, statistics: tuple[Tensor, Tensor, Tensor, Tensor] | None, lse: Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> None:  # fmt: skip
    """z (N, V) with contiguous rows; statistics (losses, plain, correct, lse) to write, or None where `lse` is known."""
    losses, plain, correct, _ = statistics or (lse,) * 4
    depth, lanes, num_warps = _tile(z)
    gradient = z if dz is None else dz
    per_row = upstream if isinstance(upstream, Tensor) else None
    launch(
        row_kernel, (z.shape[0],), z, z.stride(0), gradient, gradient.stride(0), targets, per_row, losses, plain, correct, lse, z.shape[1],
        ignore_index, 0.0 if isinstance(upstream, Tensor) else float(upstream), float(label_smoothing), float(z_loss), float(softcap),
        STATISTICS=statistics is not None, GRADIENT=dz is not None, SMOOTH=label_smoothing > 0, SOFTCAP=softcap > 0, DEPTH=depth,
        LANES=lanes, num_warps=num_warps,
    )  # fmt: skip


def empty_statistics(num_rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(losses, plain, correct, lse), each (N,)."""
    losses, plain, lse = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(3))
    return losses, plain, torch.empty(num_rows, dtype=torch.bool, device=device), lse


def _rows_contiguous(z: Tensor) -> Tensor:
    return z if z.stride(-1) == 1 or z.shape[-1] == 1 else z.contiguous()


def forward(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(total loss, plain cross entropy, correct, log-sum-exp), each (N,)."""
    statistics = empty_statistics(logits.shape[0], logits.device)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    run_rows(_rows_contiguous(logits), None, targets.contiguous(), 0.0, statistics, statistics[3], *options)
    return statistics


def backward(
    dlosses: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float
) -> Tensor:
    """Gradient of the logits, contiguous, given that of each row's total loss."""
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    options = (ignore_index, label_smoothing, z_loss, softcap)
    run_rows(_rows_contiguous(logits), dlogits, targets.contiguous(), dlosses.to(torch.float32), None, lse, *options)
    return dlogits


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    for columns in (65, 50304):
        logits = torch.empty((4096, columns), dtype=dtype, device="meta")
        targets, per_row = torch.empty(4096, dtype=torch.int64, device="meta"), torch.empty(4096, device="meta")
        for options in ((-100, 0.0, 0.0, 0.0), (-100, 0.1, 1e-4, 30.0)):
            yield f"cross entropy forward {columns}", partial(forward, logits, targets, *options)
            yield f"cross entropy backward {columns}", partial(backward, per_row, logits, targets, per_row, *options)
