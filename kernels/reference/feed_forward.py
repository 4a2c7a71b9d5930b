"""Feed-forward layer in plain torch: gated (Shazeer 2020, arXiv 2002.05202) or the plain two-layer MLP.

N rows, E embed, F hidden. Weights are (out, in). The hidden values stay in the accumulation dtype.
"""

import math

import torch
from torch import Tensor

from cllm.kernels.reference import accumulate_dtype, as_rows, rounded_weight

_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)


def activate(z: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(z)
    if activation == "gelu":
        return torch.nn.functional.gelu(z)
    if activation == "gelu_tanh":
        return torch.nn.functional.gelu(z, approximate="tanh")
    return torch.relu(z).square()


def activation_slope(z: Tensor, activation: str) -> Tensor:
    """Derivative of the activation at z."""
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if activation == "gelu_tanh":
        t = torch.tanh(_SQRT_2_OVER_PI * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * z * z)
    return 2 * torch.relu(z)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.T
    return y if bias is None else y + bias.to(y.dtype)


def forward(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str, b_up: Tensor | None, b_down: Tensor | None
) -> Tensor:
    wide = accumulate_dtype(x.dtype)
    rows = as_rows(x).to(wide)  # (N, E)
    hidden = _linear(rows, rounded_weight(w_up, x.dtype), b_up)  # (N, F)
    if w_gate is None:
        hidden = activate(hidden, activation)
    else:
        hidden = activate(rows @ rounded_weight(w_gate, x.dtype).T, activation) * hidden
    return _linear(hidden, rounded_weight(w_down, x.dtype), b_down).to(x.dtype).view(*x.shape[:-1], w_down.shape[0])


def backward(
    dy: Tensor, x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str,
    b_up: Tensor | None, b_down: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients (dx, dw_gate, dw_up, dw_down, db_up, db_down); the hidden values are computed again from x."""
    wide = accumulate_dtype(x.dtype)
    rows = as_rows(x).to(wide)
    drows = as_rows(dy).to(wide)
    up_weight, down_weight = rounded_weight(w_up, x.dtype), rounded_weight(w_down, x.dtype)
    up = _linear(rows, up_weight, b_up)
    dhidden = drows @ down_weight  # (N, F)
    if w_gate is None:
        hidden = activate(up, activation)
        dup = dhidden * activation_slope(up, activation)
        dx = dup @ up_weight
        dw_gate = None
    else:
        gate_weight = rounded_weight(w_gate, x.dtype)
        gate = rows @ gate_weight.T
        gated = activate(gate, activation)
        hidden = gated * up
        dup = dhidden * gated
        dgate = dhidden * up * activation_slope(gate, activation)
        dx = dup @ up_weight + dgate @ gate_weight
        dw_gate = (dgate.T @ rows).to(w_gate.dtype)
    return (
        dx.to(x.dtype).view(x.shape),
        dw_gate,
        (dup.T @ rows).to(w_up.dtype),
        (drows.T @ hidden).to(w_down.dtype),
        None if b_up is None else dup.sum(dim=0).to(b_up.dtype),
        None if b_down is None else drows.sum(dim=0).to(b_down.dtype),
    )
