"""Attention of one new token in each row over a key-value cache, whose lengths lie on the device: no launch depends on a value of the host's.

B rows, H query heads, Hkv key-value heads, S places of the cache, D head dim.
"""

import torch
from torch import Tensor

from cllm.kernels._checks import check_floating, check_heads
from cllm.kernels._operator import operation
from cllm.kernels._register import backend
from cllm.runtime.errors import UserError


def cached_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, window: int | None = None, scale: float | None = None) -> Tensor:
    """q (B, 1, H, D) over the first `lengths[b]` of the keys and values (B, S, Hkv, D) of each row -> (B, 1, H, D); no gradients.

    lengths (B,) int64, from 0 to S; the last of a row's keys is that of its query, and with `window` only the last so many are seen. A row of
    length 0 gets 0. `scale` defaults to D ** -0.5. What lies in the cache behind a row's length changes no bit of the result, nor does S. All
    shapes being fixed, a CUDA graph holds every step of a generation (`attention` would need another launch for each length). Raises UserError for
    shapes or dtypes that do not fit.
    """
    if q.dim() != 4 or q.shape[1] != 1 or keys.dim() != 4 or keys.shape != values.shape or q.shape[::3] != keys.shape[::3]:
        raise UserError(
            f"cached_attention: q {tuple(q.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit together. "
            "Expected q (B, 1, H, D), keys and values (B, S, Hkv, D)."
        )
    check_heads("cached_attention", q.shape[2], keys.shape[2], q.shape[3])
    check_floating("cached_attention", q=q, keys=keys, values=values)
    if lengths.dtype != torch.int64 or lengths.shape != q.shape[:1]:
        raise UserError(f"cached_attention: lengths must be int64 ({q.shape[0]},), got {lengths.dtype} {tuple(lengths.shape)}.")
    if window is not None and window < 1:
        raise UserError(f"cached_attention: window must be >= 1, got {window}. Use None for no window.")
    return _cached_attention(q.detach(), keys.detach(), values.detach(), lengths, window or 0, q.shape[3] ** -0.5 if scale is None else float(scale))


@operation("cached_attention", lambda q, *_: q.new_empty(q.shape))
def _cached_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, window: int, scale: float) -> Tensor:
    return backend("cached_attention", (q.shape, keys.shape), q.dtype, q.device.type).forward(q, keys, values, lengths, window, scale)
