"""Triton's interpreter (Triton 3.6 and 3.7), made to compute in bfloat16 as a GPU does, and quick.

It multiplies the bits of bfloat16 matrices as whole numbers, and cuts float32 off where a GPU rounds it to nearest. That of 3.6 does not know NumPy
2.4, which makes no number of an array of one.

More than half of the time of an interpreted kernel went into what the language derives anew for every operation although a kernel has a handful of
types and shapes: the type of a block, its shape as constants, the type of that tuple. Each is made once here. And it asked of every sum of whole
numbers whether it overflows, only to leave the answer unused unless its option `debug` is set.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language import core, semantic
from triton.runtime import interpreter


def repair() -> None:
    """Applied once, by `launch.py`, where kernels are interpreted."""
    if not getattr(interpreter.InterpreterBuilder, "repaired_by_cllm", False):
        interpreter.InterpreterBuilder.repaired_by_cllm = True
        _compute_as_a_gpu()
        _make_types_once()


# -- the same numbers as on a GPU -----------------------------------------------------------------------------------------------


def _compute_as_a_gpu() -> None:
    builder, convert, patch = interpreter.InterpreterBuilder, interpreter._convert_float, interpreter._patch_lang_tensor
    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, _widened(a), _widened(b), d, *options)

    def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        return torch.from_numpy(values.view(np.float32)).bfloat16().view(torch.uint16).numpy().reshape(values.shape)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    builder.create_dot, interpreter._convert_float, interpreter._patch_lang_tensor = create_dot, convert_float, patch_lang_tensor


def _widened(tensor: Any) -> Any:
    if tensor.dtype.scalar != tl.bfloat16:
        return tensor
    return interpreter.TensorHandle((tensor.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


# -- in less time ---------------------------------------------------------------------------------------------------------------


def _make_types_once() -> None:
    interpreter.InterpretedFunction.__call__ = _call_inside
    interpreter._get_np_dtype = _numpy_type
    core._unwrap_if_constexpr = _plain
    core.dtype.__eq__ = _same_type
    core.tuple.type = property(_type_of_tuple, lambda self, kind: self.__dict__.__setitem__("type", kind))
    core.tuple.__init__ = _init_tuple
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>", lambda self, name: None)
    core.block_type.__init__ = _init_block_type
    core.tensor.__init__ = _init_tensor
    semantic.TritonSemantic.broadcast_impl_value = _broadcast
    semantic.TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow


_call_first = interpreter.InterpretedFunction.__call__
_numpy_type_of, _plain_of, _is_same_type = interpreter._get_np_dtype, core._unwrap_if_constexpr, core.dtype.__eq__
_init_new_block_type, _broadcast_to_each_other = core.block_type.__init__, semantic.TritonSemantic.broadcast_impl_value


@cache
def _languages(function: Any) -> tuple[Any, ...]:
    """The modules of the language that a function sees: `tl`, or `tl.core`, whose names are replaced one by one."""
    return tuple(each for each in function.__globals__.values() if each is tl or each is tl.core)


def _call_inside(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls, where the language it sees is the interpreter's already; Triton looked through it all again."""
    if any(tl.core.is_builtin(language.load) for language in _languages(self.fn)):
        return _call_first(self, *args, **kwargs)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


@cache
def _numpy_type_of_scalar(kind: Any) -> Any:
    return _numpy_type_of(kind)


def _numpy_type(kind: Any) -> Any:
    scalar = kind.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _numpy_type_of_scalar(scalar)


def _plain(value: Any) -> Any:
    """What a constant stands for; of tuples and lists that of each element."""
    kind = type(value)
    if kind is core.constexpr:
        return value.value
    return value if kind is int or kind is core.tensor else _plain_of(value)


def _same_type(self: Any, other: Any) -> bool:
    return self is other or _is_same_type(self, other)


def _init_tuple(self: Any, args: Any, type: Any = None) -> None:
    self.values = list(args)
    if type is not None:
        self.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)


def _type_of_tuple(self: Any) -> Any:
    if "type" not in self.__dict__:
        self.type = core._type_for_tuple_values(self.values)
    return self.__dict__["type"]


_shapes: dict[tuple[int, ...], Any] = {}  # of blocks, as their types have them, by their lengths
_NO_SHAPE, _ONE = core.tuple([]), core.constexpr(1)


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    if "of_tensors" not in getattr(shape, "__dict__", ()):
        lengths = tuple([_plain(length) for length in _plain(shape)])
        if lengths not in _shapes:
            _init_new_block_type(self, element_ty, shape)  # raises where there is no such block
            constants = core.tuple([core.constexpr(length) for length in lengths])
            self.shape.numel, self.shape.of_tensors = self.numel, (constants, core.constexpr(self.numel))
            _shapes[lengths] = self.shape
        shape = _shapes[lengths]
    self.element_ty, self.shape, self.numel = element_ty, shape, shape.numel


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.shape.of_tensors if type.is_block() else (_NO_SHAPE, _ONE)


def _broadcast(self: Any, left: Any, right: Any) -> Any:
    blocks = left.type.is_block() + right.type.is_block()
    if blocks == 0 or (blocks == 2 and left.type.shape is right.type.shape):
        return left, right
    if blocks == 2 and len(left.type.shape) == len(right.type.shape):
        ours, theirs = left.type.shape.values, right.type.shape.values
        lengths = [other if length == 1 else length for length, other in zip(ours, theirs, strict=True)]
        if all(other in (1, length) for other, length in zip(theirs, lengths, strict=True)):
            return _stretched(self, left, lengths), _stretched(self, right, lengths)
    return _broadcast_to_each_other(self, left, right)


def _stretched(self: Any, block: Any, lengths: list[int]) -> Any:
    if block.type.shape.values == lengths:
        return block
    return self.tensor(self.builder.create_broadcast(block.handle, lengths), core.block_type(block.dtype, lengths))


_OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _refuse_overflow(self: Any, left: Any, right: Any, operation: Any) -> None:
    kind = left.type.scalar
    if not self.builder.options.debug or kind.int_bitwidth >= 64:
        return
    exact = _OPERATIONS[operation.__name__](left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
    if exact.max() > kind.get_int_max_value() or exact.min() < kind.get_int_min_value():
        raise AssertionError(f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}")
