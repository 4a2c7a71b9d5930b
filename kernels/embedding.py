"""Embedding look-up with a gradient that is added up in a fixed order. V rows, E columns."""

from typing import Any

import torch
from torch import Tensor

import cllm.runtime as runtime
from cllm.kernels._checks import check_integer_range
from cllm.kernels._operator import operation
from cllm.kernels._register import backend
from cllm.runtime.errors import UserError


def embedding(tokens: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of weight (V, E) for tokens (...), int64 or int32 -> (..., E) in `dtype`, by default the weight's.

    The gradient of the weight has its dtype; rows of one token are added in the order of the tokens.
    Raises UserError for a wrong dtype or shape, or a token outside [0, V).
    """
    if tokens.dtype not in (torch.int64, torch.int32) or weight.dim() != 2 or not weight.is_floating_point():
        raise UserError(
            f"embedding: expected integer tokens and a floating-point weight (V, E), "
            f"got tokens {tokens.dtype} and weight {weight.dtype} {tuple(weight.shape)}."
        )
    return _embedding(tokens, weight, weight.dtype if dtype is None else dtype)


def tied_embedding(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(`embedding`, the weight again) for a weight that is the output projection as well: what is returned must go into one
    `linear_cross_entropy` and nowhere else.

    On a CPU the gradient of that projection takes in the gradients of the rows that were looked up, in place. Autograd would make a second
    matrix (V, E) of zeros and a few rows, and add the two.
    """
    eager = not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None and type(weight.detach()) is Tensor
    if not eager or weight.device.type != "cpu" or not torch.is_grad_enabled() or not weight.requires_grad:
        return embedding(tokens, weight, dtype), weight
    found: tuple[Tensor, Tensor] = _Tied.apply(tokens, weight, dtype)
    return found


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.num_rows, ctx.weight_dtype = weight.shape[0], weight.dtype
        ctx.save_for_backward(tokens)
        ctx.set_materialize_grads(False)
        ctx.sum_gradients = runtime.carried(_sum_gradients)
        return embedding(tokens, weight, dtype), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dweight: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, dweight, None
        return None, ctx.sum_gradients(dy, dweight, *ctx.saved_tensors, ctx.num_rows, ctx.weight_dtype), None


def _sum_gradients(dy: Tensor, dweight: Tensor | None, tokens: Tensor, num_rows: int, weight_dtype: torch.dtype) -> Tensor:
    """The gradient of the look-up, from dy (..., E), added to that of the projection (V, E) where there is one: in place if possible."""
    serving = _serving((num_rows, dy.shape[-1]), tokens, weight_dtype, dy.dtype)
    add_rows = getattr(serving, "add_rows", None)  # Triton's kernels, interpreted, have none
    if dweight is None or torch.is_grad_enabled() or not dweight.is_contiguous() or add_rows is None:
        dense = _embedding_backward(dy, tokens, num_rows, weight_dtype)
        return dense if dweight is None else dense + dweight
    add_rows(dy.contiguous(), tokens.long(), dweight)
    return dweight


def _serving(weight_shape: tuple[int, int], tokens: Tensor, weight_dtype: torch.dtype, dtype: torch.dtype) -> Any:
    # Rows are stored and returned in two dtypes: a backend must know both, and is asked for the less common one.
    asked = dtype if weight_dtype in (torch.float32, torch.bfloat16) else weight_dtype
    return backend("embedding", (tokens.shape, weight_shape), asked, tokens.device.type)


def _backward_fake(dy: Tensor, tokens: Tensor, num_rows: int, weight_dtype: torch.dtype) -> Tensor:
    return dy.new_empty((num_rows, dy.shape[-1]), dtype=weight_dtype)


@operation("embedding_backward", _backward_fake)
def _embedding_backward(dy: Tensor, tokens: Tensor, num_rows: int, weight_dtype: torch.dtype) -> Tensor:
    serving = _serving((num_rows, dy.shape[-1]), tokens, weight_dtype, dy.dtype)
    return serving.backward(dy.contiguous(), tokens.long(), num_rows, weight_dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, _ = inputs
    ctx.num_rows, ctx.weight_dtype = weight.shape[0], weight.dtype
    ctx.save_for_backward(tokens)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    (tokens,) = ctx.saved_tensors
    return None, _embedding_backward(dy, tokens, ctx.num_rows, ctx.weight_dtype), None


@operation(
    "embedding",
    lambda tokens, weight, dtype: weight.new_empty((*tokens.shape, weight.shape[1]), dtype=dtype),
    setup_context=_save,
    backward=_backward,
)
def _embedding(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    check_integer_range("embedding", "tokens", tokens, weight.shape[0])
    return _serving((weight.shape[0], weight.shape[1]), tokens, weight.dtype, dtype).forward(tokens.long(), weight, dtype)
