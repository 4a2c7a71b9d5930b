"""A kernel of one's own: y = max(x, 0) ** 2, with its gradient, on every core, from a script outside of CLLM.

    from squared_relu import squared_relu
    y = squared_relu(x)                 # x of any shape, float32 or bfloat16, on the CPU

Read from the top: what one task computes, how a launch is cut into tasks, and how the result becomes an operator of PyTorch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cllm import runtime
from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.launch import Kernel, is_half, load, store
from cllm.kernels.numba.simd import W, vadd, vmax, vmul, vzero

ELEMENTS_PER_TASK = 4096  # decided by the shape alone, never by the number of workers: the bits are then the same for any number


class Arguments(NamedTuple):
    """The table of integers that a launch hands to its tasks."""

    x: int  # addresses
    dy: int
    out: int
    half: int  # whether the elements are bfloat16
    size: int  # how many elements
    item: int  # bytes of an element


P, arguments = fields(Arguments)


def _forward(p, f, task, worker):
    """One task: W elements at a time, computed in float32 and rounded once."""
    first = task * ELEMENTS_PER_TASK
    count = min(ELEMENTS_PER_TASK, p[P.size] - first)
    x, out = p[P.x] + first * p[P.item], p[P.out] + first * p[P.item]
    for c in range(0, count, W):
        positive = vmax(load(x, p[P.half], c, count - c), vzero())
        store(out, p[P.half], c, vmul(positive, positive), count - c)


def _backward(p, f, task, worker):
    """dx = 2 max(x, 0) dy"""
    first = task * ELEMENTS_PER_TASK
    count = min(ELEMENTS_PER_TASK, p[P.size] - first)
    x, dy, out = p[P.x] + first * p[P.item], p[P.dy] + first * p[P.item], p[P.out] + first * p[P.item]
    for c in range(0, count, W):
        positive = vmax(load(x, p[P.half], c, count - c), vzero())
        store(out, p[P.half], c, vmul(vadd(positive, positive), load(dy, p[P.half], c, count - c)), count - c)


_forward_kernel, _backward_kernel = Kernel(_forward), Kernel(_backward)


def _launch(kernel: Kernel, x: Tensor, dy: Tensor) -> Tensor:
    x, dy = x.contiguous(), dy.contiguous()
    out = torch.empty_like(x)
    tasks = -(-x.numel() // ELEMENTS_PER_TASK)
    table = arguments(x=x.data_ptr(), dy=dy.data_ptr(), out=out.data_ptr(), half=is_half(x), size=x.numel(), item=x.element_size())
    kernel(tasks, runtime.settings().threads or runtime.threads.default_threads(), table)
    return out


@torch.library.custom_op("example::squared_relu", mutates_args=())
def squared_relu(x: Tensor) -> Tensor:
    """x of any shape -> max(x, 0) ** 2 of the same shape and dtype."""
    return _launch(_forward_kernel, x, x)


@torch.library.custom_op("example::squared_relu_backward", mutates_args=())
def squared_relu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return _launch(_backward_kernel, x, dy)


# What torch.compile sees: shapes and dtypes, without a computation.
squared_relu.register_fake(lambda x: torch.empty_like(x, memory_format=torch.contiguous_format))
squared_relu_backward.register_fake(lambda dy, x: torch.empty_like(x, memory_format=torch.contiguous_format))
squared_relu.register_autograd(
    lambda ctx, dy: squared_relu_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
