"""numba for tokenizers: `@jit` compiles a function once for this machine and keeps it where all compiled kernels are kept."""

from pathlib import Path

from cllm.runtime.compiler import numba_setup, register_kernels

register_kernels(Path(__file__).parent)
numba_setup()

import numba  # noqa: E402 - its settings are read when it is imported

# Integer division is checked for zero in Python's error model; numpy's leaves it to us.
jit = numba.njit(cache=True, nogil=True, error_model="numpy")
