"""Softmax over the last dimension in plain torch."""

import torch
from torch import Tensor

from cllm.kernels.torch import accumulate_dtype


def forward(x: Tensor) -> Tensor:
    return torch.softmax(x.to(accumulate_dtype(x.dtype)), dim=-1).to(x.dtype).contiguous()


def backward(dy: Tensor, y: Tensor) -> Tensor:
    wide = accumulate_dtype(y.dtype)
    p, dp = y.to(wide), dy.to(wide)
    return (p * (dp - (p * dp).sum(dim=-1, keepdim=True))).to(y.dtype).contiguous()
