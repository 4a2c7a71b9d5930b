"""Products with weights packed for inference (`strips.py`, `quantization.py`): no gradients."""

from typing import Any

import torch
from torch import Tensor

from cllm.kernels._register import backend, backend_for
from cllm.kernels.stack import Packed
from cllm.kernels.strips import Strips
from cllm.runtime.errors import UserError


def quantized_matmul(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """x (..., K) @ weight (N, K).T + bias (N,) -> (..., N) in x's dtype; no gradients."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return _serving(rows, weight).matmul(rows, weight, bias).view(*x.shape[:-1], weight.shape[0])


def quantized_feed_forward(
    x: Tensor, w_gate: Packed | None, w_up: Packed, w_down: Packed, *, activation: str, b_up: Tensor | None = None, b_down: Tensor | None = None
) -> Tensor:
    """As `feed_forward`, of packed weights; no gradients."""
    rows = x.detach().reshape(-1, x.shape[-1])
    y = _serving(rows, w_up).feed_forward(rows, w_gate, w_up, w_down, activation, b_up, b_down)
    return y.view(*x.shape[:-1], w_down.shape[0])


def packing_pays(dtype: torch.dtype, device_type: str) -> bool:
    """Whether weights in strips are read faster than matrices by products of a few rows of `dtype`."""
    module = backend_for("quantized", ((1, 64), (64, 64)), dtype, device_type).module("quantized")
    return hasattr(module, "packing_pays") and module.packing_pays(dtype)


def _serving(rows: Tensor, weight: Packed) -> Any:
    if rows.shape[1] != weight.shape[1]:
        raise UserError(f"packed weights {weight.shape} do not fit inputs of width {rows.shape[1]}.")
    if isinstance(weight, Strips) and weight.dtype == torch.float32 != rows.dtype:
        raise UserError(f"the weights were packed for activations of float32, got {rows.dtype}. Choose the compute dtype before packing.")
    return backend("quantized", (tuple(rows.shape), weight.shape), rows.dtype, rows.device.type)
