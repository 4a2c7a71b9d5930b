"""Products with int8 weights on the CPU. M rows, K inputs, N outputs.

Where the CPU has int8 tiles and the activations are bfloat16, any number of rows goes through matvec.py; otherwise few rows do, and many are
multiplied with the dequantised weights, which gives the same bits.
"""

import torch
from torch import Tensor

from cllm.kernels.numba import feed_forward as dense
from cllm.kernels.numba import matvec
from cllm.kernels.numba.gemm import gemm
from cllm.kernels.numba.launch import num_workers
from cllm.kernels.quantized import Quantized


def _workers(x: Tensor, weight: Quantized) -> int:
    return num_workers("quantized", (tuple(x.shape), weight.shape), x.dtype, 2.0 * x.numel() * weight.shape[0])


def _rows_at_a_time(x: Tensor) -> int:
    return matvec.INTEGER_ROWS if matvec.in_integers(x.dtype) else matvec.MOST_ROWS


def _serves(x: Tensor) -> bool:
    return x.shape[0] <= matvec.MOST_ROWS or matvec.in_integers(x.dtype)


def matmul(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N) in x's dtype."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if not _serves(x):
        return gemm(x, weight.dequantize(x.dtype).t(), bias=bias)
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    step = _rows_at_a_time(x)
    for first in range(0, x.shape[0], step):
        matvec.matvec(x[first : first + step], weight, bias, _workers(x, weight), out[first : first + step])
    return out


def feed_forward(
    x: Tensor, w_gate: Quantized | None, w_up: Quantized, w_down: Quantized, activation: str, b_up: Tensor | None, b_down: Tensor | None
) -> Tensor:
    """x (M, E) -> (M, E_out)."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if not _serves(x):
        gate = None if w_gate is None else w_gate.dequantize(x.dtype)
        return dense.forward(x, gate, w_up.dequantize(x.dtype), w_down.dequantize(x.dtype), activation, b_up, b_down, False)[0]
    out = torch.empty((x.shape[0], w_down.shape[0]), dtype=x.dtype)
    step, workers = _rows_at_a_time(x), _workers(x, w_up)
    for first in range(0, x.shape[0], step):
        part = x[first : first + step]
        hidden = matvec.activated(part, w_gate, w_up, b_up, activation, workers)
        matvec.matvec(hidden, w_down, b_down, workers, out[first : first + step])
    return out
