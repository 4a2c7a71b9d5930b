"""Dropout of a branch, its residual added, and the norm of the sum, in plain torch. Norms are over the last dimension E."""

import math

import torch
from torch import Tensor

from cllm.kernels.philox import kept, scale_of
from cllm.kernels.torch import accumulate_dtype, norm


def _dropped(x: Tensor, key: Tensor, rate: float, place: int) -> Tensor:
    """x (..., E) with dropout, in the accumulation dtype."""
    token = torch.arange(math.prod(x.shape[:-1]), device=x.device).view(*x.shape[:-1], 1)
    keeps = kept(key, rate, place, token, torch.arange(x.shape[-1], device=x.device))
    wide = x.to(accumulate_dtype(x.dtype))
    return wide * (keeps.double() * scale_of(rate)).to(wide.dtype)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, centre: bool, eps: float, key: Tensor, rate: float, place: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(y, h = dropout(x) + residual, mean or None, rstd)."""
    dropped = _dropped(x, key, rate, place)
    h = (dropped if residual is None else dropped + residual.to(dropped.dtype)).to(x.dtype).contiguous()
    if centre:
        y, _, mean, rstd = norm.layer_norm_forward(h, weight, bias, eps, None)
        return y, h, mean, rstd
    y, _, rstd = norm.rms_norm_forward(h, weight, eps, None)
    return y, h, None, rstd


def backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor | None, rstd: Tensor, has_residual: bool,
    key: Tensor, rate: float, place: int,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, of the residual (None without one), of the weight and of the bias."""
    wide, dbias = h.to(accumulate_dtype(h.dtype)), None
    if mean is None:
        total, dweight = norm.rms_norm_backward(dy, dh, wide, weight, rstd)
    else:
        total, dweight, dbias = norm.layer_norm_backward(dy, dh, wide, weight, has_bias, mean, rstd)
    return _dropped(total, key, rate, place).to(h.dtype), total.to(h.dtype) if has_residual else None, dweight, dbias
