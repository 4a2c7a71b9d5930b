"""How the functions that kernels are made of are compiled: to be called by compiled code alone, without what Python would need to call them.

`called_by_python` is for the few functions that Python calls.
"""

from collections.abc import Callable
from typing import Any

from cllm.runtime import compiler

compiler.numba_setup()

import numba  # noqa: E402
from numba import types  # noqa: E402

from cllm.runtime.workers.linked import linked  # noqa: E402

# Integer division is checked for zero in Python's error model; numpy's leaves it to us. numba compiles a function again for each constant that it is
# called with.
jit = linked(cache=True)
called_by_python: Any = numba.njit(cache=True, nogil=True, error_model="numpy")
_inline = linked(cache=True, forceinline=True)


def inline(function: Callable[..., Any]) -> Any:
    """A function that becomes a part of whoever calls it. It is compiled once for all constants: LLVM sees them where it is called."""
    compiled = _inline(function)
    template = compiled.get_call_template
    compiled.get_call_template = lambda args, kws: template(*_without_constants(args, kws))
    return compiled


def _without_constants(args: Any, kws: Any) -> tuple[Any, Any]:
    return tuple(map(types.unliteral, args)), {name: types.unliteral(each) for name, each in dict(kws).items()}
