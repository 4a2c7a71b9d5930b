"""How a command ends when it is interrupted: one line that says what became of its work, and no waiting for what is only tidying up."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

from cllm.cli.console import current
from cllm.distributed import launched
from cllm.monitor.stop_signals import Interrupted, StopRequested, StopSignals, ending_the_process
from cllm.runtime import progress, progress_file
from cllm.runtime.errors import CLLMError

_leaving = threading.Lock()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Around a whole command, which Ctrl-C and SIGTERM then end within a second with exit status 130, also while it computes or compiles.

    In a run of several processes `cllm.distributed` sees to it that all of them end.
    """
    if launched():
        yield
        return
    with ending_the_process(leave), StopSignals(lambda name: Interrupted("interrupted")):
        yield


def stopping_with(words: str) -> AbstractContextManager[object]:
    """Around work of a command that may be left at any moment: `words` say what an interruption means for it."""
    return nullcontext() if launched() else StopSignals(lambda name: Interrupted(words))


def interruption(error: BaseException) -> Interrupted:
    """What to tell of the exception that Ctrl-C or SIGTERM has raised."""
    if isinstance(error, StopRequested) and error.ends_with is not None:
        return error.ends_with
    return Interrupted(str(error) or "interrupted")


def leave(error: CLLMError) -> NoReturn:
    """Tells an error and ends the process at once, from any thread. Destructors are not run: those of PyTorch and numba take seconds."""
    if not _leaving.acquire(blocking=False):
        threading.Event().wait()  # another thread is telling it, and ends this one as well
    with contextlib.suppress(Exception):  # nobody may be listening any more
        progress.abandon()
        current().error(error, prefix="" if isinstance(error, Interrupted) else "error: ")
    leave_with(error.exit_status)


def leave_with(status: int) -> NoReturn:
    """Ends the process at once, when all that was open has been closed. Destructors are not run, as in `leave`."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # nobody may be listening any more
            stream.flush()
    progress_file.ended(status)
    os._exit(status)
