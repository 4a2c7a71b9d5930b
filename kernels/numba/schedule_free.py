"""Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682) on the CPU: one launch over blocks of all tensors together.

Every operation is one that `cllm.train.optimizers.schedule_free` has, in its order, and is rounded by itself: the bits are the same.
"""

from typing import NamedTuple

import numpy as np

from cllm.kernels.numba.adamw import AHEAD, BLOCK_ELEMENTS, TENSOR, P, Places
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.launch import Kernel, float32_at, int64_at, load, store
from cllm.kernels.numba.micro import prefetch_l1
from cllm.kernels.numba.simd import W, vadd, vdiv, vmul, vset, vsqrt, vsub


class _Options(NamedTuple):
    clip: float
    learning_rate: float
    beta2: float
    eps: float
    root: float  # sqrt(1 - beta2^t)
    share: float  # of y that becomes z
    direct: float  # what the direction is multiplied with before it is added to y


F, _options = fields(_Options)


def _update(p, f, task, worker):
    """A block of y, z and v: the lines of the optimizer's `step`."""
    tensor = int64_at(p[P.block_tensor], task)
    row = p[P.tensors] + tensor * len(TENSOR) * 8
    y_at, z_at, v_at = int64_at(row, TENSOR.param), int64_at(row, TENSOR.avg), int64_at(row, TENSOR.avg_sq)
    grad, half = int64_at(row, TENSOR.grad), int64_at(row, TENSOR.grad_half)
    start = (task - int64_at(row, TENSOR.first_block)) * BLOCK_ELEMENTS
    end = min(start + BLOCK_ELEMENTS, int64_at(row, TENSOR.size))
    clip, rate, eps, root = (
        vset(np.float32(f[F.clip])), vset(np.float32(f[F.learning_rate])), vset(np.float32(f[F.eps])), vset(np.float32(f[F.root])),
    )  # fmt: skip
    beta2, rest2 = vset(np.float32(f[F.beta2])), vset(np.float32(1.0 - f[F.beta2]))
    share, direct = vset(np.float32(f[F.share])), vset(np.float32(f[F.direct]))
    weight_decay = float32_at(p[P.decays], tensor)
    decayed, decay = weight_decay != 0.0, vset(weight_decay)
    for c in range(start, end, W):
        n = end - c
        for address in (y_at, z_at, v_at):
            prefetch_l1(address + (c + AHEAD) * 4)
        prefetch_l1(grad + (c + AHEAD) * (2 if half else 4))
        g = vmul(load(grad, half, c, n), clip)
        y, z = load(y_at, False, c, n), load(z_at, False, c, n)
        v = vadd(vmul(load(v_at, False, c, n), beta2), vmul(vmul(g, g), rest2))
        direction = vdiv(g, vadd(vdiv(vsqrt(v), root), eps))
        if decayed:
            direction = vadd(direction, vmul(y, decay))
        store(v_at, False, c, v, n)
        store(y_at, False, c, vadd(vadd(y, vmul(vsub(z, y), share)), vmul(direction, direct)), n)
        store(z_at, False, c, vsub(z, vmul(direction, rate)), n)


_update_kernel = Kernel(_update)


def apply(places: Places, learning_rate: float, clip: float, beta2: float, eps: float, root: float, share: float, direct: float) -> None:
    """One update of y (the parameters), z and v that lie at `places`, from gradients that are multiplied by `clip`."""
    places.decays[...] = places.weight_decays
    options = _options(clip=clip, learning_rate=learning_rate, beta2=beta2, eps=eps, root=root, share=share, direct=direct)
    _update_kernel(places.table.num_blocks, places.workers, places.arguments, options)
