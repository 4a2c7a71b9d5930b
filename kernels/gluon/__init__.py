"""Attention kernels in Gluon that need Hopper's instructions: chosen where they were measured to be faster, or asked for by name."""

import torch

from cllm.kernels.backend import Backend
from cllm.kernels.operations import Shapes
from cllm.runtime.gpu import gpu_of

HEAD_DIMS = (64, 128, 256)


class _Hopper(Backend):
    def can_serve(self, op: str, shapes: Shapes, dtype: str, device: str) -> tuple[bool, str]:
        if not gpu_of(torch.device(device)).is_hopper:
            return False, "its kernels need a Hopper GPU"
        if op == "attention" and shapes and shapes[0][-1] not in HEAD_DIMS:
            return False, f"its kernels take heads of {', '.join(map(str, HEAD_DIMS))}, not {shapes[0][-1]}"
        return super().can_serve(op, shapes, dtype, device)


BACKEND = _Hopper(
    package=__name__,
    priority={"cuda": 90},
    reason="warp-specialised for Hopper",
    dtypes=("bfloat16", "float16"),
    requires="triton",
)
