"""How an operation becomes an operator of torch: a `torch.library` custom operator in the namespace `cllm`.

It has a fake implementation (the shapes that a compiler needs) and, where it is differentiable, a formula for its gradient, which is an operator
of its own. Its implementation asks `_register.backend` for the module that serves the call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def operation(
    name: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    mutates_args: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: register a function as the operator `cllm::name` and return what calls it."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(f"cllm::{name}", function, mutates_args=mutates_args)
        op.register_fake(fake)
        if backward is not None:
            op.register_autograd(backward, setup_context=setup_context)
        operator = getattr(torch.ops.cllm, name).default
        if mutates_args:  # the dispatcher counts the versions of what an operator changes
            return operator

        def call(*args: Any) -> Any:
            return operator(*args) if _is_observed(args) else function(*args)

        return call

    return make


_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN_TYPES = _TENSORS | {type(None), bool, int, float, str, torch.dtype}


def _is_observed(args: tuple[Any, ...]) -> bool:
    """Whether anything but the implementation has to see this call: autograd, a compiler, a dispatch mode, a transform, a profiler, a tensor
    subclass.

    In the backward pass and in generation nothing else does; going past the dispatcher then halves the cost of a small call.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch.autograd._profiler_enabled():  # which shows operators by their names
        return True
    differentiated = torch.is_grad_enabled()
    for arg in args:
        kind = type(arg)
        if kind not in _PLAIN_TYPES or (kind in _TENSORS and (arg.is_meta or (differentiated and arg.requires_grad))):
            return True
    return False


def tensor_or_empty(value: Tensor | None, like: Tensor) -> Tensor:
    """An operator cannot return None: an absent result is an empty tensor."""
    return like.new_empty(0) if value is None else value


def like_weight(gradient: Tensor, weight: Tensor | None) -> Tensor:
    """The gradient in the memory layout of its weight, which autograd would otherwise copy it to, slowly, at every step."""
    if weight is None or gradient.stride() == (layout := torch.empty_like(weight, device="meta")).stride():
        return gradient
    return torch.empty_strided(layout.shape, layout.stride(), dtype=gradient.dtype, device=gradient.device).copy_(gradient)


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of per-row statistics such as log-sum-exp: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
