"""How an operation becomes an operator of torch: a `torch.library` operator in the namespace `cllm`.

It has a fake implementation (the shapes that a compiler needs) and, where it is differentiable, a formula for its gradient, which is an operator
of its own and runs under the settings that the forward pass had. Its implementation asks `_register.backend` for the module that serves the call.

`torch.library.custom_op` would do the same, but its first call imports the whole of `torch._dynamo`, for more than a second: a quarter of the time
that a short command takes.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import cllm.runtime as runtime

_LIBRARY = torch.library.Library("cllm", "FRAGMENT")  # the operators exist as long as this does


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
        mutated = [place for place, parameter in enumerate(inspect.signature(function).parameters) if parameter in mutates_args]
        untraced = torch._disable_dynamo(function)

        def implementation(*args: Any) -> Any:
            # Where nothing has loaded the compiler there is nothing that could trace the implementation, and no reason to load it.
            result = (untraced if "torch._dynamo" in sys.modules else function)(*args)
            for place in mutated:
                increment_version(args[place])
            return result

        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=mutates_args), tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"cllm::{name}", fake, lib=_LIBRARY)
        if backward is not None and setup_context is not None:
            setup = _setup(setup_context, backward)
            torch.library.register_autograd(f"cllm::{name}", _backward_as_forward, setup_context=setup, lib=_LIBRARY)
        operator = getattr(torch.ops.cllm, name).default
        operator.made_of = function  # for who records an operator by what is in it
        if mutates_args:  # the dispatcher has to see what an operator changes
            return operator

        def call(*args: Any) -> Any:
            return operator(*args) if is_observed(args) else function(*args)

        return call

    return make


def _setup(setup_context: Callable[..., None], backward: Callable[..., Any]) -> Callable[..., None]:
    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs, output)
        ctx.backward_under_these_settings = runtime.carried(backward)

    return setup


def _backward_as_forward(ctx: Any, *gradients: Tensor | None) -> Any:
    return ctx.backward_under_these_settings(ctx, *gradients)


_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_PLAIN_TYPES = _TENSORS | {type(None), bool, int, float, str, torch.dtype}


def is_observed(args: tuple[Any, ...] = ()) -> bool:
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
