"""The one owner of every thread pool: numba's, torch's, and the BLAS libraries'. Nobody else sets a thread count.

A count is asked for with `runtime.use(threads=N)` and may be any number from 1 to thousands: work is cut into tiles that do not depend on it.
numba's OpenMP pool takes any count at run time; torch's pool (element-wise operations, whose result never depends on threads) is never made
larger than the machine. What a scope changes it restores, also when it ends by an error.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cllm.runtime.device import usable_cores
from cllm.runtime.errors import UserError

MOST = 65536

_set_numba: Callable[[int], Any] | None = None
_most_numba = MOST


def checked(threads: object, source: str = "threads") -> int:
    """A thread count, or UserError."""
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MOST:
        raise UserError(f"{source} must be a whole number from 1 to {MOST}, got {threads!r}. Leave it out to use all {usable_cores()} cores.")
    return threads


def default_threads() -> int:
    """`CLLM_THREADS` where it is set, else the usable cores."""
    text = os.environ.get("CLLM_THREADS")
    if not text:
        return usable_cores()
    try:
        return checked(int(text), "CLLM_THREADS")
    except ValueError:
        raise UserError(f"CLLM_THREADS must be a whole number from 1 to {MOST}, got {text!r}.") from None


def _start_numba() -> Callable[[int], Any]:
    global _set_numba, _most_numba
    from cllm.runtime import compiler

    compiler.numba_setup()
    import numba
    from numba.np.ufunc import parallel

    parallel._launch_threads()
    if numba.threading_layer() != "omp":  # the other layers start a fixed number of threads
        _most_numba = int(vars(numba.config)["NUMBA_NUM_THREADS"])
    # numba.set_num_threads refuses more than were foreseen at import; OpenMP itself has no such limit.
    set_numba: Callable[[int], Any] = vars(parallel)["_set_num_threads"]
    _set_numba = set_numba
    return set_numba


def numba_workers(count: int) -> None:
    """The number of threads of the next numba kernel that this thread starts (about 0.3 us)."""
    (_set_numba or _start_numba())(min(count, _most_numba))


@contextmanager
def limit(threads: int | None) -> Iterator[None]:
    """Torch's pool inside the scope: at most `threads`, at most the machine's cores."""
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(checked(threads), usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)
