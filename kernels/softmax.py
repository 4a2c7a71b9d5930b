"""Softmax over one dimension."""

from typing import Any

from torch import Tensor

from cllm.kernels._checks import check_floating
from cllm.kernels._operator import operation
from cllm.kernels._register import backend
from cllm.runtime.errors import UserError


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)) along `dim`, any shape and strides, in x's dtype; a row of only -inf gives NaN, as in torch.

    Raises UserError for a dimension that x does not have, or a dtype that is not floating point.
    """
    check_floating("softmax", x=x)
    if x.dim() == 0 and dim in (-1, 0):
        return _softmax(x.reshape(1)).reshape(())
    if not -x.dim() <= dim < x.dim():
        raise UserError(f"softmax: dim {dim} does not exist in a tensor of {x.dim()} dimensions.")
    if dim in (-1, x.dim() - 1):
        return _softmax(x)
    return _softmax(x.movedim(dim, -1)).movedim(-1, dim)


def _serving(x: Tensor) -> Any:
    return backend("softmax", (x.shape,), x.dtype, x.device.type)


@operation("softmax_backward", lambda dy, y: y.new_empty(y.shape))
def _softmax_backward(dy: Tensor, y: Tensor) -> Tensor:
    return _serving(y).backward(dy.contiguous(), y)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    return _softmax_backward(dy, *ctx.saved_tensors)


@operation("softmax", lambda x: x.new_empty(x.shape), setup_context=_save, backward=_backward)
def _softmax(x: Tensor) -> Tensor:
    return _serving(x).forward(x)
