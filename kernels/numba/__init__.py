"""CPU kernels in numba: simd.py holds the vectors, gemm.py the matrix product, then one file per operation.

Nothing is imported here: numba costs half a second, so a kernel is loaded when it is first used.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import cllm.runtime as runtime
from cllm.kernels.backend import Backend
from cllm.kernels.operations import OPERATIONS, Shapes


class _Numba(Backend):
    def workers(self, op: str, shapes: Shapes, dtype: str, planned: int, options: Mapping[str, Any]) -> tuple[int, str]:
        kernels = self.module(OPERATIONS[op].file)
        working = kernels.launched_workers(planned, shapes, getattr(torch, dtype), **options)
        return working, f"the work is cut into parts for {working}"


VARIABLES = ("CLLM_SIMD_LANES", "CLLM_BF16_KERNEL")  # environment variables that files in this folder read

# Files of the folder above whose constants the kernels hold.
CONSTANTS = ("operations.py", "philox.py", "quantization.py", "stack.py", "strips.py")

runtime.compiler.register_kernels(Path(__file__).parent, VARIABLES, [Path(__file__).parents[1] / name for name in CONSTANTS])
runtime.register_library("numba", "so the CPU kernels cannot run and plain torch does all the work. Install it: pip install numba")
runtime.register_library("llvmlite")

BACKEND = _Numba(
    package=__name__,
    priority={"cpu": 100},
    reason="explicit SIMD, every core",
    dtypes=("float32", "bfloat16"),
    requires="numba",
    max_head_dim=256,
)
