"""Lion (Chen et al. 2023, arXiv 2302.06675) on the CPU: one launch over blocks of all tensors together.

Every operation is one that `cllm.train.optimizers.lion` has, in its order, and is rounded by itself: the bits are the same.
"""

from typing import NamedTuple

import numpy as np

from cllm.kernels.numba.adamw import AHEAD, BLOCK_ELEMENTS, TENSOR, P, Places
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.launch import Kernel, float32_at, int64_at, load, store
from cllm.kernels.numba.micro import prefetch_l1
from cllm.kernels.numba.simd import W, vadd, vgt, vlt, vmul, vselect, vset, vsub, vzero


class _Options(NamedTuple):
    clip: float
    learning_rate: float
    beta1: float
    beta2: float


F, _options = fields(_Options)

_ONE = np.float32(1.0)


def _update(p, f, task, worker):
    """A block of c = beta1 m + (1 - beta1) g, of w = keep w - learning_rate sign(c) and of m = beta2 m + (1 - beta2) g."""
    tensor = int64_at(p[P.block_tensor], task)
    row = p[P.tensors] + tensor * len(TENSOR) * 8
    weight, grad, momentum, half = (
        int64_at(row, TENSOR.param), int64_at(row, TENSOR.grad), int64_at(row, TENSOR.avg), int64_at(row, TENSOR.grad_half),
    )  # fmt: skip
    start = (task - int64_at(row, TENSOR.first_block)) * BLOCK_ELEMENTS
    end = min(start + BLOCK_ELEMENTS, int64_at(row, TENSOR.size))
    clip, rate, keep = vset(np.float32(f[F.clip])), vset(np.float32(f[F.learning_rate])), vset(float32_at(p[P.decays], tensor))
    beta1, rest1 = vset(np.float32(f[F.beta1])), vset(np.float32(1.0 - f[F.beta1]))
    beta2, rest2 = vset(np.float32(f[F.beta2])), vset(np.float32(1.0 - f[F.beta2]))
    one, zero = vset(_ONE), vzero()
    for c in range(start, end, W):
        n = end - c
        for address in (weight, momentum):
            prefetch_l1(address + (c + AHEAD) * 4)
        prefetch_l1(grad + (c + AHEAD) * (2 if half else 4))
        g, m = vmul(load(grad, half, c, n), clip), load(momentum, False, c, n)
        mixed = vadd(vmul(m, beta1), vmul(g, rest1))
        sign = vsub(vselect(vgt(mixed, zero), one, zero), vselect(vlt(mixed, zero), one, zero))
        store(weight, False, c, vsub(vmul(load(weight, False, c, n), keep), vmul(sign, rate)), n)
        store(momentum, False, c, vadd(vmul(m, beta2), vmul(g, rest2)), n)


_update_kernel = Kernel(_update)


def apply(places: Places, learning_rate: float, clip: float, betas: tuple[float, float]) -> None:
    """One update of parameters and momenta that lie at `places`, from gradients that are multiplied by `clip`."""
    beta1, beta2 = betas
    places.decays[...] = 1.0 - learning_rate * places.weight_decays
    options = _options(clip=clip, learning_rate=learning_rate, beta1=beta1, beta2=beta2)
    _update_kernel(places.table.num_blocks, places.workers, places.arguments, options)
