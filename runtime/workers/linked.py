"""Functions that compiled code alone calls: without what Python would need to call them they take a fifth less time to compile."""

from collections.abc import Callable
from typing import Any

from cllm.runtime import compiler

compiler.numba_setup()

import numba  # noqa: E402
from numba.core.registry import CPUDispatcher  # noqa: E402

_njit: Any = numba.njit  # numba's annotations leave out some of these options
_Dispatcher: Any = CPUDispatcher


class _Linked(_Dispatcher):
    """A compiled function that Python cannot call: numba's own would jump to an address that is not there, and end the process."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{self.py_func.__module__}.{self.py_func.__name__} is compiled for other compiled functions alone. Call it inside of a kernel, or "
            "compile it as one that Python calls: @called_by_python."
        )


def linked(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator. options: what `numba.njit` takes beside."""
    compile = _njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)

    def decorate(function: Callable[..., Any]) -> Any:
        compiled = compile(function)
        compiled.__class__ = _Linked
        return compiled

    return decorate
