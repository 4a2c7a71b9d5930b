"""Matrix product in plain torch. M rows, K summed over, N columns."""

import torch
from torch import Tensor

from cllm.kernels.torch import accumulate_dtype, rounded_weight


def matmul(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """a (M, K) @ b (K, N) + bias (N,), computed in a's dtype with wide accumulators, rounded once to `out_dtype`."""
    wide = accumulate_dtype(a.dtype)
    product = a.to(wide) @ rounded_weight(b, a.dtype)
    if bias is not None:
        product = product + bias.to(wide)
    return product.to(out_dtype)


def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x (N, C) -> (C,) in dtype, as a product with ones: one fixed order of additions, which torch's own sum does not promise."""
    wide = x.to(accumulate_dtype(x.dtype))
    return (torch.ones((1, x.shape[0]), dtype=wide.dtype, device=x.device) @ wide)[0].to(dtype)
