"""The threads that share the tasks of a CPU kernel: one set for the whole process, outside of OpenMP and of Python's lock.

    run(launches, workers=4)

Nothing is dealt out beforehand: `loop.py` says how tasks are claimed. The calling thread works too, and waits for no worker that has not begun, so a
launch ends on one thread as on a thousand, and on a machine whose cores others use it goes on with what it gets. Threads are started when a launch
first wants them and end with the process; what the system refuses to start is done without.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import signal
import struct
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from cllm.runtime import compiler, profiler
from cllm.runtime.device import usable_cores

compiler.register_kernels(Path(__file__).parent)

from cllm.runtime.workers import loop  # noqa: E402
from cllm.runtime.workers.loop import Launch, serving  # noqa: E402
from cllm.runtime.workers.words import FUTEX, SET_SCHEDULING, WAKE  # noqa: E402

__all__ = ["Launch", "Pool", "lasting", "run", "table_of"]

# What a fault of a thread itself raises; all other signals are for the main thread, which Python answers them in.
_FAULTS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGABRT}


def table_of(launches: Iterable[Launch]) -> array[int]:
    """A list of launches as `run` takes it."""
    return array("q", [field for launch in launches for field in launch])


class Recorder(Protocol):
    """Hears of all launches of the thread that it listens to (`program.py`)."""

    longest: int
    """The most tokens that a document has in any replay."""

    def launches(self, table: int, count: int, workers: int, held: object) -> None: ...

    def hold(self, *held: object) -> None: ...

    def followed(self, key: tuple[object, ...], make: Callable[[], Sequence[Any]]) -> Sequence[Any]: ...


recorders: dict[int, Recorder] = {}
"""Who listens, by thread."""

_lasting: set[int] = set()


def lasting(address: int) -> int:
    """Makes known that what lies at an address lasts as long as the process, such as a compiled function: a recorded launch may hold it."""
    _lasting.add(address)
    return address


def recorder() -> Recorder | None:
    """Who listens to this thread."""
    return recorders.get(threading.get_ident()) if recorders else None


class Pool:
    """The threads and the memory by which they are told what to do.

    futex: the number of Linux's system call; where it is below 0, who waits takes naps, and there are no more threads than cores.
    """

    def __init__(self, futex: int = FUTEX) -> None:
        self._futex = futex
        self._memory = (ctypes.c_int64 * (loop.POOL_BYTES // 8 + loop.LINE // 8))()
        self._address = ctypes.addressof(self._memory) + -ctypes.addressof(self._memory) % loop.LINE
        self._start_over()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._start_over)

    def _start_over(self) -> None:
        """Also in a forked process, which has none of its parent's threads and may have got the memory in the middle of a launch."""
        ctypes.memset(self._memory, 0, ctypes.sizeof(self._memory))
        self._word(loop.MOST_SPINNING).value = max(0, usable_cores() - 1)
        self._word(loop.CALL).value = self._futex
        self._threads: list[ctypes.c_ulong] = []
        self._seats: list[array[int]] = []  # what each thread was given
        self._most = 1 << 62 if self._futex >= 0 else max(0, usable_cores() - 1)
        self._lock = threading.Lock()

    def _word(self, offset: int) -> ctypes.c_int64:
        return ctypes.c_int64.from_address(self._address + offset)

    @property
    def size(self) -> int:
        """How many threads it has, beside those that call."""
        return len(self._threads)

    @property
    def busy(self) -> bool:
        """Whether the workers found that others want the cores too."""
        return bool(self._word(loop.BUSY).value)

    def run(self, table: int, launches: int, workers: int, held: object = None) -> None:
        """A list of launches, one after the other, each by up to so many workers, the calling thread among them.

        table: the address of the list, see `table_of`. Who calls keeps the memory behind all addresses; held: the arrays of arguments, which whoever
        records the launches keeps as well.
        """
        if recorders and (listening := recorder()) is not None:
            listening.launches(table, launches, workers, held)
        if profiler.recording is not None:
            profiler.recording.launched(workers)
        if len(self._threads) < workers - 1 and len(self._threads) < self._most:
            self._grow(workers - 1)
        loop.run(self._address, table, launches, workers)

    def _grow(self, threads: int) -> None:
        with self._lock:
            if not self._threads and self._most > 0:
                atexit.register(self.stop)
            begin = serving().address  # compiled before signals are held back
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)  # a new thread inherits the mask
            try:
                while len(self._threads) < min(threads, self._most):
                    seat, thread = array("q", (self._address, len(self._threads) + 1, *_woken_soon())), ctypes.c_ulong()
                    if _library().pthread_create(ctypes.byref(thread), None, begin, seat.buffer_info()[0]):
                        self._most = len(self._threads)  # a limit of the system's; what there is has to do
                        break
                    self._seats.append(seat)
                    self._threads.append(thread)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def stop(self) -> None:
        """Ends the threads, each after the task that it is at. Launches go on, on the threads that call."""
        with self._lock:
            self._most = 0
            self._word(loop.STOP).value = 1
            self._word(loop.EPOCH).value += 1 << 20  # a launch that adds its own at this moment may lose it, and then nobody helps it
            if self._futex >= 0:
                _library().syscall(self._futex, ctypes.c_void_p(self._address + loop.EPOCH), WAKE, 1 << 30)
            for thread in self._threads:
                _library().pthread_join(thread, None)
            self._threads.clear()
            self._seats.clear()


SLICE = 100_000  # nanoseconds, the least that Linux takes


def _woken_soon() -> tuple[int, ...]:
    """(the number of a system call, what it takes) for a thread whose time slices are so short that Linux, from 6.12 on, lets it interrupt others as
    soon as there is work. It does not get more time by that: without, it comes when the slice of somebody else is over, and the work is done."""
    if SET_SCHEDULING < 0 or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return -1, *[0] * 6
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    return SET_SCHEDULING, *struct.unpack("6q", struct.pack("IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, SLICE, 0, 0))  # a `struct sched_attr`


@functools.cache
def _library() -> Any:
    """The C library, in which all threads of a process begin."""
    library = ctypes.CDLL(None)
    library.pthread_create.argtypes = [ctypes.c_void_p] * 4
    library.pthread_join.argtypes = [ctypes.c_ulong, ctypes.c_void_p]
    return library


def only_list() -> None:
    """From now on launches do nothing in this process: what it computes is worth nothing, and it only finds out which kernels some work needs.

    What the workers themselves need is compiled here: after a first compilation numba has ready what each process forked from this one would else
    make ready by itself, in more time than many a kernel takes.
    """
    serving()
    loop.compile_run()
    _pool.stop()
    module: Any = loop
    module.run = lambda *launches: None


_pool = Pool()
run = _pool.run
