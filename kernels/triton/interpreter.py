"""Triton's interpreter, made to compute in bfloat16 as a GPU does: it multiplies the bits of bfloat16 matrices as whole numbers, and cuts float32
off where a GPU rounds it to nearest (Triton 3.6 and 3.7). That of 3.6 does not know NumPy 2.4, which makes no number of an array of one."""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _widened(tensor: Any) -> Any:
    if tensor.dtype.scalar != tl.bfloat16:
        return tensor
    return interpreter.TensorHandle((tensor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def repair() -> None:
    """Applied once, by `launch.py`, where kernels are interpreted."""
    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float
    if getattr(builder, "repaired_by_cllm", False):
        return
    dot, patch = builder.create_dot, interpreter._patch_lang_tensor

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, _widened(a), _widened(b), d, *options)

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        return torch.from_numpy(values.view(np.float32)).bfloat16().view(torch.uint16).numpy().reshape(values.shape)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.create_dot, interpreter._convert_float, builder.repaired_by_cllm = create_dot, convert_float, True
