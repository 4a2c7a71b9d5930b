"""Feed-forward layer in plain torch: gated (Shazeer 2020, arXiv 2002.05202) or the plain two-layer MLP.

N rows, E embed, F hidden. Weights are (out, in). What goes into the activation is rounded to x's dtype, what comes out is not.
"""

import math

import torch
from torch import Tensor

from cllm.kernels.torch import accumulate_dtype, as_rows, rounded_weight

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


def _pre_activations(x: Tensor, w_gate: Tensor | None, w_up: Tensor, b_up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(z, up or None) in x's dtype, (N, F)."""
    rows = as_rows(x).to(accumulate_dtype(x.dtype))
    up = _linear(rows, rounded_weight(w_up, x.dtype), b_up).to(x.dtype)
    if w_gate is None:
        return up, None
    return (rows @ rounded_weight(w_gate, x.dtype).T).to(x.dtype), up


def forward(
    x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str, b_up: Tensor | None, b_down: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, z, up); z and up (N, F) in x's dtype only when `keep`, up only when gated."""
    wide = accumulate_dtype(x.dtype)
    z, up = _pre_activations(x, w_gate, w_up, b_up)
    hidden = activate(z.to(wide), activation)
    if up is not None:
        hidden = hidden * up.to(wide)
    y = _linear(hidden, rounded_weight(w_down, x.dtype), b_down).to(x.dtype).view(*x.shape[:-1], w_down.shape[0])
    return y, z if keep else None, up if keep else None


def backward(
    dy: Tensor, x: Tensor, w_gate: Tensor | None, w_up: Tensor, w_down: Tensor, activation: str,
    b_up: Tensor | None, b_down: Tensor | None, kept_z: Tensor | None, kept_up: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients (dx, dw_gate, dw_up, dw_down, db_up, db_down); z and up are computed again where they were not kept."""
    wide = accumulate_dtype(x.dtype)
    rows, drows = as_rows(x).to(wide), as_rows(dy).to(wide)
    up_weight, down_weight = rounded_weight(w_up, x.dtype), rounded_weight(w_down, x.dtype)
    saved_z, saved_up = (kept_z, kept_up) if kept_z is not None else _pre_activations(x, w_gate, w_up, b_up)
    z = saved_z.to(wide)
    dhidden = drows @ down_weight  # (N, F)
    hidden, slope = activate(z, activation), activation_slope(z, activation)
    if w_gate is None:
        dup = dhidden * slope
        dx = dup @ up_weight
        dw_gate = None
    else:
        assert saved_up is not None
        up, gated = saved_up.to(wide), hidden
        hidden = gated * up
        dup = dhidden * gated
        dgate = dhidden * up * slope
        dx = dup @ up_weight + dgate @ rounded_weight(w_gate, x.dtype)
        dw_gate = (dgate.T @ rows).to(w_gate.dtype)
    return (
        dx.to(x.dtype).view(x.shape),
        dw_gate,
        (dup.T @ rows).to(w_up.dtype),
        (drows.T @ hidden).to(w_down.dtype),
        None if b_up is None else dup.sum(dim=0).to(b_up.dtype),
        None if b_down is None else drows.sum(dim=0).to(b_down.dtype),
    )
