"""Attention in plain torch, the whole score matrix at once.

B batch, T query tokens, S key tokens, H query heads, K key-value heads, G = H / K query heads to each, D head dim.
"""

import torch
from torch import Tensor

from cllm.kernels.torch import accumulate_dtype


def _visible(num_queries: int, num_keys: int, causal: bool, window: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    """(T, S) bool: which keys each query sees. Positions are aligned at the end, as a key-value cache needs."""
    query = torch.arange(num_queries, device=device).unsqueeze(1) + (num_keys - num_queries)
    key = torch.arange(num_keys, device=device).unsqueeze(0)
    visible = torch.ones((num_queries, num_keys), dtype=torch.bool, device=device)
    if causal:
        visible &= key <= query
    if window:
        visible &= key > query - window
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens[1:].long(), torch.arange(num_keys, device=device), right=True)
        visible &= document.unsqueeze(1) == document.unsqueeze(0)
    return visible


def _heads_first(x: Tensor, num_kv_heads: int) -> Tensor:
    """(B, T, H, D) -> (B, K, G, T, D) in the accumulation dtype."""
    batch, tokens, heads, head_dim = x.shape
    wide = x.to(accumulate_dtype(x.dtype)).transpose(1, 2)
    return wide.reshape(batch, num_kv_heads, heads // num_kv_heads, tokens, head_dim)


def _heads_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, K, G, T, D) -> contiguous (B, T, H, D)."""
    batch, num_kv_heads, group, tokens, head_dim = x.shape
    return x.reshape(batch, num_kv_heads * group, tokens, head_dim).transpose(1, 2).to(dtype).contiguous()


def _scores(q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale  # (B, K, G, T, S)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~visible, float("-inf"))


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, T, H, D) and log-sum-exp of the scaled scores (B, H, T); a query that sees nothing gets 0 and -inf. factors: those of dropout, which
    the probabilities (B, K, G, T, S) are multiplied by."""
    batch, num_queries, num_heads, _ = q.shape
    num_kv_heads = k.shape[2]
    visible = _visible(num_queries, k.shape[1], causal, window, cu_seqlens, q.device)
    scores = _scores(_heads_first(q, num_kv_heads), _heads_first(k, num_kv_heads), visible, scale, softcap)
    lse = torch.logsumexp(scores, dim=-1)  # (B, K, G, T)
    p = torch.exp(scores - lse.masked_fill(~visible.any(dim=-1), 0.0).unsqueeze(-1))
    if factors is not None:
        p = p * factors.to(p.dtype)
    out = p @ _heads_first(v, num_kv_heads)
    return _heads_last(out, q.dtype), lse.reshape(batch, num_heads, num_queries)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None, factors: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; the probabilities are computed again from the log-sum-exp."""
    num_queries, num_kv_heads = q.shape[1], k.shape[2]
    visible = _visible(num_queries, k.shape[1], causal, window, cu_seqlens, q.device)
    qh, kh, vh, douth = (_heads_first(x, num_kv_heads) for x in (q, k, v, dout))
    scores = _scores(qh, kh, visible, scale, softcap)
    lse = lse.view(qh.shape[:-1]).masked_fill(~visible.any(dim=-1), 0.0).unsqueeze(-1)
    p = torch.exp(scores - lse)  # (B, K, G, T, S)
    dp, dropped = douth @ vh.transpose(-1, -2), p
    if factors is not None:
        dp, dropped = dp * factors.to(p.dtype), p * factors.to(p.dtype)
    correction = (p * dp).sum(dim=-1, keepdim=True)
    if dlse is not None:
        correction = correction - dlse.to(p.dtype).view(correction.shape)
    dscores = p * (dp - correction)
    if softcap:
        # d(c tanh(s / c)) / ds = 1 - tanh^2; hidden scores are -inf and must not turn 0 into NaN
        dscores = dscores * (1 - (scores.masked_fill(~visible, 0.0) / softcap).square())
    dq = dscores @ kh * scale
    dk = (dscores.transpose(-1, -2) @ qh).sum(dim=2, keepdim=True) * scale
    dv = (dropped.transpose(-1, -2) @ douth).sum(dim=2, keepdim=True)
    return _heads_last(dq, q.dtype), _heads_last(dk, k.dtype), _heads_last(dv, v.dtype)
