"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467) and LayerNorm (Ba et al. 2016, arXiv 1607.06450) in plain torch.

Both norm over the last dimension E; an optional residual is added first, and the sum h is what is normed and returned.
rstd and mean have shape (...,) and the accumulation dtype.
"""

import torch
from torch import Tensor

from cllm.kernels.torch import accumulate_dtype, as_rows


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    h = None if residual is None else x + residual
    wide = accumulate_dtype(x.dtype)
    values = (x if h is None else h).to(wide)
    rstd = torch.rsqrt(values.square().mean(dim=-1) + eps)
    y = values * rstd.unsqueeze(-1) * weight.to(wide)
    return y.to(x.dtype).contiguous(), None if h is None else h.contiguous(), rstd


def rms_norm_backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed (`h`, which is x when there was no residual) and of the weight, (E,) or one row for each head, (H, E)."""
    wide = accumulate_dtype(h.dtype)
    dy = dy.to(wide)
    normed = h.to(wide) * rstd.unsqueeze(-1)
    dnormed = dy * weight.to(wide)
    dx = rstd.unsqueeze(-1) * (dnormed - normed * (dnormed * normed).mean(dim=-1, keepdim=True))
    if dh is not None:
        dx = dx + dh.to(wide)
    dweight = (dy * normed).sum_to_size(weight.shape)
    return dx.to(h.dtype).contiguous(), dweight.to(weight.dtype)


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    h = None if residual is None else x + residual
    wide = accumulate_dtype(x.dtype)
    values = (x if h is None else h).to(wide)
    mean = values.mean(dim=-1)
    centred = values - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centred.square().mean(dim=-1) + eps)
    y = centred * rstd.unsqueeze(-1) * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype).contiguous(), None if h is None else h.contiguous(), mean, rstd


def layer_norm_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    wide = accumulate_dtype(h.dtype)
    dy = dy.to(wide)
    normed = (h.to(wide) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dnormed = dy * weight.to(wide)
    dx = rstd.unsqueeze(-1) * (dnormed - dnormed.mean(dim=-1, keepdim=True) - normed * (dnormed * normed).mean(dim=-1, keepdim=True))
    if dh is not None:
        dx = dx + dh.to(wide)
    dweight = as_rows(dy * normed).sum(dim=0).to(weight.dtype)
    dbias = as_rows(dy).sum(dim=0).to(weight.dtype) if has_bias else None
    return dx.to(h.dtype).contiguous(), dweight, dbias
