"""AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) over all tensors at once, in three launches and without a word from the host.

`measure` adds up the squares of every gradient in float64, block by block; `finish`, one block, adds the blocks in a fixed tree, decides whether to
skip, and works out the clipping, the bias corrections and the loss scale, all on the device; `update` does the rest, or a kernel of `update.py` for
another optimizer. Blocks have a fixed size and never span two tensors, and find their tensor's addresses in a table on the device. On NVIDIA with
CuPy the launches are those of `adamw_cuda.py`; elsewhere the Triton kernels below, with the same arithmetic.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.torch import adamw as reference
from cllm.kernels.torch import fixed_order_sum
from cllm.kernels.triton.adamw_table import BLOCK_ELEMENTS, COEFFICIENTS, FIELDS, HYPER, KINDS, LARGEST_SCALE, SMALLEST_SCALE
from cllm.kernels.triton.launch import Calls, is_recording, launch
from cllm.runtime.errors import UserError
from cllm.runtime.gpu import GPU

TILE = 512
SLICE_ELEMENTS = 1 << 20  # that are measured at once, so that no whole embedding table is copied to float64

PARAM, AVG, AVG_SQ, HALF, SIZE, FIRST_BLOCK, DECAY, HALF_KIND = map(tl.constexpr, range(8))
LEARNING_RATE, BETA1, BETA2, EPS, MAX_NORM, LOSS_SCALE_INVERSE, SKIP_NONFINITE, GROWTH_INTERVAL = map(tl.constexpr, range(8))
UPDATES, LOSS_SCALE, GOOD_STEPS, SKIPPED = map(tl.constexpr, range(4))
GRAD_SCALE, RATE, STEP_SIZE, ROOT, KEEP1, KEEP2, EPSILON, SKIP, SHARE, DIRECT = map(tl.constexpr, range(10))
NUM_FIELDS, SMALLEST, LARGEST = tl.constexpr(len(FIELDS)), tl.constexpr(SMALLEST_SCALE), tl.constexpr(LARGEST_SCALE)


@triton.jit
def at_address(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:  # an address read from memory says nothing of itself, and loads would be narrow
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load_float32(address, at, inside, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = at_address(address, TYPE, ALIGNED) + at
    if inside is None:
        values = tl.load(pointer, eviction_policy="evict_first")
    else:
        values = tl.load(pointer, mask=inside, other=0.0)
    return values.to(tl.float32)


@triton.jit
def load_grad(address, kind, at, inside, ALIGNED: tl.constexpr):
    if kind == 0:
        g = load_float32(address, at, inside, tl.float32, ALIGNED)
    elif kind == 1:
        g = load_float32(address, at, inside, tl.bfloat16, ALIGNED)
    else:
        g = load_float32(address, at, inside, tl.float16, ALIGNED)
    return g


@triton.jit
def find_block(table_ptr, block_tensor_ptr, BLOCK: tl.constexpr):
    """(tensor, its row in the table, first element of this block, elements of this block)"""
    tensor = tl.load(block_tensor_ptr + tl.program_id(0)).to(tl.int64)
    row = table_ptr + tensor * NUM_FIELDS
    start = (tl.program_id(0) - tl.load(row + FIRST_BLOCK)) * BLOCK
    return tensor, row, start, tl.minimum(tl.load(row + SIZE) - start, BLOCK)


@triton.jit
def measure_tile(squares, largest, nonfinite, g):
    wide = g.to(tl.float64)  # holds the square of any float32 exactly
    squares += wide * wide
    largest = tl.maximum(largest, tl.where(g != g, 0.0, tl.abs(g)))  # NaN shows in the sum
    nonfinite += ((g - g) != 0.0).to(tl.int32)
    return squares, largest, nonfinite


@triton.jit
def measure_kernel(
    table_ptr, grads_ptr, block_tensor_ptr, squares_ptr, largest_ptr, nonfinite_ptr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    tensor, _, start, count = find_block(table_ptr, block_tensor_ptr, BLOCK)
    address, kind = tl.load(grads_ptr + 2 * tensor), tl.load(grads_ptr + 2 * tensor + 1)
    lane = tl.arange(0, TILE)
    squares, largest, nonfinite = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.int32)
    whole = count // TILE * TILE
    for first in range(0, whole, TILE):
        squares, largest, nonfinite = measure_tile(squares, largest, nonfinite, load_grad(address, kind, start + first + lane, None, ALIGNED))
    rest = load_grad(address, kind, start + whole + lane, whole + lane < count, ALIGNED)
    squares, largest, nonfinite = measure_tile(squares, largest, nonfinite, rest)
    block = tl.program_id(0)
    tl.store(squares_ptr + block, tl.sum(squares, 0))
    tl.store(largest_ptr + block, tl.max(largest, 0))
    tl.store(nonfinite_ptr + block, tl.sum(nonfinite, 0))


@triton.jit
def power(base, exponent):
    """base ** exponent for a float64 and an int32 >= 0 below 2**25, in the same multiplications as the CUDA kernel."""
    result = base * 0.0 + 1.0
    for _ in tl.static_range(25):
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def finish_kernel(
    squares_ptr, largest_ptr, nonfinite_ptr, num_blocks, hyper_ptr, state_ptr, coefficients_ptr, stats_ptr, TILE: tl.constexpr
):  # fmt: skip
    lane = tl.arange(0, TILE)
    squares, largest, nonfinite = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.int64)
    for first in range(0, num_blocks, TILE):
        inside = first + lane < num_blocks
        squares += tl.load(squares_ptr + first + lane, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.load(largest_ptr + first + lane, mask=inside, other=0.0))
        nonfinite += tl.load(nonfinite_ptr + first + lane, mask=inside, other=0).to(tl.int64)
    total, top, bad = tl.sum(squares, 0), tl.max(largest, 0).to(tl.float64), tl.sum(nonfinite, 0)
    updates, loss_scale = tl.load(state_ptr + UPDATES).to(tl.float64), tl.load(state_ptr + LOSS_SCALE).to(tl.float64)
    interval, max_norm = tl.load(hyper_ptr + GROWTH_INTERVAL).to(tl.float64), tl.load(hyper_ptr + MAX_NORM).to(tl.float64)
    inverse = tl.load(hyper_ptr + LOSS_SCALE_INVERSE).to(tl.float64) / loss_scale
    norm = tl.sqrt(total) * inverse
    found = (bad > 0) | ((inverse - inverse) != 0.0)  # a factor that is not finite ruins the weights whatever the gradients are
    skip = found & (tl.load(hyper_ptr + SKIP_NONFINITE) != 0)
    clip = max_norm / (norm + 1e-6)  # the formula of torch.nn.utils.clip_grad_norm_
    clip = tl.where((max_norm > 0) & ((clip <= 1.0) | (clip != clip)), clip, 1.0)
    tl.store(stats_ptr, norm)
    tl.store(stats_ptr + 1, tl.where(total != total, total, top * inverse))
    tl.store(stats_ptr + 2, bad)
    rate, beta1 = tl.load(hyper_ptr + LEARNING_RATE).to(tl.float64), tl.load(hyper_ptr + BETA1).to(tl.float64)
    beta2, eps = tl.load(hyper_ptr + BETA2).to(tl.float64), tl.load(hyper_ptr + EPS).to(tl.float64)
    step = (updates + 1).to(tl.int32)
    tl.store(coefficients_ptr + GRAD_SCALE, clip * inverse)
    tl.store(coefficients_ptr + RATE, rate)
    tl.store(coefficients_ptr + STEP_SIZE, rate / (1.0 - power(beta1, step)))
    tl.store(coefficients_ptr + ROOT, 1.0 / tl.sqrt(1.0 - power(beta2, step)))
    tl.store(coefficients_ptr + KEEP1, beta1)
    tl.store(coefficients_ptr + KEEP2, beta2)
    tl.store(coefficients_ptr + EPSILON, eps)
    tl.store(coefficients_ptr + SKIP, skip.to(tl.float64))
    skipped, good = tl.load(state_ptr + SKIPPED).to(tl.float64), tl.load(state_ptr + GOOD_STEPS).to(tl.float64) + 1.0
    tl.store(state_ptr + UPDATES, tl.where(skip, updates, updates + 1.0))
    tl.store(state_ptr + SKIPPED, tl.where(skip, skipped + 1.0, skipped))
    if interval > 0:  # the loss scale moves: down when it was too much, up when it has been well for long
        grow = (good >= interval) & (found == 0)
        following = tl.where(found, loss_scale * 0.5, tl.where(grow, loss_scale * 2.0, loss_scale))
        following = tl.where(following > SMALLEST, following, SMALLEST)  # also where it is NaN
        tl.store(state_ptr + LOSS_SCALE, tl.minimum(following, LARGEST))
        tl.store(state_ptr + GOOD_STEPS, tl.where(found | grow, 0.0, good))


@triton.jit
def update_tile(row, grad, kind, at, inside, scale, beta1, rest1, beta2, rest2, root, eps, step, keep, ALIGNED: tl.constexpr):
    param, avg, avg_sq = tl.load(row + PARAM), tl.load(row + AVG), tl.load(row + AVG_SQ)
    g = load_grad(grad, kind, at, inside, ALIGNED) * scale
    m = tl.fma(g, rest1, load_float32(avg, at, inside, tl.float32, ALIGNED) * beta1)
    v = tl.fma(g * g, rest2, load_float32(avg_sq, at, inside, tl.float32, ALIGNED) * beta2)
    p = tl.fma(tl.div_rn(m, tl.fma(tl.sqrt_rn(v), root, eps)), -step, load_float32(param, at, inside, tl.float32, ALIGNED) * keep)
    tl.store(at_address(param, tl.float32, ALIGNED) + at, p, mask=inside)
    tl.store(at_address(avg, tl.float32, ALIGNED) + at, m, mask=inside)
    tl.store(at_address(avg_sq, tl.float32, ALIGNED) + at, v, mask=inside)
    half, half_kind = tl.load(row + HALF), tl.load(row + HALF_KIND)
    if half != 0:
        if half_kind == 1:
            tl.store(at_address(half, tl.bfloat16, ALIGNED) + at, p.to(tl.bfloat16), mask=inside)
        else:
            tl.store(at_address(half, tl.float16, ALIGNED) + at, p.to(tl.float16), mask=inside)


@triton.jit
def update_kernel(table_ptr, grads_ptr, block_tensor_ptr, coefficients_ptr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    tensor, row, start, count = find_block(table_ptr, block_tensor_ptr, BLOCK)
    if (tl.load(coefficients_ptr + SKIP) == 0.0) & (tl.load(row + PARAM) != 0):
        grad, kind = tl.load(grads_ptr + 2 * tensor), tl.load(grads_ptr + 2 * tensor + 1)
        wide1, wide2 = tl.load(coefficients_ptr + KEEP1), tl.load(coefficients_ptr + KEEP2)
        decay = tl.load(row + DECAY).to(tl.float64, bitcast=True)
        scale, root = tl.load(coefficients_ptr + GRAD_SCALE).to(tl.float32), tl.load(coefficients_ptr + ROOT).to(tl.float32)
        beta1, rest1, beta2, rest2 = wide1.to(tl.float32), (1.0 - wide1).to(tl.float32), wide2.to(tl.float32), (1.0 - wide2).to(tl.float32)
        eps, step = tl.load(coefficients_ptr + EPSILON).to(tl.float32), tl.load(coefficients_ptr + STEP_SIZE).to(tl.float32)
        keep = (1.0 - tl.load(coefficients_ptr + RATE) * decay).to(tl.float32)
        lane = tl.arange(0, TILE)
        whole = count // TILE * TILE
        for first in range(0, whole, TILE):
            update_tile(row, grad, kind, start + first + lane, None, scale, beta1, rest1, beta2, rest2, root, eps, step, keep, ALIGNED)
        if whole < count:
            at, inside = start + whole + lane, whole + lane < count
            update_tile(row, grad, kind, at, inside, scale, beta1, rest1, beta2, rest2, root, eps, step, keep, ALIGNED)


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill a piece of memory without holes, in whatever order of the dimensions."""
    return t.is_contiguous() or t.permute(sorted(range(t.dim()), key=t.stride, reverse=True)).is_contiguous()


def same_order(a: Tensor, b: Tensor) -> bool:
    """Whether the elements of two dense tensors of one shape lie in the same order."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


class Fused:
    """AdamW over one set of tensors, with all that changes from step to step on the device: a step can be captured in a CUDA graph.

    params, exp_avgs and exp_avg_sqs float32, each triple of one shape and order of elements, without holes; one weight decay per tensor;
    half_copies (None, or a bfloat16 or float16 tensor or None for each) hold the rounded weights, now and after every step. The gradients of
    tensors whose exp_avg and exp_avg_sq are None are measured with the others, and the tensors left alone. Only addresses are kept: whoever
    makes a Fused keeps the tensors alive and where they are. Make one step before a capture: the first compiles the kernels. Raises UserError
    for tensors that do not fit.

    kernel: that updates, this file's or one of `update.py`, whose two states of each tensor stand in the places of the moments.

    `state` float32 (4,) on the device: [updates made, loss scale, good steps since it changed, updates skipped]; a checkpoint holds it.
    """

    def __init__(
        self, params: Sequence[Tensor], exp_avgs: Sequence[Tensor | None], exp_avg_sqs: Sequence[Tensor | None], weight_decays: Sequence[float],
        half_copies: Sequence[Tensor | None] | None = None, kernel: Any = update_kernel,
    ):  # fmt: skip
        halves = list(half_copies) if half_copies else [None] * len(params)
        if not len(params) == len(exp_avgs) == len(exp_avg_sqs) == len(weight_decays) == len(halves):
            raise UserError("Fused: params, exp_avgs, exp_avg_sqs, weight_decays and half_copies must be lists of one length.")
        rows: list[list[int]] = []
        blocks: list[int] = []
        num_blocks = 0
        decays = torch.tensor(list(weight_decays), dtype=torch.float64).view(torch.int64).tolist()
        for index, (param, avg, avg_sq, half) in enumerate(zip(params, exp_avgs, exp_avg_sqs, halves)):
            for name, other in (("exp_avg", avg), ("exp_avg_sq", avg_sq), ("half copy", half)):
                if other is not None and not (other.shape == param.shape and other.device == param.device and same_order(other, param)):
                    raise UserError(f"Fused: the {name} of tensor {index} must have the shape, strides and device of its parameter.")
            kept = [each for each in (param, avg, avg_sq) if each is not None]
            if any(each.dtype != torch.float32 for each in kept) or not is_dense(param):
                raise UserError(f"Fused: parameter {index} and its moments must be float32 without holes, got {param.dtype} {param.stride()}.")
            if half is not None and half.dtype not in (torch.bfloat16, torch.float16):
                raise UserError(f"Fused: the half copy of tensor {index} is {half.dtype}, expected torch.bfloat16 or torch.float16.")
            if half is not None:
                half.detach().copy_(param.detach())
            addresses = [0 if each is None else each.data_ptr() for each in (None if avg is None else param, avg, avg_sq, half)]
            rows.append([*addresses, param.numel(), num_blocks, decays[index], 0 if half is None else KINDS[half.dtype]])
            count = -(-param.numel() // BLOCK_ELEMENTS)
            blocks += [index] * count
            num_blocks += count
        self.device = params[0].device if params else torch.device("cpu")
        self.orders = [(param.shape, param.stride(), param.is_contiguous()) for param in params]
        self.num_blocks = num_blocks
        self.kernel = kernel
        self._aligned = self._tensors_aligned = all(address % 16 == 0 for row in rows for address in row[:4])
        self.table = torch.tensor(rows, dtype=torch.int64).view(-1, len(FIELDS)).to(self.device)
        self.block_tensor = torch.tensor(blocks, dtype=torch.int32).to(self.device)
        self.squares = torch.empty(num_blocks, dtype=torch.float64, device=self.device)
        self.largest = torch.empty(num_blocks, dtype=torch.float32, device=self.device)
        self.nonfinite = torch.empty(num_blocks, dtype=torch.int32, device=self.device)
        self.coefficients = torch.empty(len(COEFFICIENTS), dtype=torch.float64, device=self.device)
        self.state = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float32).to(self.device)
        self.grads = torch.empty((len(params), 2), dtype=torch.int64, device=self.device)
        self._grads_there: list[tuple[int, int]] | None = None
        self._measured: list[Tensor] = []
        # Captured copies read the host's memory at every replay: each capture takes a buffer of its own, and it lives as long as this object.
        self._for_captures = [torch.empty((len(params), 2), dtype=torch.int64, pin_memory=True) for _ in range(4 * (self.device.type == "cuda"))]
        self._captured: list[Tensor] = []

    def step(self, grads: Sequence[Tensor], hyper: Tensor, stats: Tensor) -> None:
        """One update, on the current stream, without waiting for anything.

        grads in float32, bfloat16 or float16; hyper float32 (8,) on the device: [learning_rate, beta1, beta2, eps, max_norm (0: no clipping),
        loss_scale_inverse (what the gradients are multiplied with, besides 1 / the loss scale in `state`), skip_nonfinite (0 or 1: whether
        nothing but the counters in `state` changes when a gradient, or the factor that multiplies all of them, is not finite),
        growth_interval (good steps until the loss scale doubles; it halves when a gradient or the factor is not finite; 0: it stays)].
        Writes stats float32 (3,): [norm before clipping, largest |g|, count of non-finite], of the gradients so multiplied.
        """
        self.run(grads, hyper, self.state, stats)

    def run(self, grads: Sequence[Tensor], hyper: Tensor, state: Tensor, stats: Tensor) -> None:
        """As `step`, with a state from outside, of the dtype of `hyper`: float32 or float64."""
        self.measure(grads, hyper, state, stats)
        self.update()

    def measure(self, grads: Sequence[Tensor], hyper: Tensor, state: Tensor, stats: Tensor) -> None:
        """What comes before the update of a `run`: the statistics, the next state, and the numbers that the update goes by."""
        if len(grads) != len(self.orders):
            raise UserError(f"Fused: {len(grads)} gradients for {len(self.orders)} parameters.")
        if hyper.shape != (len(HYPER),) or hyper.dtype != state.dtype or hyper.dtype not in (torch.float32, torch.float64):
            raise UserError(f"Fused: hyper must be {state.dtype} ({len(HYPER)},), got {hyper.dtype} {tuple(hyper.shape)}.")
        ordered = [self._in_order(grad, *order) for grad, order in zip(grads, self.orders)]
        there = [(grad.data_ptr(), KINDS[grad.dtype]) for grad in ordered]
        self._send(there)
        self._measured = ordered  # `update` reads what may have been copied for it
        self._aligned = self._tensors_aligned and all(address % 16 == 0 for address, _ in there)
        sums = self.squares, self.largest, self.nonfinite
        if self._has_cuda():
            from cllm.kernels.triton import adamw_cuda

            if adamw_cuda.measure(self.table, self.grads, self.block_tensor, self.num_blocks, *sums, self.coefficients, hyper, state, stats):
                return
        launch(measure_kernel, (self.num_blocks,), self.table, self.grads, self.block_tensor, *sums, **self._tiles())
        launch(finish_kernel, (1,), *sums, self.num_blocks, hyper, state, self.coefficients, stats, TILE=4096, num_warps=16)

    def update(self, share_and_direct: Tensor | None = None) -> None:
        """Updates the tensors by the gradients and the numbers of the last `measure`. share_and_direct: float64 (2,) on the device, what
        schedule-free AdamW goes by beside them."""
        if share_and_direct is not None:
            self.coefficients[SHARE.value :].copy_(share_and_direct)
        served = False
        if self.kernel is update_kernel and self._has_cuda():
            from cllm.kernels.triton import adamw_cuda

            served = adamw_cuda.update(self.table, self.grads, self.block_tensor, self.num_blocks, self.coefficients)
        if not served:
            launch(self.kernel, (self.num_blocks,), self.table, self.grads, self.block_tensor, self.coefficients, **self._tiles())
        self._measured = []

    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the last `measure`, scalars on the device for what is updated by other means: the factor of the gradients and the learning rate,
        float64, and whether nothing may change, bool."""
        return self.coefficients[GRAD_SCALE.value], self.coefficients[RATE.value], self.coefficients[SKIP.value] != 0

    def _has_cuda(self) -> bool:
        return self.device.type == "cuda" and not is_recording()

    def _tiles(self) -> dict[str, int]:
        return {"ALIGNED": self._aligned, "BLOCK": BLOCK_ELEMENTS, "TILE": TILE}

    def _in_order(self, grad: Tensor, shape: torch.Size, strides: tuple[int, ...], contiguous: bool) -> Tensor:
        """The gradient with its elements in the order of its parameter's."""
        if grad.shape != shape or grad.dtype not in KINDS:
            raise UserError(f"Fused: a gradient is {grad.dtype} {tuple(grad.shape)}, expected {tuple(shape)} in float32, bfloat16 or float16.")
        if grad.stride() == strides or (contiguous and grad.is_contiguous()):
            return grad
        return torch.empty_strided(shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad.detach())

    def _send(self, there: list[tuple[int, int]]) -> None:
        """The gradients' addresses, to the device: one small copy out of pinned memory, and none where the device has them already."""
        if self.device.type != "cuda" or not there:
            if there:
                self.grads.copy_(torch.tensor(there, dtype=torch.int64))
        elif torch.cuda.is_current_stream_capturing():
            if not self._for_captures:
                raise UserError("Fused: one object can be captured in four CUDA graphs. Make another one for more.")
            self._captured.append(self._for_captures.pop())
            self._captured[-1].copy_(torch.tensor(there, dtype=torch.int64))
            self.grads.copy_(self._captured[-1], non_blocking=True)
            self._grads_there = None  # what is there depends on the replays from now on
        elif there != self._grads_there or self._captured:
            self.grads.copy_(torch.tensor(there, dtype=torch.int64).pin_memory(), non_blocking=True)
            self._grads_there = there


_MOST_SETS = 8
_sets: dict[tuple[object, ...], Fused] = {}


def _fused(params: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], weight_decays: list[float]) -> Fused:
    if is_recording():  # meta tensors have no addresses
        return Fused(params, exp_avgs, exp_avg_sqs, weight_decays)
    triples = zip(params, exp_avgs, exp_avg_sqs)
    key = (params[0].device, *weight_decays, *((p.data_ptr(), m.data_ptr(), v.data_ptr(), p.shape, p.stride()) for p, m, v in triples))
    found = _sets.pop(key, None) or Fused(params, exp_avgs, exp_avg_sqs, weight_decays)
    _sets[key] = found  # the latest used is the last
    if len(_sets) > _MOST_SETS:
        del _sets[next(iter(_sets))]
    return found


def statistics(grads: list[Tensor]) -> Tensor:
    """float32 [norm, max |g|, count of non-finite] on the device, not waited for. Plain torch, with squares that are summed in float64, a slice of a
    tensor at a time: AdamW measures by itself, and the other optimizers call this once for all gradients."""
    squares, largest, nonfinite = [], [], []
    for grad in grads:
        for part in grad.reshape(-1).split(SLICE_ELEMENTS):
            wide = part.double()
            squares.append(fixed_order_sum(wide.square()))
            largest.append(wide.abs().amax() if part.numel() else wide.sum())
            nonfinite.append(part.numel() - torch.isfinite(part).sum())
    return torch.stack((torch.stack(squares).sum().sqrt(), torch.stack(largest).amax(), torch.stack(nonfinite).sum())).float()


def step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    learning_rate: float, beta1: float, beta2: float, eps: float, weight_decays: list[float], step: int,
    max_norm: float, skip_nonfinite: bool,
) -> Tensor:  # fmt: skip
    """Update all tensors in place; returns float32 [gradient norm before clipping, max |g|, count of non-finite] on the device, not waited for.

    The numbers come from the host: this cannot be captured in a CUDA graph, `Fused` can.
    """
    if any(t.dtype != torch.float32 for t in params):
        return reference.step(params, grads, exp_avgs, exp_avg_sqs, learning_rate, beta1, beta2, eps, weight_decays, step, max_norm, skip_nonfinite)
    device = params[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UserError("adamw_ takes its numbers from the host and cannot be captured in a CUDA graph. Use kernels.triton.adamw.Fused.")
    states = [[t.detach() for t in tensors] for tensors in (params, exp_avgs, exp_avg_sqs)]
    copied: list[tuple[Tensor, Tensor]] = []
    for index, (param, avg, avg_sq) in enumerate(zip(*states)):
        if not (is_dense(param) and same_order(param, avg) and same_order(param, avg_sq)):
            for tensors in states:
                original = tensors[index]
                tensors[index] = original.clone(memory_format=torch.contiguous_format)
                copied.append((original, tensors[index]))
    fused = _fused(states[0], states[1], states[2], weight_decays)
    numbers = torch.tensor(
        [learning_rate, beta1, beta2, eps, max_norm, 1.0, float(skip_nonfinite), 0.0, step - 1.0, 1.0, 0.0, 0.0], dtype=torch.float64
    )
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    numbers = numbers.to(device, non_blocking=True)
    stats = torch.empty(3, dtype=torch.float32, device=device)
    fused.run([grad.detach() for grad in grads], numbers[: len(HYPER)], numbers[len(HYPER) :], stats)
    for original, updated in copied:
        original.copy_(updated)
    return stats


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    tensors = [empty(1000, 64), empty(64)]
    grads = [torch.empty_like(t, dtype=dtype) for t in tensors]
    yield "adamw step", partial(step, tensors, grads, tensors, tensors, 1e-3, 0.9, 0.95, 1e-8, [0.1, 0.0], 1, 1.0, True)
    unaligned = [empty(math.prod(t.shape) + 1)[1:].view(t.shape) for t in tensors]
    yield "adamw step, unaligned", partial(step, unaligned, grads, tensors, tensors, 1e-3, 0.9, 0.95, 1e-8, [0.1, 0.0], 1, 1.0, True)
    fused = Fused(tensors, tensors, tensors, [0.1, 0.0])
    yield "adamw Fused.step", partial(fused.step, grads, empty(len(HYPER)), empty(3))
