"""Products with int8 weights (`quantization.py`), for generation: no gradients."""

from typing import Any

from torch import Tensor

from cllm.kernels._register import backend
from cllm.kernels.quantization import Quantized
from cllm.runtime.errors import UserError


def quantized_matmul(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """x (..., K) @ weight (N, K).T + bias (N,) -> (..., N) in x's dtype; no gradients."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return _serving(rows, weight).matmul(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def quantized_feed_forward(
    x: Tensor, w_gate: Quantized | None, w_up: Quantized, w_down: Quantized, *, activation: str, b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `feed_forward`, of int8 weights; no gradients."""
    rows = x.detach().reshape(-1, x.shape[-1])
    y = _serving(rows, w_up).feed_forward(rows, w_gate, w_up, w_down, activation, b_up, b_down)
    return y.view(*x.shape[:-1], w_down.shape[0])


def _serving(rows: Tensor, weight: Quantized) -> Any:
    if rows.shape[1] != weight.shape[1]:
        raise UserError(f"int8 weights {weight.shape} do not fit inputs of width {rows.shape[1]}.")
    return backend("quantized", (tuple(rows.shape), weight.shape), rows.dtype, rows.device.type)
