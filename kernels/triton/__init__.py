"""Triton kernels, one file per operation, each with the functions of its twin in `kernels/torch`.

Nothing is compiled or imported before an operation first runs on a GPU. Every launch goes through `launch.py`, which can also record it:
that is how all configurations are compiled and inspected on a machine without a GPU.
"""

import os

import cllm.runtime as runtime
from cllm.kernels.backend import Backend
from cllm.kernels.operations import Shapes

# Under Triton's interpreter the kernels run on a CPU too, where they are asked for by name: slow, and exact enough to test every one of them.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

runtime.register_library("triton")

LARGEST_HEAD_WITH_DROPOUT = 128  # beyond it no tile of the backward keeps its mask in registers


class _Triton(Backend):
    def can_serve(self, op: str, shapes: Shapes, dtype: str, device: str) -> tuple[bool, str]:
        if op == "attention_dropout" and shapes and shapes[0][-1] > LARGEST_HEAD_WITH_DROPOUT:
            return False, f"with dropout its kernels take heads of up to {LARGEST_HEAD_WITH_DROPOUT}, not {shapes[0][-1]}"
        return super().can_serve(op, shapes, dtype, device)


BACKEND = _Triton(
    package=__name__,
    priority={"cuda": 100} | ({"cpu": -1} if INTERPRETED else {}),
    reason="fused Triton kernels",
    dtypes=("float32", "bfloat16", "float16"),
    requires="triton",
    max_head_dim=256,
)
