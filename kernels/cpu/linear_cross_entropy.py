"""Cross entropy of x @ weight.T on the CPU, in row blocks: all logits never exist at once.

N rows, E embed, V vocabulary. The logits of a block are float32; their gradient replaces them in place, in the compute
dtype. Statistics of a row are made by one worker in a fixed order, so no bit depends on the number of workers.
"""

import math

import numba
import numpy as np
import torch

from cllm.kernels.cpu._arrays import as_flat
from cllm.kernels.cpu.gemm import Packed, gemm, workers_for
from cllm.kernels.cpu.simd import (
    W,
    vadd,
    vexp,
    vfma,
    vhmax,
    vhsum,
    vlanes_below,
    vload_masked,
    vmax,
    vmul,
    vneg,
    vselect,
    vset,
    vstore_bf16_masked,
    vstore_masked,
    vsub,
    vtanh,
    vzero,
)
from cllm.runtime import threads

_LOGIT_BYTES = 64 << 20
_MOST_ROWS = 4096
_LOWEST = np.float32(-np.inf)


@numba.njit(cache=True, nogil=True)
def _cap(row, size, softcap):
    """z = softcap * tanh(logits / softcap), in place."""
    inverse, cap = vset(np.float32(1.0 / softcap)), vset(np.float32(softcap))
    for i in range(0, size, W):
        vstore_masked(row, i, vmul(cap, vtanh(vmul(vload_masked(row, i, size - i), inverse))), size - i)


@numba.njit(cache=True, nogil=True)
def _row_statistics(row, size):
    """(max, log-sum-exp, sum) of one row of z, in float64."""
    high, total = vset(_LOWEST), vzero()
    for i in range(0, size, W):
        z = vload_masked(row, i, size - i)
        total = vadd(total, z)
        high = vmax(high, vselect(vlanes_below(size - i), z, high))
    top = vhmax(high)
    base = top if abs(top) < np.inf else np.float32(0.0)
    shift, acc = vset(base), vzero()
    for i in range(0, size, W):
        e = vexp(vsub(vload_masked(row, i, size - i), shift))
        acc = vadd(acc, vselect(vlanes_below(size - i), e, vzero()))
    mass = np.float64(vhsum(acc))
    return top, np.float64(base) + (math.log(mass) if mass > 0.0 else (-np.inf if mass == 0.0 else np.nan)), vhsum(total)


@numba.njit(cache=True, nogil=True)
def _row_gradient(row, size, half, target, lse, upstream, label_smoothing, z_loss, softcap):
    """Replace z by upstream * d(loss)/d(logits). bfloat16 results fill the first half of the row, behind the reading."""
    shift = vset(np.float32(lse))
    scale = np.float32(upstream)
    weight = vset(np.float32(1.0 + 2.0 * z_loss * lse))
    uniform = vset(np.float32(-label_smoothing / size))
    inverse = np.float32(1.0 / softcap) if softcap > 0.0 else np.float32(0.0)
    one, shrink, last = vset(np.float32(1.0)), vset(inverse), vset(scale)
    hit = np.float32(label_smoothing - 1.0)
    for i in range(0, size, W):
        z = vload_masked(row, i, size - i)
        dz = vfma(vexp(vsub(z, shift)), weight, uniform)
        if i <= target < i + W:
            inside = vlanes_below(target - i + 1)
            before = vlanes_below(target - i)
            dz = vselect(before, dz, vselect(inside, vadd(dz, vset(hit)), dz))
        if softcap > 0.0:
            part = vmul(z, shrink)
            dz = vmul(dz, vfma(vneg(part), part, one))
        dz = vmul(dz, last)
        if half:
            vstore_bf16_masked(row, i, dz, size - i)
        else:
            vstore_masked(row, i, dz, size - i)


@numba.njit(cache=True, nogil=True)
def _clear(row, size, half):
    for i in range(0, size, W):
        if half:
            vstore_bf16_masked(row, i, vzero(), size - i)
        else:
            vstore_masked(row, i, vzero(), size - i)


@numba.njit(cache=True, nogil=True)
def _first_maximum(z, target):
    """Whether z[target] is the first of the largest values of the row, given that it is one of the largest."""
    i = 0
    while z[i] != z[target]:
        i += 1
    return i == target


@numba.njit(cache=True, nogil=True, parallel=True)
def _rows(logits, size, targets, upstream, ignore_index, label_smoothing, z_loss, softcap, statistics, gradient, half,
          losses, plain, correct, lses, workers):  # fmt: skip
    """Each row of the block: cap, statistics (losses, plain, correct, lses are written), gradient in place."""
    count = targets.size
    for worker in numba.prange(workers):
        for r in range(worker, count, workers):
            z = logits[r * size : (r + 1) * size]
            row = z.ctypes.data
            target = targets[r]
            valid = target != ignore_index
            if softcap > 0.0:
                _cap(row, size, softcap)
            if statistics:
                top, lse, total = _row_statistics(row, size)
                lses[r] = lse
                plain[r], losses[r], correct[r] = 0.0, 0.0, False
                if valid:
                    at_target = np.float64(z[target])
                    loss = lse - at_target
                    plain[r] = loss
                    loss = (1.0 - label_smoothing) * loss + label_smoothing * (lse - np.float64(total) / size)
                    losses[r] = loss + z_loss * lse * lse
                    correct[r] = lse == lse and z[target] == top and _first_maximum(z, target)
            if gradient:
                if valid:
                    _row_gradient(row, size, half, target, np.float64(lses[r]), np.float64(upstream[r]),
                                  label_smoothing, z_loss, softcap)  # fmt: skip
                else:
                    _clear(row, size, half)


def _row_blocks(rows: int, vocabulary: int) -> list[slice]:
    # From the shape alone: the gradient of the weight is a sum over these blocks, in this order.
    step = max(16, min(_MOST_ROWS, _LOGIT_BYTES // (4 * max(1, vocabulary)) // 16 * 16))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class _Pass:
    """One walk over the row blocks: logits, statistics, and gradients where asked for."""

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
        options: tuple[int, float, float, float], gradient: bool,
    ):  # fmt: skip
        self.x, self.weight, self.targets, self.options, self.gradient = x, weight, targets.contiguous(), options, gradient
        work = (6.0 if gradient else 2.0) * x.shape[0] * weight.numel()
        self.workers = workers_for("linear_cross_entropy", (tuple(x.shape), tuple(weight.shape)), x.dtype, work)
        self.blocks = _row_blocks(x.shape[0], weight.shape[0])
        rows = x.shape[0]
        self.losses, self.plain, self.lse = (torch.empty(rows, dtype=torch.float32) for _ in range(3))
        self.correct = torch.empty(rows, dtype=torch.bool)
        if gradient:
            self.dx = torch.empty(x.shape, dtype=x.dtype)
            self.dweight = torch.empty(weight.shape, dtype=torch.float32)
            if not self.blocks:
                self.dweight.zero_()

    def run(self, statistics: bool, upstream: torch.Tensor) -> None:
        """upstream (N,): the gradient of each row's loss."""
        x, vocabulary, half = self.x, self.weight.shape[0], self.x.dtype == torch.bfloat16
        several = len(self.blocks) > 1
        right = Packed(self.weight.t(), x.dtype, self.workers) if several else self.weight.t()
        back = Packed(self.weight, x.dtype, self.workers) if several and self.gradient else self.weight
        longest = self.blocks[0].stop if self.blocks else 0
        memory = torch.empty(longest * vocabulary, dtype=torch.float32)
        for index, block in enumerate(self.blocks):
            part = x[block]
            flat = memory[: part.shape[0] * vocabulary]
            logits = gemm(part, right, out=flat.view(-1, vocabulary), compute=x.dtype, workers=self.workers)
            workers = max(1, min(self.workers, part.shape[0]))
            threads.numba_workers(workers)
            _rows(
                as_flat(flat), vocabulary, as_flat(self.targets[block]), as_flat(upstream[block]), *self.options,
                statistics, self.gradient, half, as_flat(self.losses[block]), as_flat(self.plain[block]),
                as_flat(self.correct[block]), as_flat(self.lse[block]), workers,
            )  # fmt: skip
            if self.gradient:
                dlogits = flat.view(torch.bfloat16).view(-1, 2 * vocabulary)[:, :vocabulary] if half else logits
                gemm(dlogits, back, out=self.dx[block], compute=x.dtype, workers=self.workers)
                total = self.dweight
                gemm(dlogits.t(), part, out=total, add=total if index else None, compute=x.dtype, workers=self.workers)

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.losses, self.plain, self.correct, self.lse

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
