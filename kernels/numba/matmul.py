"""Matrix product on the CPU: one call of gemm.py, and the sums of columns that its bias needs."""

import math
from typing import Any

import torch

from cllm.kernels.numba import gemm
from cllm.kernels.numba.sums import column_sums
from cllm.kernels.operations import Shapes

__all__ = ["column_sums", "launched_workers", "matmul"]


def launched_workers(planned: int, shapes: Shapes, dtype: torch.dtype, **options: Any) -> int:
    """How many of the planned workers the product uses."""
    (*rows, depth), (_, columns) = shapes
    return gemm.launched_workers(planned, math.prod(rows), depth, columns, dtype)


def matmul(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """a (M, K) @ b (K, N) + bias (N,) in a's dtype with float32 accumulation, rounded once to `out_dtype`."""
    return gemm.gemm(a, b, bias=bias, out_dtype=out_dtype)
