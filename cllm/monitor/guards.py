"""What watches over a run: its lock, memory, and losses that stop falling."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.runtime.errors import CheckpointError, UserError


class RunLock:
    """Keeps a second training out of the same run folder, which it makes where there is none. The kernel drops the lock when its holder dies,
    however it dies.

    The file `.lock` holds the process id of the owner for others to read. With `sign=False` nothing is written until `sign` is called, so that
    who only compares, and is then refused, leaves every byte of the folder as it was. A lock may be entered again while it is held.
    Raises CheckpointError where another process trains in the folder, UserError where it cannot be made or written.
    """

    def __init__(self, run: Path, sign: bool = True) -> None:
        self.path = run / ".lock"
        self._sign_at_once = sign
        self._file: Any = None
        self._depth = 0
        self._goes_again = False  # the file was made here, or is signed: it is removed with the lock
        self._made_folders: list[Path] = []

    def __enter__(self) -> RunLock:
        if not self._depth:
            self._make_folder()
            try:
                self._acquire()
            except BaseException:
                self._remove_folders()
                raise
            if self._sign_at_once:
                self.sign()
        self._depth += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self._depth:
            return
        if self._goes_again:
            self.path.unlink(missing_ok=True)  # still locked: whoever has opened it meanwhile finds that it is not the run's any more
        self._file.close()
        self._remove_folders()

    @property
    def made_folder(self) -> bool:
        """Whether there was no such folder before."""
        return bool(self._made_folders)

    def sign(self) -> None:
        """Writes this process's id into the file: from here on it is this process that changes the run."""
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        self._goes_again = True

    def _acquire(self) -> None:
        while True:
            existed = self.path.exists()
            try:
                file = open(self.path, "a+")  # noqa: SIM115 - held open: closing it would release the lock
            except OSError as error:
                raise UserError(f"cannot write into {self.path.parent}: {error.strerror or error}. Choose another folder with --out.") from error
            try:
                self._lock(file)
            except OSError as error:
                file.seek(0)
                holder = file.read().strip()
                file.close()
                raise CheckpointError(
                    f"{self.path.parent} is being trained by {f'process {holder}' if holder else 'another process'}. Wait for it, stop it, "
                    "or choose another folder with --out."
                ) from error
            if self._is_of_run(file):
                self._file, self._goes_again = file, not existed
                return
            file.close()  # its last holder removed it between the two calls

    @staticmethod
    def _lock(file: Any) -> None:
        for left in reversed(range(3)):
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # `trained_by` holds it for a moment as well
                if not left:
                    raise
            time.sleep(0.02)

    def _is_of_run(self, file: Any) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _make_folder(self) -> None:
        run = self.path.parent
        self._made_folders = [each for each in (run, *run.parents) if not each.exists()]
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot create the run folder {run}: {error.strerror or error}. Choose another with --out.") from error

    def _remove_folders(self) -> None:
        """What was made for nothing goes again: a refused command leaves no empty folder."""
        for each in self._made_folders:
            with contextlib.suppress(OSError):
                each.rmdir()


def trained_by(run: Path) -> str | None:
    """The process that trains in a run's folder, in words; None where nobody does."""
    try:
        found = os.open(f"{run}/.lock", os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with open(found, encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            holder = file.read(20).strip()
            return f"process {holder}" if holder.isdigit() else "another process"
    return None


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
