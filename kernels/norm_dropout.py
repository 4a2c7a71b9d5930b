"""Dropout of a branch's output, the sum with its residual, and the RMSNorm or LayerNorm of the sum, in one pass."""

from typing import Any

import torch
from torch import Tensor

from cllm.kernels._operator import operation, stats_dtype, tensor_or_empty
from cllm.kernels._register import backend
from cllm.kernels.dropout import Dropout, check_key
from cllm.kernels.norm import check_norm


def rms_norm_dropout(
    x: Tensor, weight: Tensor, dropout: Dropout, place: int, eps: float = 1e-6, *, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(the RMSNorm of h, h) with h = x + residual as in `rms_norm`, after x was zeroed or scaled by `dropout`; without a residual h is that alone.

    place: the number of x among all that draw. Row n of x, (..., E) flattened to rows, is token n of the draws. Raises UserError as `rms_norm`.
    """
    check_norm("rms_norm_dropout", x, weight, None, residual)
    check_key("rms_norm_dropout", dropout, x.device)
    return _norm_dropout(x, residual, weight, None, False, eps, dropout.key, dropout.rate, place)[:2]


def layer_norm_dropout(
    x: Tensor, weight: Tensor, bias: Tensor | None, dropout: Dropout, place: int, eps: float = 1e-5, *, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `rms_norm_dropout`, with the LayerNorm of h."""
    check_norm("layer_norm_dropout", x, weight, bias, residual)
    check_key("layer_norm_dropout", dropout, x.device)
    return _norm_dropout(x, residual, weight, bias, True, eps, dropout.key, dropout.rate, place)[:2]


def _serving(x: Tensor) -> Any:
    return backend("norm_dropout", (x.shape,), x.dtype, x.device.type)


def _backward_fake(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor, rstd: Tensor, has_residual: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = h.new_empty(h.shape if has_residual else 0)
    return h.new_empty(h.shape), dresidual, weight.new_empty(weight.shape), weight.new_empty(weight.shape if has_bias else 0)


@operation("norm_dropout_backward", _backward_fake)
def _norm_dropout_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor, rstd: Tensor, has_residual: bool, centre: bool,
    key: Tensor, rate: float, place: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dresidual, dweight, dbias); what there is none of is empty."""
    if dh is not None:
        dh = dh.contiguous()
    dx, dresidual, dweight, dbias = _serving(h).backward(
        dy.contiguous(), dh, h, weight, has_bias, mean if centre else None, rstd, has_residual, key, rate, place
    )
    return dx, tensor_or_empty(dresidual, h), dweight, tensor_or_empty(dbias, weight)


def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, centre: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    statistics = [x.new_empty(x.shape[:-1] if there else 0, dtype=stats_dtype(x.dtype)) for there in (centre, True)]
    return x.new_empty(x.shape), x.new_empty(x.shape), statistics[0], statistics[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    _, residual, weight, bias, centre, _, key, rate, place = inputs
    _, h, mean, rstd = output
    ctx.has_bias, ctx.has_residual, ctx.dropout = bias is not None, residual is not None, (centre, rate, place)
    ctx.save_for_backward(h, weight, mean, rstd, key)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    h, weight, mean, rstd, key = ctx.saved_tensors
    centre, rate, place = ctx.dropout
    dy = torch.zeros_like(h) if dy is None else dy
    dx, dresidual, dweight, dbias = _norm_dropout_backward(dy, dh, h, weight, ctx.has_bias, mean, rstd, ctx.has_residual, centre, key, rate, place)
    return dx, dresidual if ctx.has_residual else None, dweight, dbias if ctx.has_bias else None, *(None,) * 5


@operation("norm_dropout", _fake, setup_context=_save, backward=_backward)
def _norm_dropout(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, centre: bool, eps: float, key: Tensor, rate: float, place: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, h, mean, rstd); mean is empty for RMSNorm."""
    y, h, mean, rstd = _serving(x).forward(x, residual, weight, bias, centre, eps, key, rate, place)
    return y, h, tensor_or_empty(mean, rstd), rstd
