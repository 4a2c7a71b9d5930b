"""Products with int8 weights on the CPU. M rows, K inputs, N outputs.

Where the CPU has int8 tiles and the activations are bfloat16, any number of rows goes through matvec.py; otherwise few rows do, and many are
multiplied with the dequantised weights, which gives the same bits.
"""

import math
from typing import Any

import torch
from torch import Tensor

from cllm.kernels.numba import feed_forward as dense
from cllm.kernels.numba import gemm, matvec
from cllm.kernels.numba.launch import at_most, num_workers
from cllm.kernels.operations import Shapes
from cllm.kernels.quantization import Quantized


def _workers(x: Tensor, weight: Quantized) -> int:
    return num_workers("quantized", (x.shape, weight.shape), x.dtype)


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers a product uses."""
    (*rows, depth), (columns, _) = shapes
    num_rows = math.prod(rows)
    if not num_rows * columns:
        return 1
    if not _serves(num_rows, dtype):
        return gemm.launched_workers(num_workers("matmul", ((num_rows, depth), (depth, columns)), dtype), num_rows, depth, columns, dtype)
    return at_most(planned, -(-columns // matvec.task_columns(columns, planned)))


def _rows_at_a_time(x: Tensor) -> int:
    return matvec.INTEGER_ROWS if matvec.in_integers(x.dtype) else matvec.MOST_ROWS


def _serves(num_rows: int, dtype: torch.dtype) -> bool:
    """Whether the rows go through matvec.py."""
    return num_rows <= matvec.MOST_ROWS or matvec.in_integers(dtype)


def matmul(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N) in x's dtype."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if not _serves(x.shape[0], x.dtype):
        return gemm.gemm(x, weight.dequantize(x.dtype).t(), bias=bias)
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
    if not _serves(x.shape[0], x.dtype):
        gate = None if w_gate is None else w_gate.dequantize(x.dtype)
        return dense.forward(x, gate, w_up.dequantize(x.dtype), w_down.dequantize(x.dtype), activation, b_up, b_down, False)[0]
    out = torch.empty((x.shape[0], w_down.shape[0]), dtype=x.dtype)
    step, workers = _rows_at_a_time(x), _workers(x, w_up)
    for first in range(0, x.shape[0], step):
        part = x[first : first + step]
        hidden = matvec.activated(part, w_gate, w_up, b_up, activation, workers)
        matvec.matvec(hidden, w_down, b_down, workers, out[first : first + step])
    return out
