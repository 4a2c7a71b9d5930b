"""Matrix product with an optional bias: every linear layer outside the fused operations. M rows, K summed over, N columns."""

from typing import Any

from torch import Tensor

from cllm.kernels._checks import check_floating, check_weight
from cllm.kernels._operator import operation
from cllm.kernels._register import backend
from cllm.kernels.torch import as_rows
from cllm.runtime.errors import UserError


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (..., K) @ b (K, N) + bias (N,) -> (..., N) in a's dtype; a linear layer is `matmul(x, weight.T, bias)`.

    b and bias are float32 or of a's dtype, b any strided view; its gradient has its dtype and its layout. Sums are made in float32 at least.
    Raises UserError for shapes or dtypes that do not fit.
    """
    if a.dim() < 1 or b.dim() != 2 or a.shape[-1] != b.shape[0] or (bias is not None and bias.shape != b.shape[1:]):
        raise UserError(
            f"matmul: a {tuple(a.shape)}, b {tuple(b.shape)}"
            + ("" if bias is None else f" and bias {tuple(bias.shape)}")
            + " do not fit together. Expected a (..., K), b (K, N), bias (N,)."
        )
    check_floating("matmul", a=a)
    check_weight("matmul", a, b=b, bias=bias)
    return _matmul(a, b, bias)


def _serving(rows: Tensor, b: Tensor) -> Any:
    return backend("matmul", (rows.shape, b.shape), rows.dtype, rows.device.type)


def _is_transposed(b: Tensor) -> bool:
    """Whether b is a view of a contiguous weight (N, K), as in `weight.T`."""
    return b.stride(0) == 1 and b.stride(1) == b.shape[0] and b.shape[1] > 1


def _backward_fake(
    dy: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, needs_a: bool, needs_b: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    db = b.new_empty((b.shape[1], b.shape[0])).T if _is_transposed(b) else b.new_empty(b.shape)
    return (
        a.new_empty(a.shape if needs_a else 0),
        db if needs_b else b.new_empty(0),
        b.new_empty(0) if bias is None or not needs_bias else bias.new_empty(bias.shape),
    )


@operation("matmul_backward", _backward_fake)
def _matmul_backward(
    dy: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, needs_a: bool, needs_b: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(da, db, dbias); what is not needed is empty."""
    rows = as_rows(a)
    drows = as_rows(dy)
    serving = _serving(rows, b)
    product = serving.matmul
    da, db, dbias = a.new_empty(0), b.new_empty(0), b.new_empty(0)
    if needs_a:
        da = product(drows, b.T, None, a.dtype).view(a.shape)
    if needs_b:
        db = product(drows.T, rows, None, b.dtype).T if _is_transposed(b) else product(rows.T, drows, None, b.dtype)
    if bias is not None and needs_bias:
        dbias = serving.column_sums(drows, bias.dtype)
    return da, db, dbias


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    a, b, bias = ctx.saved_tensors
    needed = ctx.needs_input_grad
    grads = _matmul_backward(dy, a, b, bias, *needed)
    return tuple(grad if need else None for grad, need in zip(grads, needed))


@operation("matmul", lambda a, b, bias: a.new_empty((*a.shape[:-1], b.shape[1])), setup_context=_save, backward=_backward)
def _matmul(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    rows = as_rows(a)
    return _serving(rows, b).matmul(rows, b, bias, a.dtype).view(*a.shape[:-1], b.shape[1])
