"""Embedding look-up in plain torch. V rows, E columns."""

import torch
from torch import Tensor

from cllm.kernels.torch import accumulate_dtype, as_rows


def forward(tokens: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Row `tokens[...]` of weight (V, E) in `dtype`."""
    return torch.nn.functional.embedding(tokens, weight).to(dtype)


def backward(dy: Tensor, tokens: Tensor, num_rows: int, weight_dtype: torch.dtype) -> Tensor:
    """Gradient of the table: rows of dy added in the order of the tokens, so that the sum never depends on threads."""
    wide = accumulate_dtype(torch.float64 if torch.float64 in (dy.dtype, weight_dtype) else dy.dtype)
    rows = as_rows(dy).to(wide)
    if rows.numel() == 0:
        return torch.zeros((num_rows, dy.shape[-1]), dtype=weight_dtype, device=dy.device)
    dweight = torch.ops.aten.embedding_dense_backward(rows, tokens.reshape(-1), num_rows, -1, False)
    return dweight.to(weight_dtype)


def add_rows(dy: Tensor, tokens: Tensor, dweight: Tensor) -> None:
    """Adds `backward` to dweight (V, E), whose rows that were not looked up stay as they are."""
    rows, places = torch.unique(tokens.reshape(-1), return_inverse=True)
    dweight.index_add_(0, rows, backward(dy, places, rows.numel(), dweight.dtype))  # each row once: in no order
