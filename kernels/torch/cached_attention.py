"""Attention over a key-value cache in plain torch, the scores of all places at once."""

import torch
from torch import Tensor

from cllm.kernels.torch import accumulate_dtype


def forward(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int, scale: float) -> Tensor:
    """q (B, 1, H, D), keys and values (B, S, Hkv, D), lengths (B,) int64 -> (B, 1, H, D)."""
    batch, _, num_heads, head_dim = q.shape
    num_places, num_kv_heads = keys.shape[1:3]
    wide = accumulate_dtype(q.dtype)
    place = torch.arange(num_places, device=q.device)
    visible = place < lengths.unsqueeze(1)  # (B, S)
    if window:
        visible &= place >= lengths.unsqueeze(1) - window
    # Memory that no token was written to yet may hold anything, NaN too, which 0 times it would let through.
    keys, values = (x.to(wide).masked_fill(~visible[:, :, None, None], 0.0).permute(0, 2, 1, 3) for x in (keys, values))  # (B, Hkv, S, D)
    grouped = q.to(wide).view(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = (grouped @ keys.transpose(-1, -2) * scale).masked_fill(~visible[:, None, None], float("-inf"))
    p = torch.softmax(scores, -1).masked_fill(~visible[:, None, None], 0.0)  # a row without a key would be NaN
    return (p @ values).reshape(q.shape).to(q.dtype)
