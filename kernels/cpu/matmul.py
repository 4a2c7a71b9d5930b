"""Matrix product on the CPU: one call of gemm.py."""

import torch

from cllm.kernels.cpu.gemm import gemm


def matmul(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """a (M, K) @ b (K, N) + bias (N,) in a's dtype with float32 accumulation, rounded once to `out_dtype`."""
    return gemm(a, b, bias=bias, out_dtype=out_dtype)
