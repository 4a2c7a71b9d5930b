"""Cross entropy of x @ weight.T on the CPU, in row blocks: all logits never exist at once.

N rows, E embed, V vocabulary. The logits of a block are float32; their gradient replaces them in place, in the compute
dtype. Statistics of a row are made by one worker in a fixed order, so no bit depends on the number of workers.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch

from cllm.kernels.numba import gemm as product
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.gemm import Packed, gemm
from cllm.kernels.numba.launch import Kernel, at_most, float32_at, int64_at, jit, num_workers, put_float32, scratch
from cllm.kernels.numba.simd import (
    W,
    vadd,
    vexp_normal,
    vfma,
    vhmax,
    vhsum,
    vlanes_below,
    vload,
    vload_masked,
    vmax,
    vmul,
    vneg,
    vselect,
    vset,
    vstore,
    vstore_bf16,
    vstore_bf16_masked,
    vstore_masked,
    vsub,
    vtanh,
    vzero,
)
from cllm.kernels.operations import Shapes

_LOGIT_BYTES = 64 << 20
_MOST_ROWS = 4096
_ZERO, _ONE, _LOWEST = np.float32(0.0), np.float32(1.0), np.float32(-np.inf)


class _Arguments(NamedTuple):
    """Addresses of what the rows of a block read and write."""

    logits: int  # float32, contiguous
    columns: int
    targets: int  # int64
    ignore: int  # the target of rows that do not count
    upstream: int  # float32: the gradient of each row's loss
    statistics: int  # whether losses, plain, correct and lse are written; lse is read otherwise
    gradient: int  # whether gradients take the place of the logits
    half: int  # whether gradients are bfloat16: they fill the first half of a row
    losses: int  # float32, as the next three
    plain: int
    correct: int  # 1 or 0
    lse: int


class _Options(NamedTuple):
    smoothing: float
    z_loss: float
    softcap: float  # 0 where there is none


P, _arguments = fields(_Arguments)
F, _options = fields(_Options)


@jit
def _cap(row, size, softcap):
    """z = softcap * tanh(logits / softcap), in place."""
    inverse, cap = vset(np.float32(1.0 / softcap)), vset(np.float32(softcap))
    for i in range(0, size, W):
        vstore_masked(row, i, vmul(cap, vtanh(vmul(vload_masked(row, i, size - i), inverse))), size - i)


# Loops over a row run in four chains of vectors, so that no step waits for the last one; then the ragged end.


@jit
def _row_sum(row, size):
    t0, t1, t2, t3 = vzero(), vzero(), vzero(), vzero()
    whole = size - size % (4 * W)
    for i in range(0, whole, 4 * W):
        t0, t1 = vadd(t0, vload(row, i)), vadd(t1, vload(row, i + W))
        t2, t3 = vadd(t2, vload(row, i + 2 * W)), vadd(t3, vload(row, i + 3 * W))
    for i in range(whole, size, W):
        t0 = vadd(t0, vload_masked(row, i, size - i))
    return vhsum(vadd(vadd(t0, t1), vadd(t2, t3)))


@jit
def _row_statistics(row, size):
    """(max, log-sum-exp) of one row of z; the latter in float64."""
    lowest = vset(_LOWEST)
    m0, m1, m2, m3 = lowest, lowest, lowest, lowest
    whole = size - size % (4 * W)
    for i in range(0, whole, 4 * W):
        m0, m1 = vmax(vload(row, i), m0), vmax(vload(row, i + W), m1)  # drops NaN, which reaches the sum instead
        m2, m3 = vmax(vload(row, i + 2 * W), m2), vmax(vload(row, i + 3 * W), m3)
    for i in range(whole, size, W):
        m0 = vmax(vselect(vlanes_below(size - i), vload_masked(row, i, size - i), lowest), m0)
    top = vhmax(vmax(vmax(m0, m1), vmax(m2, m3)))
    base = top if abs(top) < np.inf else np.float32(0.0)
    shift = vset(base)
    t0, t1, t2, t3 = vzero(), vzero(), vzero(), vzero()
    for i in range(0, whole, 4 * W):
        t0, t1 = vadd(t0, vexp_normal(vsub(vload(row, i), shift))), vadd(t1, vexp_normal(vsub(vload(row, i + W), shift)))
        t2, t3 = vadd(t2, vexp_normal(vsub(vload(row, i + 2 * W), shift))), vadd(t3, vexp_normal(vsub(vload(row, i + 3 * W), shift)))
    for i in range(whole, size, W):
        e = vexp_normal(vsub(vload_masked(row, i, size - i), shift))
        t0 = vadd(t0, vselect(vlanes_below(size - i), e, vzero()))
    mass = np.float64(vhsum(vadd(vadd(t0, t1), vadd(t2, t3))))
    return top, np.float64(base) + (math.log(mass) if mass > 0.0 else (-np.inf if mass == 0.0 else np.nan))


@jit
def _gradient_at(z, shift, weight, uniform, shrink, capped, last):
    dz = vfma(vexp_normal(vsub(z, shift)), weight, uniform)
    if capped:
        part = vmul(z, shrink)
        dz = vmul(dz, vfma(vneg(part), part, vset(np.float32(1.0))))
    return vmul(dz, last)


@jit
def _row_gradient(row, size, half, target, lse, upstream, label_smoothing, z_loss, softcap):
    """Replace z by upstream * d(loss)/d(logits). bfloat16 results fill the first half of the row, behind the reading."""
    capped = softcap > 0.0
    inverse = np.float32(1.0 / softcap) if capped else np.float32(0.0)
    shift, shrink, last = vset(np.float32(lse)), vset(inverse), vset(np.float32(upstream))
    weight, uniform = vset(np.float32(1.0 + 2.0 * z_loss * lse)), vset(np.float32(-label_smoothing / size))
    # The target's own element also gets label_smoothing - 1; it is made before its logit is overwritten.
    block = target // W * W
    z = vload_masked(row, block, size - block)
    hit = vselect(vlanes_below(target - block + 1), vset(np.float32(label_smoothing - 1.0)), vzero())
    hit = vselect(vlanes_below(target - block), vzero(), hit)
    part = vmul(z, shrink)
    slope = vfma(vneg(part), part, vset(np.float32(1.0)))
    special = vmul(vmul(vadd(vfma(vexp_normal(vsub(z, shift)), weight, uniform), hit), slope), last)
    whole = size - size % W
    if half:
        for i in range(0, whole, W):
            vstore_bf16(row, i, _gradient_at(vload(row, i), shift, weight, uniform, shrink, capped, last))
    else:
        for i in range(0, whole, W):
            vstore(row, i, _gradient_at(vload(row, i), shift, weight, uniform, shrink, capped, last))
    if whole < size:
        dz = _gradient_at(vload_masked(row, whole, size - whole), shift, weight, uniform, shrink, capped, last)
        if half:
            vstore_bf16_masked(row, whole, dz, size - whole)
        else:
            vstore_masked(row, whole, dz, size - whole)
    if half:
        vstore_bf16_masked(row, block, special, size - block)
    else:
        vstore_masked(row, block, special, size - block)


@jit
def _clear(row, size, half):
    for i in range(0, size, W):
        if half:
            vstore_bf16_masked(row, i, vzero(), size - i)
        else:
            vstore_masked(row, i, vzero(), size - i)


@jit
def _is_first_of_the_largest(row, target):
    """Whether the target is the first of the largest values of the row, given that it is one of them."""
    i, largest = 0, float32_at(row, target)
    while float32_at(row, i) != largest:
        i += 1
    return i == target


def _row(p, f, task, worker):
    """One row of the block: softcap, statistics where they are asked for, and the gradient in the place of the logits."""
    size, target, smoothing, softcap = p[P.columns], int64_at(p[P.targets], task), f[F.smoothing], f[F.softcap]
    row, valid = p[P.logits] + task * size * 4, target != p[P.ignore]
    if softcap > 0.0:
        _cap(row, size, softcap)
    if p[P.statistics]:
        top, lse = _row_statistics(row, size)
        plain, loss, correct = 0.0, 0.0, False
        if valid:
            at_target = float32_at(row, target)
            plain = lse - np.float64(at_target)
            loss = plain
            if smoothing != 0.0:
                loss = (1.0 - smoothing) * loss + smoothing * (lse - np.float64(_row_sum(row, size)) / size)
            loss = loss + f[F.z_loss] * lse * lse
            correct = lse == lse and at_target == top and _is_first_of_the_largest(row, target)
        put_float32(p[P.lse], task, np.float32(lse))
        put_float32(p[P.plain], task, np.float32(plain))
        put_float32(p[P.losses], task, np.float32(loss))
        put_float32(p[P.correct], task, _ONE if correct else _ZERO)
    if p[P.gradient]:
        if valid:
            lse, upstream = np.float64(float32_at(p[P.lse], task)), np.float64(float32_at(p[P.upstream], task))
            _row_gradient(row, size, p[P.half] != 0, target, lse, upstream, smoothing, f[F.z_loss], softcap)
        else:
            _clear(row, size, p[P.half] != 0)


_kernel = Kernel(_row, uneven=True)


def _row_blocks(rows: int, vocabulary: int) -> list[slice]:
    # From the shape alone: the gradient of the weight is a sum over these blocks, in this order.
    step = max(16, min(_MOST_ROWS, _LOGIT_BYTES // (4 * max(1, vocabulary)) // 16 * 16))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, gradients: bool = False, **options: Any) -> int:
    """How many of the planned workers the forward pass uses, with the products of the gradients where these are made in it."""
    (*rows, embed), (vocabulary, _) = shapes
    blocks = _row_blocks(math.prod(rows), vocabulary)
    several = len(blocks) > 1
    most = at_most(planned, blocks[0].stop) if blocks else 1
    for block in blocks:
        length = block.stop - block.start
        products = [(length, embed, vocabulary, several)]
        if gradients:
            products += [(length, vocabulary, embed, several), (vocabulary, length, embed, False)]
        most = max(most, *(product.launched_workers(planned, m, k, n, dtype, packed) for m, k, n, packed in products))
    return most


class _Pass:
    """One walk over the row blocks: logits, statistics, and gradients where asked for."""

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
        options: tuple[int, float, float, float], gradient: bool,
    ):  # fmt: skip
        self.x, self.weight, self.targets, self.options, self.gradient = x, weight, targets.contiguous(), options, gradient
        self.workers = num_workers("linear_cross_entropy", (x.shape, weight.shape), x.dtype, gradients=gradient)
        self.blocks = _row_blocks(x.shape[0], weight.shape[0])
        rows = x.shape[0]
        self.losses, self.plain, self.correct, self.lse = (torch.empty(rows, dtype=torch.float32) for _ in range(4))
        if gradient:
            self.dx = torch.empty(x.shape, dtype=x.dtype)
            self.dweight = torch.empty(weight.shape, dtype=torch.float32)
            if not self.blocks:
                self.dweight.zero_()

    def run(self, statistics: bool, upstream: torch.Tensor) -> None:
        """upstream (N,): the gradient of each row's loss."""
        x, vocabulary, half = self.x, self.weight.shape[0], self.x.dtype == torch.bfloat16
        ignore_index, label_smoothing, z_loss, softcap = self.options
        several = len(self.blocks) > 1
        right = Packed(self.weight.t(), x.dtype, self.workers) if several else self.weight.t()
        back = Packed(self.weight, x.dtype, self.workers) if several and self.gradient else self.weight
        longest = self.blocks[0].stop if self.blocks else 0
        owner, _ = scratch("logits", longest * vocabulary * 4)  # kept: fresh memory would cost a page fault for every 4 KB
        memory = owner[: longest * vocabulary * 4].view(torch.float32)
        for index, block in enumerate(self.blocks):
            part = x[block]
            flat = memory[: part.shape[0] * vocabulary]
            logits = gemm(part, right, out=flat.view(-1, vocabulary), compute=x.dtype, workers=self.workers)
            arguments = _arguments(
                logits=flat.data_ptr(),
                columns=vocabulary,
                targets=self.targets.data_ptr() + 8 * block.start,
                ignore=ignore_index,
                upstream=upstream.data_ptr() + 4 * block.start,
                statistics=int(statistics),
                gradient=int(self.gradient),
                half=int(half),
                losses=self.losses.data_ptr() + 4 * block.start,
                plain=self.plain.data_ptr() + 4 * block.start,
                correct=self.correct.data_ptr() + 4 * block.start,
                lse=self.lse.data_ptr() + 4 * block.start,
            )
            _kernel(part.shape[0], self.workers, arguments, _options(smoothing=label_smoothing, z_loss=z_loss, softcap=softcap))
            if self.gradient:
                dlogits = flat.view(torch.bfloat16).view(-1, 2 * vocabulary)[:, :vocabulary] if half else logits
                gemm(dlogits, back, out=self.dx[block], compute=x.dtype, workers=self.workers)
                total = self.dweight
                gemm(dlogits.t(), part, out=total, add=total if index else None, compute=x.dtype, workers=self.workers)

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.losses, self.plain, self.correct.bool(), self.lse

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.dx, self.dweight.to(self.weight.dtype)


def forward(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(total loss, plain cross entropy, correct, log-sum-exp), each (N,)."""
    walk = _Pass(x, weight, targets, (ignore_index, float(label_smoothing), float(z_loss), float(softcap)), False)
    walk.run(True, walk.lse)
    return walk.statistics()


def forward_with_grads(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """As `forward`, and the gradients of scale * sum(total loss) with respect to x and weight from the same logits."""
    walk = _Pass(x, weight, targets, (ignore_index, float(label_smoothing), float(z_loss), float(softcap)), True)
    walk.run(True, torch.full((x.shape[0],), scale, dtype=torch.float32))
    return *walk.statistics(), *walk.gradients()


def backward(
    dlosses: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x and weight, given the gradient of each row's total loss; the logits are made again."""
    walk = _Pass(x, weight, targets, (ignore_index, float(label_smoothing), float(z_loss), float(softcap)), True)
    walk.lse = lse.to(torch.float32).contiguous()
    walk.run(False, dlosses.to(torch.float32).contiguous())
    return walk.gradients()
