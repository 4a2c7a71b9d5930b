"""Ctrl-C and SIGTERM: work that may be left at any moment ends at once, other work after what it has to finish.

Python runs a signal's handler in the main thread between two bytecodes. Inside a long call into C, such as the training of a tokenizer or the
compilation of a kernel, a handler alone would answer only when that call returns. A process that may end on its own, which is the command line's
and never that of a notebook, therefore has a thread that answers in the handler's place (`ending_the_process`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from cllm.runtime.errors import CLLMError

STOPPING = (signal.SIGINT, signal.SIGTERM)
SAME = 0.5  # seconds: a terminal and a wrapper (make, timeout) may both send the one Ctrl-C that was typed
BEFORE_TRAINING = "interrupted before training began; nothing is lost: prepared data is kept"
AT_ONCE = "ended at once: checkpoints that were complete are whole, steps after them are lost"
TO_CHECKPOINT = "finishing this step and writing a checkpoint (Ctrl-C again to end at once)"
GRACE = 0.7  # seconds in which the main thread may end by itself, and clean up, before the process is ended without it


class Interrupted(CLLMError):
    """The work was asked to stop and has: with a checkpoint, or where there was nothing to save."""

    exit_status = 130


class StopRequested(KeyboardInterrupt):
    """Raised in the main thread by a signal. `ends_with`: what is to be told, where the work may be left as it is; None where the caller has
    something to save first."""

    def __init__(self, ends_with: Interrupted | None = None) -> None:
        super().__init__(str(ends_with or ""))
        self.ends_with = ends_with


class StopSignals:
    """While entered, SIGINT and SIGTERM stop the work inside.

    nothing_to_lose: called with the name of the signal that arrives. It returns the error to end with where the work may be left at any point;
    `StopRequested` is then raised wherever the main thread is. It returns None where the work must first come to a point at which it can be left:
    `asked` is set, and `StopRequested` is raised inside `at_once`, or by `check`.

    A second Ctrl-C, or a third signal of any kind, does not wait: it raises KeyboardInterrupt, and ends a process that may end on its own. Only the
    main thread gets signals; in any other one this does nothing.
    """

    def __init__(self, nothing_to_lose: Callable[[str], Interrupted | None], finishing: str = TO_CHECKPOINT) -> None:
        """finishing: what is told of the work that must first come to such a point."""
        self.nothing_to_lose, self.finishing = nothing_to_lose, finishing
        self.asked: str | None = None
        self._before: dict[int, Any] = {}
        self._count = _Count()
        self._interruptible = 0
        self._raised: StopRequested | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            _entered.append(self)
            for number in STOPPING:
                self._before[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            _entered.remove(self)
        if self._before and _entered and self.asked is not None:  # the work outside is on its way out as well, and is not asked anew
            outside = _entered[-1]
            outside.asked, outside._raised, outside._count = self.asked, self._raised or StopRequested(), self._count

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Around work that changes nothing which is to be saved: a signal interrupts it wherever it is. Raises StopRequested."""
        self.check()
        self._interruptible += 1
        try:
            yield
        finally:
            self._interruptible -= 1

    def check(self) -> None:
        """Raises StopRequested where a signal has arrived; also again, where the first one was swallowed (as in a `__del__`)."""
        if self._raised is not None or self.asked is not None:
            self._raise(None)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        arrived = self._count.add(number)
        if arrived == "same":
            return
        if arrived == "enough":
            raise KeyboardInterrupt(AT_ONCE)
        name = signal.Signals(number).name
        self.asked = self.asked or name
        error = self.nothing_to_lose(self.asked)
        if _watch is None and (error is None or self._raised is not None):
            _write(_announcement(name, arrived))
        if self._raised is None and (error is not None or self._interruptible):
            self._raise(error)

    def _raise(self, error: Interrupted | None) -> NoReturn:
        self._raised = self._raised or StopRequested(error)
        raise self._raised


class _Count:
    """The signals that have arrived so far."""

    def __init__(self) -> None:
        self._total = self._interrupts = 0
        self._last = -SAME

    def add(self, number: int) -> str:
        """What a signal is: the "first", the "same" once more, one "again", or "enough" not to wait any longer."""
        now = time.monotonic()
        if self._total and now - self._last < SAME:
            return "same"
        self._last = now
        self._total += 1
        self._interrupts += number == signal.SIGINT
        return "enough" if self._interrupts >= 2 or self._total >= 3 else "again" if self._total > 1 else "first"


_entered: list[StopSignals] = []  # the innermost is the last


def _announcement(name: str, arrived: str) -> str:
    if arrived == "first":
        return f"{name}: {_entered[-1].finishing if _entered else TO_CHECKPOINT}"
    return f"{name} again: still finishing what was begun. One more ends at once, without what is not saved yet"


def _write(line: str) -> None:
    """To standard error from a handler or another thread, while the main thread may be in the middle of writing to the stream."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.write(sys.stderr.fileno(), f"\n{line}\n".encode(errors="replace"))


# -- a process that may end on its own ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def ending_the_process(leave: Callable[[Interrupted], NoReturn]) -> Iterator[None]:
    """While entered, a signal is answered within about GRACE seconds also where the main thread is in a call into C, if nothing would be lost.

    For the main thread of a process that may end on its own. `leave` tells the error and ends the process; it is called in another thread.
    """
    global _watch
    _watch = _Watch(leave)
    try:
        yield
    finally:
        _watch.close()
        _watch = None


class _Watch:
    """The thread that hears of signals though the main thread cannot: the C part of Python's handler writes each signal's number into a socket."""

    def __init__(self, leave: Callable[[Interrupted], NoReturn]) -> None:
        self._leave = leave
        self._read, self._written = socket.socketpair()
        self._written.setblocking(False)
        self._before = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._run, daemon=True, name="cllm-stop-signals").start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        self._written.close()

    def _run(self) -> None:
        count, asked = _Count(), ""
        since, error = 0.0, None  # from when on nothing would be lost, and what to tell
        while True:
            self._read.settimeout(0.05 if asked else None)
            try:
                numbers = self._read.recv(64)
            except TimeoutError:
                numbers = None
            if numbers == b"":
                return
            for number in (each for each in numbers or b"" if each in STOPPING):
                arrived, name = count.add(number), signal.Signals(number).name
                asked = asked or name
                if arrived == "enough":
                    self._leave(Interrupted(AT_ONCE))
                if arrived != "same" and _free(asked) is None:
                    _write(_announcement(name, arrived))
            free = _free(asked) if asked else None
            if free is None:
                error = None
            elif error is None:
                since, error = time.monotonic(), free
            elif time.monotonic() - since >= GRACE:
                self._leave(error)


_watch: _Watch | None = None


def _free(asked: str) -> Interrupted | None:
    """What to end with where the main thread's work may be left as it is."""
    try:
        return _entered[-1].nothing_to_lose(asked)
    except IndexError:  # the main thread has left all of its work
        return Interrupted("interrupted")
