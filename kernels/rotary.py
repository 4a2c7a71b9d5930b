"""Rotary position embedding, half-split convention of Llama, alone or behind an RMSNorm of each head ("QK-norm").

B batch, T tokens, H heads, D head dim, P table positions.
"""

from typing import Any

import torch
from torch import Tensor

from cllm.kernels._checks import check_floating, check_integer_range, check_weight
from cllm.kernels._operator import operation, stats_dtype
from cllm.kernels._register import backend
from cllm.runtime.errors import UserError


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, norm_weight: Tensor | None = None, eps: float = 1e-6
) -> Tensor:  # fmt: skip
    """Rotate the pairs (x[d], x[d + D/2]) by the angle of each token's position (Su et al. 2021, arXiv 2104.09864).

    x (B, T, H, D), cos and sin (P, D/2) float32, positions int64 (T,) or (B, T), by default 0 .. T-1 -> (B, T, H, D) in x's dtype.
    With norm_weight (H, D), float32 or of x's dtype, each head h is first normed over D as `rms_norm(x[:, :, h], norm_weight[h], eps)` does, in the
    same pass over memory (query-key normalisation: Henry et al. 2020, arXiv 2010.04245, with the RMSNorm of Qwen3).
    Gradients go to x and norm_weight. Raises UserError for shapes, dtypes or positions that do not fit.
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
            raise UserError(f"rotary: {x.shape[1]} tokens but the table holds {cos.shape[0]} positions. Raise max_seq_len or shorten the input.")
    elif positions.dtype != torch.int64 or positions.shape not in (x.shape[1:2], x.shape[:2]):
        raise UserError(
            f"rotary: positions must be int64 of shape (T,) or (B, T) for x {tuple(x.shape)}, got {positions.dtype} {tuple(positions.shape)}."
        )
    if norm_weight is None:
        return _rotary(x, cos, sin, positions, False)
    if norm_weight.shape != x.shape[2:]:
        raise UserError(f"rotary: norm_weight must be (H, D) = {tuple(x.shape[2:])}, one row for each head of x, got {tuple(norm_weight.shape)}.")
    check_weight("rotary", x, norm_weight=norm_weight)
    return _norm_rotary(x, norm_weight, eps, cos, sin, positions)[0]


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
    return _serving(x, cos, positions).apply(x, cos, sin, positions, inverse)


def _serving(x: Tensor, cos: Tensor, positions: Tensor | None) -> Any:
    if positions is not None:
        check_integer_range("rotary", "positions", positions, cos.shape[0])
    return backend("rotary", (x.shape,), x.dtype, x.device.type)


@operation("norm_rotary_backward", lambda dy, x, weight, *_: (x.new_empty(x.shape), weight.new_empty(weight.shape)))
def _norm_rotary_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _serving(x, cos, positions).norm_backward(dy.contiguous(), x, weight, rstd, cos, sin, positions)


def _norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, cos, sin, positions = inputs
    ctx.save_for_backward(x, weight, output[1], cos, sin, positions)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _norm_grad(ctx: Any, dy: Tensor | None, drstd: Tensor | None) -> tuple[Tensor | None, ...]:
    dy = torch.zeros_like(ctx.saved_tensors[0]) if dy is None else dy
    dx, dweight = _norm_rotary_backward(dy, *ctx.saved_tensors)
    return dx, dweight, None, None, None, None


@operation(
    "norm_rotary",
    lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape[:3], dtype=stats_dtype(x.dtype))),
    setup_context=_norm_save,
    backward=_norm_grad,
)
def _norm_rotary(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _serving(x, cos, positions).norm_forward(x, weight, eps, cos, sin, positions)
