"""Kernels compiled before they are needed, in processes of their own, while the process that will need them does something else.

`start` starts a process that does the work to come with launches that do nothing, which takes a second or two: all that it finds out is which
functions are asked for, and in which order. For each it forks a process that compiles it, as many at a time as there are cores. What they compile
lies in the cache afterwards, where whoever needs a function waits for it (`kernel_cache.py`). Nobody depends on any of these processes: what they
have not begun is compiled by whoever needs it, and they end with the process that started them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from cllm.runtime.device import usable_cores
from cllm.runtime.progress import compilation, duration
from cllm.runtime.threads import default_threads

MOST = 8  # processes at a time: each has memory of its own
NOWHERE = 1  # the address of a function that is not compiled here

_jobs: _Jobs | None = None


def start(module: str, text: str) -> None:
    """Starts the module, which gets a text on its standard input and calls `listing`. Does nothing on one core, where nothing is gained by it."""
    if min(usable_cores(), default_threads()) < 2:
        return
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:  # no memory, no more processes
        return
    assert process.stdin is not None and process.stdout is not None
    with suppress(OSError):
        process.stdin.write(text)
        process.stdin.close()
    threading.Thread(target=_follow, args=(process, process.stdout), daemon=True, name="compile-ahead").start()


def _follow(process: subprocess.Popen[str], lines: IO[str]) -> None:
    """Tells how far the other process is for as long as it lives."""
    began = time.monotonic()
    try:
        for line in lines:
            done, total = map(int, line.split())
            left = (time.monotonic() - began) / done * (total - done) if done else None
            compilation.tell(f"{done} of {total} done" + ("" if left is None else f", ETA {duration(left)}"))
    except ValueError:  # it was ended in the middle of a line
        pass
    finally:
        compilation.tell("")
        process.wait()


@contextmanager
def listing() -> Iterator[None]:
    """Each function that is asked for inside is compiled by another process. Returns when all are. What is done inside must not run kernels: see
    `cllm.runtime.workers.only_list`."""
    global _jobs
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides what becomes of both
    _end_with_parent()
    _jobs = jobs = _Jobs(min(usable_cores(), MOST))
    try:
        with suppress(Exception):  # results of launches that did nothing: whatever comes of them, those before were asked for
            yield
        jobs.finish()
    finally:
        _jobs = None


def is_postponed(compile: Callable[[], object]) -> bool:
    """Whether this process only lists what is needed; another one, forked from it, then compiles the function."""
    if _jobs is None:
        return False
    _jobs.add(compile)
    return True


class _Jobs:
    def __init__(self, at_a_time: int) -> None:
        self._at_a_time = at_a_time
        self._waiting: deque[Callable[[], object]] = deque()
        self._running: set[int] = set()
        self._total = 0

    def add(self, compile: Callable[[], object]) -> None:
        self._total += 1
        self._waiting.append(compile)
        self._reap(os.WNOHANG)
        self._start()

    def finish(self) -> None:
        while self._running or self._waiting:
            self._start()
            self._reap(0)

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._at_a_time:
            compile = self._waiting.popleft()
            process = os.fork()
            if not process:
                _compile_and_end(compile)
            self._running.add(process)
            self._tell()

    def _reap(self, options: int) -> None:
        while self._running:
            process, _ = os.waitpid(-1, options)
            if not process:
                return
            self._running.discard(process)
            self._tell()
            options = os.WNOHANG

    def _tell(self) -> None:
        with suppress(OSError):
            print(self._total - len(self._waiting) - len(self._running), self._total, flush=True)


def _compile_and_end(compile: Callable[[], object]) -> None:
    global _jobs
    _jobs = None
    try:
        _end_with_parent()
        compile()
    finally:
        os._exit(0)


def _end_with_parent() -> None:
    """Linux ends this process when its parent has ended; elsewhere it goes on until it is done."""
    set_signal_at_end_of_parent = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_signal_at_end_of_parent, int(signal.SIGKILL))
