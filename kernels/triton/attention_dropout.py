"""Attention with dropout on a GPU: the kernels of attention.py, which draw the mask of a block of queries and keys where they need it."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cllm.kernels.triton import attention
from cllm.kernels.triton.dropout import drawn
from cllm.kernels.triton.launch import Calls
from cllm.runtime.gpu import GPU


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None,
    key: Tensor, rate: float, place: int, period: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `attention.forward`."""
    return attention.forward(q, k, v, causal, scale, window, softcap, cu_seqlens, drawn(key, rate, place), period)


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None, key: Tensor, rate: float, place: int, period: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    dropout = drawn(key, rate, place)
    return attention.backward(dout, dlse, q, k, v, out, lse, causal, scale, window, softcap, cu_seqlens, dropout, period)


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    bounds, key = empty(9, of=torch.int32), empty(3, of=torch.int64)
    kinds: dict[str, dict[str, Any]] = {
        "causal": {"causal": True}, "packed": {"causal": True, "cu_seqlens": bounds}, "packed softcap": {"cu_seqlens": bounds, "softcap": 30.0},
        "odd rows": {"causal": True, "cu_seqlens": bounds, "period": 1000}, "window": {"causal": True, "window": 256},
    }  # fmt: skip
    for head_dim in (64, 128):
        q, k, lse = empty(1, 2048, 8, head_dim), empty(1, 2048, 2, head_dim), empty(1, 8, 2048, of=torch.float32)
        for name, given in kinds.items():
            options = (given.get("causal", False), head_dim**-0.5, given.get("window", 0), given.get("softcap", 0.0), given.get("cu_seqlens"))
            draws = (key, 0.1, 7, given.get("period", 1024))
            yield f"attention forward with dropout D{head_dim} {name}", partial(forward, q, k, k, *options, *draws)
            yield f"attention backward with dropout D{head_dim} {name}", partial(backward, q, lse, q, k, k, q, lse, *options, *draws)
