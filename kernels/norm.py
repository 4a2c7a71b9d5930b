"""RMSNorm and LayerNorm over the last dimension E, each with an optional residual added first in the same pass."""

from typing import Any, overload

import torch
from torch import Tensor

from cllm.kernels._checks import check_floating, check_weight
from cllm.kernels._operator import operation, stats_dtype, tensor_or_empty
from cllm.kernels._register import backend
from cllm.runtime.errors import UserError


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """weight * h / sqrt(mean(h^2) + eps), with h = x, or h = x + residual and h returned too (Zhang and Sennrich 2019, arXiv 1910.07467).

    x and residual (..., E) of one dtype, weight (E,) float32 or of that dtype -> y, or (y, h), in x's dtype.
    Raises UserError for shapes or dtypes that do not fit.
    """
    check_norm("rms_norm", x, weight, None, residual)
    if residual is None:
        return _rms_norm(x, weight, eps)[0]
    return _rms_norm_residual(x, residual, weight, eps)[:2]


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: None = None) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, *, residual: Tensor
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """weight * (h - mean(h)) / sqrt(var(h) + eps) + bias, with h as in `rms_norm` (Ba et al. 2016, arXiv 1607.06450).

    x and residual (..., E) of one dtype, weight and bias (E,) float32 or of that dtype -> y, or (y, h), in x's dtype.
    Raises UserError for shapes or dtypes that do not fit.
    """
    check_norm("layer_norm", x, weight, bias, residual)
    if residual is None:
        return _layer_norm(x, weight, bias, eps)[0]
    return _layer_norm_residual(x, residual, weight, bias, eps)[:2]


def check_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    if (
        x.dim() < 1
        or weight.shape != x.shape[-1:]
        or (bias is not None and bias.shape != weight.shape)
        or (residual is not None and residual.shape != x.shape)
    ):
        found = {"x": x, "weight": weight, "bias": bias, "residual": residual}
        raise UserError(
            f"{op}: shapes do not fit together: "
            + ", ".join(f"{name} {tuple(t.shape)}" for name, t in found.items() if t is not None)
            + ". Expected x and residual (..., E), weight and bias (E,)."
        )
    check_floating(op, x=x, residual=residual)
    check_weight(op, x, weight=weight, bias=bias)
    if bias is not None and bias.dtype != weight.dtype:
        raise UserError(f"{op}: weight is {weight.dtype} and bias {bias.dtype}. They must have one dtype.")


def _serving(op: str, x: Tensor) -> Any:
    return backend(op, (x.shape,), x.dtype, x.device.type)


def _y_and_rstd(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=stats_dtype(x.dtype))


def _rms_norm_backward_fake(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


@operation("rms_norm_backward", _rms_norm_backward_fake)
def _rms_norm_backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    if dh is not None:
        dh = dh.contiguous()
    return _serving("rms_norm", h).rms_norm_backward(dy.contiguous(), dh, h, weight, rstd)


def _rms_norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _rms_norm_grad(ctx: Any, dy: Tensor | None, drstd: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(torch.zeros_like(x) if dy is None else dy, None, x, weight, rstd)
    return dx, dweight, None


@operation("rms_norm", lambda x, weight, eps: _y_and_rstd(x), setup_context=_rms_norm_save, backward=_rms_norm_grad)
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _serving("rms_norm", x).rms_norm_forward(x, weight, eps, None)
    return y, rstd


def _rms_norm_residual_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _y_and_rstd(x)
    return y, x.new_empty(x.shape), rstd


def _rms_norm_residual_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, h, rstd = output
    ctx.save_for_backward(h, inputs[2], rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _rms_norm_residual_grad(
    ctx: Any, dy: Tensor | None, dh: Tensor | None, drstd: Tensor | None
) -> tuple[Tensor | None, ...]:  # fmt: skip
    h, weight, rstd = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(torch.zeros_like(h) if dy is None else dy, dh, h, weight, rstd)
    return dx, dx, dweight, None


@operation("rms_norm_residual", _rms_norm_residual_fake, setup_context=_rms_norm_residual_save, backward=_rms_norm_residual_grad)
def _rms_norm_residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _serving("rms_norm", x).rms_norm_forward(x, weight, eps, residual)


def _layer_norm_backward_fake(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return h.new_empty(h.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape if has_bias else 0)


@operation("layer_norm_backward", _layer_norm_backward_fake)
def _layer_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if dh is not None:
        dh = dh.contiguous()
    serving = _serving("layer_norm", h)
    dx, dweight, dbias = serving.layer_norm_backward(dy.contiguous(), dh, h, weight, has_bias, mean, rstd)
    return dx, dweight, tensor_or_empty(dbias, weight)


def _layer_norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _layer_norm_grad(
    ctx: Any, dy: Tensor | None, dmean: Tensor | None, drstd: Tensor | None
) -> tuple[Tensor | None, ...]:  # fmt: skip
    x, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dx, dweight, dbias = _layer_norm_backward(dy, None, x, weight, ctx.has_bias, mean, rstd)
    return dx, dweight, dbias if ctx.has_bias else None, None


def _layer_norm_fake(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _y_and_rstd(x)
    return y, torch.empty_like(rstd), rstd


@operation("layer_norm", _layer_norm_fake, setup_context=_layer_norm_save, backward=_layer_norm_grad)
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y, _, mean, rstd = _serving("layer_norm", x).layer_norm_forward(x, weight, bias, eps, None)
    return y, mean, rstd


def _layer_norm_residual_fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y, rstd = _y_and_rstd(x)
    return y, x.new_empty(x.shape), torch.empty_like(rstd), rstd


def _layer_norm_residual_save(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:  # fmt: skip
    _, h, mean, rstd = output
    ctx.has_bias = inputs[3] is not None
    ctx.save_for_backward(h, inputs[2], mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _layer_norm_residual_grad(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    h, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(h) if dy is None else dy
    dx, dweight, dbias = _layer_norm_backward(dy, dh, h, weight, ctx.has_bias, mean, rstd)
    return dx, dx, dweight, dbias if ctx.has_bias else None, None


@operation(
    "layer_norm_residual",
    _layer_norm_residual_fake,
    setup_context=_layer_norm_residual_save,
    backward=_layer_norm_residual_grad,
)
def _layer_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _serving("layer_norm", x).layer_norm_forward(x, weight, bias, eps, residual)
