"""What kernels are made of is compiled once, and translated only as a part of them."""

import ctypes
import gc

import numba
import pytest
from numba import types

from cllm.kernels.numba.compiling import called_by_python, inline, jit
from cllm.runtime import kernel_linking
from cllm.runtime.workers import loop

LIMIT = 3


@inline
def _inlined(x, times):
    return x * times


@jit
def _called(x):
    total = 0
    for i in range(LIMIT):
        total += _inlined(x, 1) + _inlined(x, 2) + i
    return total


@called_by_python
def _asked(x):
    return _called(x)


@numba.cfunc(types.int64(types.int64))
def _outer(x):
    return _called(x) + _inlined(x, 5)


def test_a_kernel_with_functions_that_are_only_linked_computes_what_python_does():
    assert ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(_outer.address)(7) == 3 * 3 * 7 + 3 + 5 * 7
    assert _asked(7) == 3 * 3 * 7 + 3
    assert gc.isenabled()  # which it is not while numba compiles


def test_only_what_is_called_from_outside_is_translated():
    """In a numba whose compiler was not looked at every function is."""
    is_known = kernel_linking.is_known(numba.version_info.full)
    for part in (_inlined, _called):
        (compiled,) = part.overloads.values()  # one for all constants
        assert getattr(compiled.library, "is_only_linked", False) == is_known == (not compiled.library._finalized)
    assert _outer._library._finalized


@pytest.mark.parametrize(("part", "arguments"), [(_called, (7,)), (_inlined, (7, 5)), (loop._claim, (0,))])
def test_python_that_calls_what_is_only_linked_gets_an_error_and_the_process_lives_on(part, arguments):
    with pytest.raises(TypeError, match=rf"\.{part.py_func.__name__} is compiled for other compiled functions alone.*called_by_python"):
        part(*arguments)


def test_versions_of_numba_whose_compiler_was_not_looked_at_compile_as_they_do():
    assert [kernel_linking.is_known(version) for version in ((0, 62, 1), (0, 64, 0), (0, 68, 1), (0, 69, 0), (1, 0))] == [
        False,
        True,
        True,
        False,
        False,
    ]
