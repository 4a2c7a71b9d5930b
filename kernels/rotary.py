"""Rotary position embedding, half-split convention of Llama. B batch, T tokens, H heads, D head dim, P table positions."""

from typing import Any

import torch
from torch import Tensor

from cllm.kernels._register import backend, check_floating, check_integer_range, operation
from cllm.runtime.errors import UserError


def rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rotate the pairs (x[d], x[d + D/2]) by the angle of each token's position (Su et al. 2021, arXiv 2104.09864).

    x (B, T, H, D), cos and sin (P, D/2) float32, positions int64 (T,) or (B, T), by default 0 .. T-1 -> (B, T, H, D) in x's dtype.
    The gradient goes to x only. Raises UserError for shapes, dtypes or positions that do not fit.
    """
    if x.dim() != 4 or cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] != x.shape[3]:
        raise UserError(
            f"rotary: x {tuple(x.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit together. "
            "Expected x (B, T, H, D) with D even, cos and sin (positions, D / 2)."
        )
    check_floating("rotary", x=x)
    if cos.dtype != sin.dtype or (cos.dtype != torch.float32 and not cos.dtype == x.dtype == torch.float64):
        raise UserError(f"rotary: cos and sin must be float32, got {cos.dtype} and {sin.dtype}. Convert the tables.")
    if positions is None:
        if x.shape[1] > cos.shape[0]:
            raise UserError(
                f"rotary: {x.shape[1]} tokens but the table holds {cos.shape[0]} positions. Raise max_seq_len or shorten the input."
            )
    elif positions.dtype != torch.int64 or positions.shape not in (x.shape[1:2], x.shape[:2]):
        raise UserError(
            f"rotary: positions must be int64 of shape (T,) or (B, T) for x {tuple(x.shape)}, "
            f"got {positions.dtype} {tuple(positions.shape)}."
        )
    return _rotary(x, cos, sin, positions, False)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin, positions = ctx.saved_tensors
    return _rotary(dy, cos, sin, positions, not ctx.inverse), None, None, None, None


@operation(
    "rotary",
    lambda x, cos, sin, positions, inverse: x.new_empty(x.shape),
    setup_context=_save,
    backward=_backward,
)
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    if positions is not None:
        check_integer_range("rotary", "positions", positions, cos.shape[0])
    work = 2.0 * x.numel() * x.element_size()
    return backend("rotary", (x.shape,), x.dtype, x.device.type, work).apply(x, cos, sin, positions, inverse)
