"""Dropout of a branch, the sum with its residual, and RMSNorm or LayerNorm of the sum: the kernels of norm.py, which draw the mask as they read x."""

from functools import partial

import torch
from torch import Tensor

from cllm.kernels.triton import norm
from cllm.kernels.triton.dropout import drawn
from cllm.kernels.triton.launch import Calls
from cllm.runtime.gpu import GPU


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, centre: bool, eps: float, key: Tensor, rate: float, place: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(y, h = dropout(x) + residual, mean or None, rstd)."""
    y, h, mean, rstd = norm.forward(x, weight, bias, eps, residual, centre, drawn(key, rate, place))
    assert h is not None
    return y, h, mean, rstd


def backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, has_bias: bool, mean: Tensor | None, rstd: Tensor, has_residual: bool,
    key: Tensor, rate: float, place: int,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, of the residual (None without one), of the weight and of the bias."""
    return norm.backward(dy, dh, h, weight, has_bias, mean, rstd, drawn(key, rate, place), has_residual)


def launches(gpu: GPU, dtype: torch.dtype) -> Calls:
    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    draws = empty(3, of=torch.int64), 0.1, 7
    for columns in (65, 768, 4096, 8192, 16384, 32768):
        x, rstd, master = empty(4096, columns), empty(4096, of=torch.float32), empty(columns, of=torch.float32)
        for residual, bias in ((None, None), (x, master)):
            name = f"{columns}{'' if residual is None else ' residual, bias'}"
            centred, mean = bias is not None, None if bias is None else rstd
            yield f"norm forward with dropout {name}", partial(forward, x, residual, master, bias, centred, 1e-6, *draws)
            backward_call = partial(backward, x, residual, x, master, centred, mean, rstd, residual is not None, *draws)
            yield f"norm backward with dropout {name}", backward_call
