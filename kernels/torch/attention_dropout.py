"""Attention with dropout of its probabilities (Vaswani et al. 2017, section 5.4) in plain torch, mask and all.

B batch, T query tokens, S key tokens, H query heads, K key-value heads, G = H / K query heads to each.
"""

import torch
from torch import Tensor

from cllm.kernels.philox import kept, scale_of
from cllm.kernels.torch import attention


def _factors(q: Tensor, k: Tensor, cu_seqlens: Tensor | None, key: Tensor, rate: float, place: int, period: int) -> Tensor:
    """What the probabilities are multiplied by, (B, K, G, T, S) float64: 0, or the scale of `rate`."""
    (batch, num_queries, num_heads, _), (_, num_keys, num_kv_heads, _) = q.shape, k.shape
    token = torch.arange(batch * num_queries, device=key.device).view(batch, 1, num_queries, 1)
    element = torch.arange(num_keys, device=key.device)
    if cu_seqlens is not None and period:
        bounds = cu_seqlens.long()
        document = torch.searchsorted(bounds[1:].contiguous(), element, right=True)
        element = element - bounds[document] // period * period
    head = place + torch.arange(num_heads, device=key.device).view(1, num_heads, 1, 1)
    return (kept(key, rate, head, token, element).double() * scale_of(rate)).view(batch, num_kv_heads, -1, num_queries, num_keys)


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None,
    key: Tensor, rate: float, place: int, period: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, T, H, D), and the log-sum-exp of the scaled scores (B, H, T), which dropout does not change."""
    factors = _factors(q, k, cu_seqlens, key, rate, place, period) if q.numel() and k.numel() else None
    return attention.forward(q, k, v, causal, scale, window, softcap, cu_seqlens, factors)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None, key: Tensor, rate: float, place: int, period: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; the mask is drawn again."""
    factors = _factors(q, k, cu_seqlens, key, rate, place, period) if q.numel() and k.numel() else None
    return attention.backward(dout, dlse, q, k, v, out, lse, causal, scale, window, softcap, cu_seqlens, factors)
