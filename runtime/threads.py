"""The one place that sets the thread counts of torch and of the BLAS libraries. `workers/` holds the threads of our own kernels.

A count is asked for with `runtime.use(threads=N)` and may be any number from 1 to thousands: work is cut into tiles that do not depend on it.
The pools of torch and of numpy's BLAS are never made larger than the usable cores, which in a container with a CPU quota are fewer than those
libraries count. What a scope changes it restores, also when it ends by an error.
"""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from cllm.runtime.device import usable_cores
from cllm.runtime.errors import UserError

MOST = 65536


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


Pool = tuple[Callable[[], int], Callable[[int], Any]]


@lru_cache(maxsize=1)
def _openblas_pools() -> tuple[Pool, ...]:
    """(read, set) the thread count of each OpenBLAS that is loaded, such as numpy's; MKL, inside torch, follows torch's."""
    try:
        mapped = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "openblas" in line}
    except OSError:
        return ()
    pools = []
    for path in sorted(mapped):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        for name in ("{}", "{}64_", "scipy_{}64_", "scipy_{}"):  # the plain build, and those that packages rename
            read = getattr(library, name.format("openblas_get_num_threads"), None)
            write = getattr(library, name.format("openblas_set_num_threads"), None)
            if read is not None and write is not None:
                pools.append((read, write))
                break
    return tuple(pools)


@contextmanager
def limit(threads: int | None, inherited: int | None = None) -> Iterator[None]:
    """The pools of torch and of BLAS inside the scope: `threads`, at most the usable cores.

    None leaves them as they are unless they are larger than the cores or than `inherited`, what an outer scope or CLLM_THREADS asked for.
    """
    import torch

    cores = usable_cores()
    most = min(cores, checked(threads) if threads is not None else inherited or cores)
    changed: list[tuple[Callable[[int], Any], int]] = []
    try:
        for read, write in ((torch.get_num_threads, torch.set_num_threads), *_openblas_pools()):
            before = read()
            if before > most or (threads is not None and before < most):
                changed.append((write, before))
                write(most)
        yield
    finally:
        for write, before in changed:
            write(before)


@contextmanager
def torch_alone() -> Iterator[None]:
    """torch on the calling thread only: where our kernels do the work, torch's threads would take cores from the workers, and keep a step waiting."""
    import torch

    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)
