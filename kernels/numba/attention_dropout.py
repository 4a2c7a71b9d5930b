"""Attention with dropout on the CPU: the kernels of attention.py and attention_backward.py, which draw the mask row by row where they need it."""

from typing import Any

import torch
from torch import Tensor

from cllm.kernels.numba import attention
from cllm.kernels.numba import attention_tile as at
from cllm.kernels.operations import Shapes


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers the forward pass uses."""
    return attention.launched_workers(planned, shapes, dtype, **options)


def forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None,
    key: Tensor, rate: float, place: int, period: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `attention.forward`."""
    return attention.forward(q, k, v, causal, scale, window, softcap, cu_seqlens, at.drawn(key, rate, place, period))


def backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    causal: bool, scale: float, window: int, softcap: float, cu_seqlens: Tensor | None, key: Tensor, rate: float, place: int, period: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    dropout = at.drawn(key, rate, place, period)
    return attention.backward(dout, dlse, q, k, v, out, lse, causal, scale, window, softcap, cu_seqlens, dropout)
