"""Triton kernels, one file per operation, each with the functions of its twin in `kernels/torch`.

Nothing is compiled or imported before an operation first runs on a GPU. Every launch goes through `launch.py`, which can also record it:
that is how all configurations are compiled and inspected on a machine without a GPU.
"""

import os

from cllm import runtime
from cllm.kernels.backend import Backend

# Under Triton's interpreter the kernels run on a CPU too, where they are asked for by name: slow, and exact enough to test every one of them.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

runtime.register_library("triton")

BACKEND = Backend(
    package=__name__,
    priority={"cuda": 100} | ({"cpu": -1} if INTERPRETED else {}),
    reason="fused Triton kernels",
    dtypes=("float32", "bfloat16", "float16"),
    requires="triton",
    max_head_dim=256,
)
