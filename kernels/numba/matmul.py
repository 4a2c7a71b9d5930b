"""Matrix product on the CPU: one call of gemm.py, and the sums of columns that its bias needs."""

import torch

from cllm.kernels.numba.gemm import gemm
from cllm.kernels.numba.sums import column_sums

__all__ = ["column_sums", "matmul"]


def matmul(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """a (M, K) @ b (K, N) + bias (N,) in a's dtype with float32 accumulation, rounded once to `out_dtype`."""
    return gemm(a, b, bias=bias, out_dtype=out_dtype)
