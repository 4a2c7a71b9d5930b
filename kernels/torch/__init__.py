"""Every operation in plain torch, in any floating dtype up to float64 and on any device.

Each module has the same function names and signatures as its twin in `kernels/numba`. The reference is the oracle that the fast
kernels are tested against, and the backend "torch" that serves whatever they cannot. It is written for correctness and
readability: half-precision inputs are computed in float32 and rounded once at the end.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cllm.kernels.backend import Backend
from cllm.kernels.operations import Shapes


class _Reference(Backend):
    def workers(self, op: str, shapes: Shapes, dtype: str, planned: int, options: Mapping[str, Any]) -> tuple[int, str]:
        pool = torch.get_num_threads()
        return pool, f"torch decides by itself how many of its {pool} threads it uses"


BACKEND = _Reference(package=__name__, priority=dict.fromkeys(("cpu", "cuda", "mps", "xpu"), 0), reason="plain torch serves every dtype and device")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are computed: float64 stays, everything narrower is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_rows(x: Tensor) -> Tensor:
    """(..., E) -> (N, E), a view where the strides allow it; a width of 0 is no obstacle."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def rounded_weight(weight: Tensor, activation: torch.dtype) -> Tensor:
    """`weight` in the accumulation dtype, after the rounding to the activation's dtype that every backend makes."""
    return weight.to(activation).to(accumulate_dtype(activation))


def fixed_order_sum(values: Tensor) -> Tensor:
    """Sum of all values as a 0-d tensor; the order of additions depends on their number only, never on torch's thread count.

    torch splits one long sum over its threads (from 32768 elements on), so that bits follow the thread count; a sum along short
    rows is never split.
    """
    flat, row = values.reshape(-1), 4096
    while flat.numel() > row:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % row)).view(-1, row).sum(dim=1)
    return flat.sum()
