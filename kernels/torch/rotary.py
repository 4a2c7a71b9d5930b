"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in plain torch, half-split convention of Llama; alone and behind an RMSNorm of each
head.

B batch, T tokens, H heads, D head dim, P positions in the table.
"""

import torch
from torch import Tensor

from cllm.kernels.torch import accumulate_dtype, norm


def apply(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, inverse: bool) -> Tensor:
    """Rotate the pairs (x[d], x[d + D/2]) of x (B, T, H, D) by the angle of each token's position; `inverse` rotates back."""
    wide = accumulate_dtype(x.dtype)
    num_tokens = x.shape[1]
    if positions is None:
        cos, sin = cos[:num_tokens], sin[:num_tokens]
    else:
        cos, sin = cos[positions], sin[positions]
    cos = cos.to(wide).unsqueeze(-2)  # (T, 1, D/2) or (B, T, 1, D/2)
    sin = sin.to(wide).unsqueeze(-2)
    if inverse:
        sin = -sin
    first, second = x.to(wide).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype).contiguous()


def norm_forward(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """RMSNorm of each head of x with its row of weight (H, D), then the rotation -> (B, T, H, D), and rstd (B, T, H)."""
    normed, _, rstd = norm.rms_norm_forward(x, weight, eps, None)
    return apply(normed, cos, sin, positions, False), rstd


def norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx (B, T, H, D) and dweight (H, D)."""
    return norm.rms_norm_backward(apply(dy, cos, sin, positions, True), None, x, weight, rstd)
