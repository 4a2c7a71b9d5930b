"""Triton's interpreter, made to compute in bfloat16 as a GPU does: it multiplies the bits of bfloat16 matrices as whole numbers, and cuts float32
off where a GPU rounds it to nearest (Triton 3.6 and 3.7). That of 3.6 does not know NumPy 2.4, which makes no number of an array of one. Each call
of a function inside a kernel looked through the whole language again for names to replace, which took a third of the time of interpreted kernels."""

from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _widened(tensor: Any) -> Any:
    if tensor.dtype.scalar != tl.bfloat16:
        return tensor
    return interpreter.TensorHandle((tensor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@cache
def _languages(function: Any) -> tuple[Any, ...]:
    """The modules of the language that a function sees: `tl`, or `tl.core`, whose names are replaced one by one."""
    return tuple(each for each in function.__globals__.values() if each is tl or each is tl.core)


def _call_inside(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls, where the language it sees is the interpreter's already."""
    if any(tl.core.is_builtin(language.load) for language in _languages(self.fn)):
        return _call_first(self, *args, **kwargs)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


_call_first = interpreter.InterpretedFunction.__call__


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
    interpreter.InterpretedFunction.__call__ = _call_inside
    builder.create_dot, interpreter._convert_float, builder.repaired_by_cllm = create_dot, convert_float, True
