"""AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) on the CPU: two launches over blocks of all tensors together.

The first measures the gradients, the second clips and updates. Blocks have a fixed size and never span two tensors; sums of
squares are float64, added up block by block in a fixed tree.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import models, register_model
from torch import Tensor

from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.launch import FANOUT, Kernel, at_most, dense, float32_at, int64_at, is_half, load, load_whole, num_workers, store
from cllm.kernels.numba.llvm import intrinsic
from cllm.kernels.numba.micro import prefetch_l1
from cllm.kernels.numba.simd import (
    W,
    vabs,
    vadd,
    vdiv,
    vec,
    vfma,
    vhmax,
    vhsum,
    visnan,
    vload,
    vmax_nan,
    vmul,
    vselect,
    vset,
    vsqrt,
    vstore,
    vsub,
    vzero,
)
from cllm.kernels.operations import Shapes

BLOCK_ELEMENTS = 16384
AHEAD = 2048  # how many elements ahead the L1 cache is filled: the processor's own prefetching stops at the end of a page


class _Tensor(NamedTuple):
    """A row of the table of tensors, int64: addresses, and where its blocks begin among those of all tensors."""

    param: int
    grad: int
    avg: int
    avg_sq: int
    grad_half: int  # whether the gradient is bfloat16
    size: int
    first_block: int


class _Arguments(NamedTuple):
    """Addresses."""

    tensors: int  # the table of tensors
    block_tensor: int  # int64: the tensor of each block
    squares: int  # float64 as the next two, of each block: the sum of squares,
    largest: int  # the largest |g|,
    nonfinite: int  # and how many elements are inf or NaN
    decays: int = 0  # float32: what the weights of each tensor are multiplied with


class _Options(NamedTuple):
    clip: float
    step_size: float
    beta1: float
    beta2: float
    eps: float
    root_correction2: float


TENSOR, _ = fields(_Tensor)
P, _arguments = fields(_Arguments)
F, _options = fields(_Options)

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_VD = ir.VectorType(ir.DoubleType(), W)


class _Doubles(types.Type):
    """W float64 in registers, to add squares without losing them."""

    def __init__(self) -> None:
        super().__init__(name=f"f64x{W}")


_doubles = _Doubles()


@register_model(_Doubles)
class _DoublesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _VD)


@intrinsic
def no_squares(tc):
    return _doubles(), lambda ctx, bld, sig, args: ir.Constant(_VD, [0.0] * W)


@intrinsic
def add_squares(tc, total, v):
    def codegen(ctx, bld, sig, args):
        wide = bld.fpext(args[1], _VD)
        return bld.fadd(args[0], bld.fmul(wide, wide))  # the square of a float32 is exact in float64

    return _doubles(_doubles, vec), codegen


@intrinsic
def sum_squares(tc, total):
    def codegen(ctx, bld, sig, args):
        lanes = [bld.extract_element(args[0], ir.IntType(32)(i)) for i in range(W)]
        while len(lanes) > 1:
            half = len(lanes) // 2
            lanes = [bld.fadd(lanes[i], lanes[i + half]) for i in range(half)]
        return lanes[0]

    return types.float64(_doubles), codegen


@intrinsic
def _put_double(tc, address, i, value):
    def codegen(ctx, bld, sig, args):
        bld.store(args[2], bld.gep(bld.inttoptr(args[0], ir.DoubleType().as_pointer()), [args[1]]), align=8)
        return ctx.get_dummy_value()

    return types.void(types.int64, types.int64, types.float64), codegen


def _measure(p, f, task, worker):
    row = p[P.tensors] + int64_at(p[P.block_tensor], task) * len(TENSOR) * 8
    grad, half = int64_at(row, TENSOR.grad), int64_at(row, TENSOR.grad_half)
    start = (task - int64_at(row, TENSOR.first_block)) * BLOCK_ELEMENTS
    squares, largest, nonfinite = no_squares(), vzero(), vzero()
    one, zero = vset(_ONE), vzero()
    end = min(start + BLOCK_ELEMENTS, int64_at(row, TENSOR.size))
    for c in range(start, end, W):
        prefetch_l1(grad + (c + AHEAD) * (2 if half else 4))
        g = load(grad, half, c, end - c)
        squares = add_squares(squares, g)
        largest = vmax_nan(largest, vabs(g))
        nonfinite = vadd(nonfinite, vselect(visnan(vsub(g, g)), one, zero))
    _put_double(p[P.squares], task, sum_squares(squares))
    _put_double(p[P.largest], task, np.float64(vhmax(largest)))
    _put_double(p[P.nonfinite], task, np.float64(vhsum(nonfinite)))


def _update(p, f, task, worker):
    tensor = int64_at(p[P.block_tensor], task)
    row = p[P.tensors] + tensor * len(TENSOR) * 8
    param, grad, avg, avg_sq = int64_at(row, TENSOR.param), int64_at(row, TENSOR.grad), int64_at(row, TENSOR.avg), int64_at(row, TENSOR.avg_sq)
    half = int64_at(row, TENSOR.grad_half)
    start = (task - int64_at(row, TENSOR.first_block)) * BLOCK_ELEMENTS
    end = min(start + BLOCK_ELEMENTS, int64_at(row, TENSOR.size))
    clip, step_size, eps = vset(np.float32(f[F.clip])), vset(np.float32(-f[F.step_size])), vset(np.float32(f[F.eps]))
    beta1, rest1 = vset(np.float32(f[F.beta1])), vset(np.float32(1.0 - f[F.beta1]))
    beta2, rest2 = vset(np.float32(f[F.beta2])), vset(np.float32(1.0 - f[F.beta2]))
    root, keep = vset(np.float32(1.0 / f[F.root_correction2])), vset(float32_at(p[P.decays], tensor))
    whole = end - (end - start) % W
    for c in range(start, whole, W):
        for address in (param, avg, avg_sq):
            prefetch_l1(address + (c + AHEAD) * 4)
        prefetch_l1(grad + (c + AHEAD) * (2 if half else 4))
        g = vmul(load_whole(grad, half, c), clip)
        m = vfma(g, rest1, vmul(vload(avg, c), beta1))
        v = vfma(vmul(g, g), rest2, vmul(vload(avg_sq, c), beta2))
        vstore(avg, c, m)
        vstore(avg_sq, c, v)
        update = vdiv(m, vfma(vsqrt(v), root, eps))
        vstore(param, c, vfma(update, step_size, vmul(vload(param, c), keep)))
    if whole < end:
        n = end - whole
        g = vmul(load(grad, half, whole, n), clip)
        m = vfma(g, rest1, vmul(load(avg, False, whole, n), beta1))
        v = vfma(vmul(g, g), rest2, vmul(load(avg_sq, False, whole, n), beta2))
        store(avg, False, whole, m, n)
        store(avg_sq, False, whole, v, n)
        update = vdiv(m, vfma(vsqrt(v), root, eps))
        store(param, False, whole, vfma(update, step_size, vmul(load(param, False, whole, n), keep)), n)


_measure_kernel, _update_kernel = Kernel(_measure), Kernel(_update)


def _tree_sum(values: np.ndarray) -> float:
    """Sum of float64 values by a tree of fan-out 12, in index order."""
    while values.size > 1:
        padded = np.zeros((-(-values.size // FANOUT), FANOUT))
        padded.reshape(-1)[: values.size] = values
        values = padded[:, 0].copy()
        for child in range(1, FANOUT):
            values += padded[:, child]
    return float(values[0]) if values.size else 0.0


class Table:
    """Addresses of all tensors and which tensor each block belongs to."""

    def __init__(self, params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor]):
        self.rows = rows = np.zeros((len(params), len(TENSOR)), np.int64)
        for place, tensors in ((TENSOR.param, params), (TENSOR.avg, exp_avgs), (TENSOR.avg_sq, exp_avg_sqs)):
            rows[:, place] = list(map(Tensor.data_ptr, tensors))
        rows[:, TENSOR.size] = list(map(Tensor.numel, params))
        counts = -(-rows[:, TENSOR.size] // BLOCK_ELEMENTS)
        self.num_blocks = int(counts.sum())
        rows[:, TENSOR.first_block] = np.cumsum(counts) - counts
        self.block_tensor = np.repeat(np.arange(len(params), dtype=np.int64), counts)
        self.take(grads)

    def take(self, grads: list[Tensor]) -> None:
        """From now on the gradients are these."""
        self.rows[:, TENSOR.grad] = list(map(Tensor.data_ptr, grads))
        self.rows[:, TENSOR.grad_half] = list(map(is_half, grads))


def _num_blocks(elements: int) -> int:
    """Blocks of one tensor."""
    return -(-elements // BLOCK_ELEMENTS)


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers an update uses."""
    return at_most(planned, sum(_num_blocks(math.prod(shape)) for shape in shapes))


def statistics(grads: list[Tensor]) -> Tensor:
    """float32 [norm, max |g|, count of non-finite]."""
    gradients = [dense(t) for t in grads]
    table = Table(gradients, gradients, gradients, gradients)
    squares, largest, nonfinite = (np.zeros(table.num_blocks) for _ in range(3))
    arguments = _arguments(
        tensors=table.rows.ctypes.data,
        block_tensor=table.block_tensor.ctypes.data,
        squares=squares.ctypes.data,
        largest=largest.ctypes.data,
        nonfinite=nonfinite.ctypes.data,
    )
    elements = sum(t.numel() for t in grads)
    _measure_kernel(table.num_blocks, num_workers("adamw", ((elements,),), torch.float32, update=False), arguments)
    found = math.sqrt(_tree_sum(squares)), float(largest.max(initial=0.0)), float(nonfinite.sum())
    return torch.tensor(found, dtype=torch.float32)


def step(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    learning_rate: float, beta1: float, beta2: float, eps: float, weight_decays: list[float], step: int,
    max_norm: float, skip_nonfinite: bool,
) -> Tensor:  # fmt: skip
    """Update all tensors in place; returns float32 [gradient norm before clipping, max |g|, count of non-finite]."""
    states = [[dense(t) for t in tensors] for tensors in (params, exp_avgs, exp_avg_sqs)]
    gradients = [dense(t) for t in grads]
    places = Places(states[0], gradients, states[1], states[2], weight_decays)
    stats = apply(params, places, learning_rate, beta1, beta2, eps, step, max_norm, skip_nonfinite)
    for originals, updated in zip((params, exp_avgs, exp_avg_sqs), states):
        for original, copied in zip(originals, updated):
            if original is not copied:
                original.detach().copy_(copied)
    return stats


class Places:
    """Where contiguous tensors lie that are updated together, and room for their measurements. It holds addresses only: whoever uses it again makes
    sure that the tensors are still there."""

    def __init__(
        self, params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], weight_decays: list[float]
    ) -> None:  # fmt: skip
        self.table = Table(params, grads, exp_avgs, exp_avg_sqs)
        self.weight_decays, self.decays = np.array(weight_decays, np.float64), np.empty(len(params), np.float32)
        self.squares, self.largest, self.nonfinite = (np.zeros(self.table.num_blocks) for _ in range(3))
        self.arguments = _arguments(
            tensors=self.table.rows.ctypes.data,
            block_tensor=self.table.block_tensor.ctypes.data,
            squares=self.squares.ctypes.data,
            largest=self.largest.ctypes.data,
            nonfinite=self.nonfinite.ctypes.data,
            decays=self.decays.ctypes.data,
        )
        self.workers = num_workers("adamw", ((sum(param.numel() for param in params),),), torch.float32)


def apply(
    params: list[Tensor], places: Places, learning_rate: float, beta1: float, beta2: float, eps: float, step: int, max_norm: float,
    skip_nonfinite: bool, clip: float | None = None,
) -> Tensor:  # fmt: skip
    """`step` of tensors that lie at `places`. clip: the factor of their gradients, where these are measured already; the result is zeros then."""
    blocks, arguments = places.table.num_blocks, places.arguments
    places.decays[...] = 1.0 - learning_rate * places.weight_decays
    stats = torch.zeros(3)
    if clip is None:
        _measure_kernel(blocks, places.workers, arguments)
        norm = math.sqrt(_tree_sum(places.squares))
        num_nonfinite = int(places.nonfinite.sum())  # whole numbers: exact in any order
        stats = torch.tensor([norm, float(places.largest.max(initial=0.0)), float(num_nonfinite)], dtype=torch.float32)
        if skip_nonfinite and num_nonfinite:
            return stats
        clip = 1.0
        if max_norm > 0:  # the formula of torch.nn.utils.clip_grad_norm_
            clip = max_norm / (norm + 1e-6)
            clip = 1.0 if clip > 1.0 else clip
    correction1, root_correction2 = 1.0 - beta1**step, math.sqrt(1.0 - beta2**step)
    options = _options(clip=clip, step_size=learning_rate / correction1, beta1=beta1, beta2=beta2, eps=eps, root_correction2=root_correction2)
    _update_kernel(blocks, places.workers, arguments, options)
    return stats
