"""What watches over a run: signals, the run's lock, memory, and losses that stop falling."""

from __future__ import annotations

import fcntl
import math
import os
import resource
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cllm.runtime.errors import CheckpointError, CLLMError


class Interrupted(CLLMError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and did so after writing a checkpoint."""

    exit_status = 130


class StopSignals:
    """While entered, SIGINT and SIGTERM only ask: the step in progress ends and a checkpoint is written. A second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals only there
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        sys.stderr.write(f"\n{self.asked}: finishing this step and writing a checkpoint (Ctrl-C again to end at once)\n")

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class RunLock:
    """Keeps a second training out of the same run folder. The kernel drops the lock when its holder dies, however it dies."""

    def __init__(self, run: Path) -> None:
        self.path = run / ".lock"
        self._file: Any = None

    def __enter__(self) -> RunLock:
        self._file = open(self.path, "a+")  # held open: closing it would release the lock
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise CheckpointError(
                f"{self.path.parent} is being trained by process {holder}. Wait for it, stop it, or choose another folder with --out."
            ) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_bytes() -> int:
    """The memory that this process holds now."""
    try:
        with open("/proc/self/statm", "rb") as file:  # psutil reads the same a hundred times slower, and this is asked for at every step
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        import psutil

        return psutil.Process().memory_info().rss


@dataclass
class BestLoss:
    """The lowest validation loss so far, and how many evaluations have passed without a lower one."""

    loss: float = math.inf
    step: int | None = None
    without_gain: int = 0

    def update(self, step: int, loss: float) -> bool:
        """True when this loss is the lowest."""
        if loss < self.loss:
            self.loss, self.step, self.without_gain = loss, step, 0
            return True
        self.without_gain += 1
        return False

    def exhausted(self, patience: int) -> bool:
        return patience > 0 and self.without_gain >= patience

    def to_dict(self) -> dict[str, Any]:
        return {"loss": self.loss if math.isfinite(self.loss) else None, "step": self.step, "without_gain": self.without_gain}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BestLoss:
        loss = values.get("loss")
        return cls(math.inf if loss is None else loss, values.get("step"), values.get("without_gain", 0))
