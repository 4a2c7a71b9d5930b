"""Products with weights packed for inference on the CPU (strips.py, quantization.py). M rows, K inputs, N outputs.

A few rows go through matvec.py, which reads the weights once, and so does any number where int8 weights are multiplied as integers. Many rows go
through gemm.py, with the same bits: from strips as they lie, from int8 weights dequantised.
"""

import math
from typing import Any

import torch
from torch import Tensor

from cllm.kernels.numba import feed_forward as dense
from cllm.kernels.numba import gemm, matvec
from cllm.kernels.numba.launch import at_most, num_workers
from cllm.kernels.operations import Shapes
from cllm.kernels.stack import Packed
from cllm.kernels.strips import Strips


def packing_pays(dtype: torch.dtype) -> bool:
    """Whether products of a few rows of `dtype` are faster with weights in strips; AMX reads rows of bfloat16 as they are."""
    return gemm.kernel_for(dtype) != gemm.TILES


def _workers(x: Tensor, weight: Packed) -> int:
    return num_workers("quantized", (x.shape, weight.shape), x.dtype)


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers a product with int8 weights uses."""
    (*rows, depth), (columns, _) = shapes
    num_rows = math.prod(rows)
    if not num_rows * columns:
        return 1
    if dtype != torch.bfloat16 and num_rows > matvec.MOST_ROWS:
        return gemm.launched_workers(num_workers("matmul", ((num_rows, depth), (depth, columns)), dtype), num_rows, depth, columns, dtype)
    return at_most(planned, -(-columns // matvec.task_columns(columns, planned)))


def _serves(x: Tensor, weight: Packed) -> bool:
    """Whether the rows go through matvec.py."""
    return x.shape[0] <= matvec.MOST_ROWS or matvec.in_integers(weight, x.dtype)


def _right(weight: Packed, dtype: torch.dtype) -> Tensor | Strips:
    """What gemm.py reads."""
    return weight if isinstance(weight, Strips) else weight.dense(dtype)


def matmul(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N) in x's dtype."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if not _serves(x, weight):
        return gemm.gemm(x, _right(weight, x.dtype).t(), bias=bias)
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype)
    step = matvec.most_rows(weight, x.dtype)
    for first in range(0, x.shape[0], step):
        matvec.matvec(x[first : first + step], weight, bias, _workers(x, weight), out[first : first + step])
    return out


def feed_forward(
    x: Tensor, w_gate: Packed | None, w_up: Packed, w_down: Packed, activation: str, b_up: Tensor | None, b_down: Tensor | None
) -> Tensor:
    """x (M, E) -> (M, E_out)."""
    x = x if x.stride(1) == 1 else x.contiguous()
    if not _serves(x, w_up):
        gate = None if w_gate is None else _right(w_gate, x.dtype)
        return dense.forward(x, gate, _right(w_up, x.dtype), _right(w_down, x.dtype), activation, b_up, b_down, False)[0]
    out = torch.empty((x.shape[0], w_down.shape[0]), dtype=x.dtype)
    step, workers = min(matvec.most_rows(each, x.dtype) for each in (w_up, w_down)), _workers(x, w_up)
    for first in range(0, x.shape[0], step):
        part = x[first : first + step]
        hidden = matvec.activated(part, w_gate, w_up, b_up, activation, workers)
        matvec.matvec(hidden, w_down, b_down, workers, out[first : first + step])
    return out
