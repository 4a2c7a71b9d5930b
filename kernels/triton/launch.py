"""The one way into a Triton kernel: run it, interpret it, or write down what would have been compiled.

`launch(kernel, grid, *args, num_warps=..., num_stages=..., CONSTANT=...)`: args in the order of the kernel's parameters, compile-time constants by
name and last in the kernel's signature. On a GPU the second launch of a kind goes straight to the compiled kernel, past the argument binder of
Triton's JIT, which costs more than a small kernel runs. Inside `recording()` nothing runs: operations are called on meta tensors, and each launch
leaves a `Launch`, which `kernels/inspection.py` compiles for any target.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

Grid = tuple[int, ...]
LARGEST_INT32 = 2**31 - 1

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """What one launch compiles: parameters' types in Triton's notation, constants, and which arguments are multiples of 16."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    num_warps: int
    num_stages: int
    grid: Grid

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


if triton.knobs.runtime.interpret:
    from cllm.kernels.triton import interpreter

    interpreter.repair()

_recorded: ContextVar[list[Launch] | None] = ContextVar("cllm_recorded_launches", default=None)
_compiled: dict[tuple[Any, ...], Any] = {}


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside the scope are collected, not run. Tensors may be meta tensors."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    return _recorded.get() is not None


def launch(kernel: Any, grid: Grid, *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any) -> None:
    """Runs `kernel` over `grid` blocks; a grid with a 0 in it is nothing to do."""
    if 0 in grid:
        return
    launches = _recorded.get()
    if launches is not None:
        launches.append(_described(kernel, grid, args, num_warps, num_stages, constants))
        return
    first = next(arg for arg in args if isinstance(arg, Tensor))
    if first.device.type != "cuda":  # Triton's interpreter
        kernel[grid](*args, **constants)
        return
    if first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            _run(kernel, grid, args, num_warps, num_stages, constants, first.device.index)
    else:
        _run(kernel, grid, args, num_warps, num_stages, constants, first.device.index)


def _kind(arg: Any) -> Any:
    """All that Triton compiles differently for: dtype and alignment of pointers, 1 and multiples of 16 and 64 bits among integers."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() & 15 == 0
    if type(arg) is int:
        return 1 if arg == 1 else (arg & 15 == 0, -LARGEST_INT32 - 1 <= arg <= LARGEST_INT32)
    if hasattr(arg, "block_shape"):  # a tensor descriptor
        return arg.base.dtype, tuple(arg.block_shape), getattr(arg, "layout", None), arg.padding
    return arg if arg is None else type(arg)


def _run(kernel: Any, grid: Grid, args: tuple[Any, ...], num_warps: int, num_stages: int, constants: dict[str, Any], index: int) -> None:
    key = (kernel, index, num_warps, num_stages, *map(_kind, args), *constants.items())
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    compiled[(*grid, 1, 1)[:3]](*args, *constants.values())


def _described(kernel: Any, grid: Grid, args: tuple[Any, ...], num_warps: int, num_stages: int, constants: dict[str, Any]) -> Launch:
    names: list[str] = kernel.arg_names
    assert list(constants) == names[len(args) :], f"{kernel.__name__}: constants {list(constants)}, expected {names[len(args) :]} in this order"
    signature, fixed, aligned = [], [], []
    for position, (name, arg) in enumerate(zip(names, args)):
        kind = _parameter_type(arg)
        if kind == "constexpr":
            fixed.append((name, arg))
        elif (arg.storage_offset() * arg.element_size() if isinstance(arg, Tensor) else arg if type(arg) is int else 1) % 16 == 0:
            aligned.append(position)
        signature.append((name, kind))
    signature += [(name, "constexpr") for name in constants]
    fixed += constants.items()
    return Launch(kernel, tuple(signature), tuple(fixed), tuple(aligned), num_warps, num_stages, grid)


def _parameter_type(arg: Any) -> str:
    if isinstance(arg, Tensor):
        return f"*{TYPES[arg.dtype]}"
    if arg is None or (type(arg) is int and arg == 1):  # Triton compiles these in
        return "constexpr"
    if isinstance(arg, bool):
        return "i1"
    if isinstance(arg, int):
        return "i32" if -LARGEST_INT32 - 1 <= arg <= LARGEST_INT32 else "i64"
    if isinstance(arg, float):
        return "fp32"
    if hasattr(arg, "block_shape"):  # a host-side tensor descriptor, of Triton or of Gluon (which has a layout)
        layout = f",{arg.layout!r}" if hasattr(arg, "layout") else ""
        return f"tensordesc<{TYPES[arg.base.dtype]}{list(arg.block_shape)}{layout}>"
    raise TypeError(f"no parameter type for {type(arg)}")


def next_power_of_2(n: int) -> int:
    return int(triton.next_power_of_2(n))


Calls = Iterator[tuple[str, Callable[[], Any]]]
"""What `launches(gpu, dtype)` of every kernel file yields: a name, and a call on meta tensors that makes one kind of launch."""
