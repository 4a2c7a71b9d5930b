"""Lion's and schedule-free AdamW's updates on the GPU: kernels that stand in the place of AdamW's in a `Fused`, which has measured the gradients.

Each is one launch over blocks of all tensors together, by the numbers that lie on the device; a step that is left out changes nothing.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllm.kernels.triton.adamw import (
    AVG,
    AVG_SQ,
    DECAY,
    DIRECT,
    EPSILON,
    GRAD_SCALE,
    KEEP1,
    KEEP2,
    PARAM,
    RATE,
    ROOT,
    SHARE,
    SKIP,
    Fused,
    at_address,
    find_block,
    load_float32,
    load_grad,
    update_kernel,
)
from cllm.kernels.triton.adamw_table import HYPER
from cllm.kernels.triton.launch import Calls
from cllm.runtime.gpu import GPU


@triton.jit
def lion_tile(row, grad, kind, at, inside, scale, beta1, rest1, beta2, rest2, rate, keep, ALIGNED: tl.constexpr):
    param, momentum = tl.load(row + PARAM), tl.load(row + AVG)
    g, m = load_grad(grad, kind, at, inside, ALIGNED) * scale, load_float32(momentum, at, inside, tl.float32, ALIGNED)
    mixed = tl.fma(g, rest1, m * beta1)
    sign = (mixed > 0).to(tl.float32) - (mixed < 0).to(tl.float32)
    p = tl.fma(sign, -rate, load_float32(param, at, inside, tl.float32, ALIGNED) * keep)
    tl.store(at_address(param, tl.float32, ALIGNED) + at, p, mask=inside)
    tl.store(at_address(momentum, tl.float32, ALIGNED) + at, tl.fma(g, rest2, m * beta2), mask=inside)


@triton.jit
def lion_kernel(table_ptr, grads_ptr, block_tensor_ptr, coefficients_ptr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """A block of c = beta1 m + (1 - beta1) g, of w = keep w - learning_rate sign(c) and of m = beta2 m + (1 - beta2) g."""
    tensor, row, start, count = find_block(table_ptr, block_tensor_ptr, BLOCK)
    if (tl.load(coefficients_ptr + SKIP) == 0.0) & (tl.load(row + PARAM) != 0):
        grad, kind = tl.load(grads_ptr + 2 * tensor), tl.load(grads_ptr + 2 * tensor + 1)
        wide1, wide2, wide = tl.load(coefficients_ptr + KEEP1), tl.load(coefficients_ptr + KEEP2), tl.load(coefficients_ptr + RATE)
        decay = tl.load(row + DECAY).to(tl.float64, bitcast=True)
        beta1, rest1, beta2, rest2 = wide1.to(tl.float32), (1.0 - wide1).to(tl.float32), wide2.to(tl.float32), (1.0 - wide2).to(tl.float32)
        scale, rate, keep = tl.load(coefficients_ptr + GRAD_SCALE).to(tl.float32), wide.to(tl.float32), (1.0 - wide * decay).to(tl.float32)
        lane = tl.arange(0, TILE)
        whole = count // TILE * TILE
        for first in range(0, whole, TILE):
            lion_tile(row, grad, kind, start + first + lane, None, scale, beta1, rest1, beta2, rest2, rate, keep, ALIGNED)
        if whole < count:
            lion_tile(row, grad, kind, start + whole + lane, whole + lane < count, scale, beta1, rest1, beta2, rest2, rate, keep, ALIGNED)


@triton.jit
def schedule_free_tile(row, grad, kind, at, inside, scale, beta2, rest2, root, eps, decay, share, direct, rate, ALIGNED: tl.constexpr):
    y_at, z_at, v_at = tl.load(row + PARAM), tl.load(row + AVG), tl.load(row + AVG_SQ)
    g = load_grad(grad, kind, at, inside, ALIGNED) * scale
    v = tl.fma(g * g, rest2, load_float32(v_at, at, inside, tl.float32, ALIGNED) * beta2)
    tl.store(at_address(v_at, tl.float32, ALIGNED) + at, v, mask=inside)
    y, z = load_float32(y_at, at, inside, tl.float32, ALIGNED), load_float32(z_at, at, inside, tl.float32, ALIGNED)
    direction = tl.fma(y, decay, tl.div_rn(g, tl.fma(tl.sqrt_rn(v), root, eps)))
    tl.store(at_address(y_at, tl.float32, ALIGNED) + at, tl.fma(direction, direct, tl.fma(z - y, share, y)), mask=inside)
    tl.store(at_address(z_at, tl.float32, ALIGNED) + at, tl.fma(direction, -rate, z), mask=inside)


@triton.jit
def schedule_free_kernel(table_ptr, grads_ptr, block_tensor_ptr, coefficients_ptr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """A block of y, z and v: the lines of `step` in `cllm/train/optimizers/schedule_free.py`."""
    tensor, row, start, count = find_block(table_ptr, block_tensor_ptr, BLOCK)
    if (tl.load(coefficients_ptr + SKIP) == 0.0) & (tl.load(row + PARAM) != 0):
        grad, kind = tl.load(grads_ptr + 2 * tensor), tl.load(grads_ptr + 2 * tensor + 1)
        scale, rate = tl.load(coefficients_ptr + GRAD_SCALE).to(tl.float32), tl.load(coefficients_ptr + RATE).to(tl.float32)
        wide2, decay = tl.load(coefficients_ptr + KEEP2), tl.load(row + DECAY).to(tl.float64, bitcast=True).to(tl.float32)
        beta2, rest2 = wide2.to(tl.float32), (1.0 - wide2).to(tl.float32)
        root, eps = tl.load(coefficients_ptr + ROOT).to(tl.float32), tl.load(coefficients_ptr + EPSILON).to(tl.float32)
        share, direct = tl.load(coefficients_ptr + SHARE).to(tl.float32), tl.load(coefficients_ptr + DIRECT).to(tl.float32)
        lane = tl.arange(0, TILE)
        whole = count // TILE * TILE
        for first in range(0, whole, TILE):
            at = start + first + lane
            schedule_free_tile(row, grad, kind, at, None, scale, beta2, rest2, root, eps, decay, share, direct, rate, ALIGNED)
        if whole < count:
            at, inside = start + whole + lane, whole + lane < count
            schedule_free_tile(row, grad, kind, at, inside, scale, beta2, rest2, root, eps, decay, share, direct, rate, ALIGNED)


KERNELS = {"adamw": update_kernel, "lion": lion_kernel, "schedule_free": schedule_free_kernel}


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    tensors = [empty(1000, 64), empty(64)]
    unaligned = [empty(each.numel() + 1)[1:].view(each.shape) for each in tensors]
    for name in ("lion", "schedule_free"):
        for what, params in ((name, tensors), (f"{name}, unaligned", unaligned)):
            fused = Fused(params, tensors, tensors, [0.1, 0.0], kernel=KERNELS[name])
            yield what, partial(fused.step, [torch.empty_like(each, dtype=dtype) for each in tensors], empty(len(HYPER)), empty(3))
