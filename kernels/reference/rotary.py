"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in plain torch, half-split convention of Llama.

B batch, T tokens, H heads, D head dim, P positions in the table.
"""

import torch
from torch import Tensor

from cllm.kernels.reference import accumulate_dtype


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
