"""A job's process: how it is started, known again by a later app, asked to stop, and what it left behind.

It is `python -m cllm ...` in a session of its own, without anything of the app between it and its signals. What it prints for people goes into a log,
the JSON that it prints for programs into a file beside it, and how far it is into a third (`cllm.runtime.progress_file`), which also gets its exit
status: a later app is not its parent and could not wait for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MARK = "CLLM_PROGRESS_FILE"
_MOST_RESULT = 4 << 20  # bytes of the last line
_SECRETS = ("CLLM_API_KEY",)  # what a job has no use for


@dataclass(frozen=True)
class Files:
    """Where a job's process writes. log: for people. out: JSON lines. progress: how far it is."""

    log: Path
    out: Path
    progress: Path

    @classmethod
    def of(cls, state: Path, identity: str) -> Files:
        return cls(state / "logs" / f"{identity}.log", state / "jobs" / f"{identity}.out", state / "jobs" / f"{identity}.progress")

    def remove(self) -> None:
        for each in (self.log, self.out, self.progress):
            each.unlink(missing_ok=True)


def start(words: list[str], root: Path, files: Files, gpu: str | None = None) -> subprocess.Popen[bytes]:
    """Starts `cllm WORDS` in a folder; gpu: the only one that it is to find. Raises OSError."""
    files.progress.unlink(missing_ok=True)
    # Nothing in the folder can take the place of a module (-P), and the package is the one that runs here, installed or not.
    command = [sys.executable, "-P", "-m", "cllm", *words]
    environment = {name: value for name, value in os.environ.items() if name not in _SECRETS} | {_MARK: str(files.progress)}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    home = Path(__file__).parents[2]
    if home.name not in ("site-packages", "dist-packages"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(home), environment.get("PYTHONPATH", ""))))
    with _appended(files.log) as log, _appended(files.out) as out:
        return subprocess.Popen(command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=log, start_new_session=True)


def _appended(path: Path) -> Any:
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "ab")


def identity_of(pid: int) -> str | None:
    """What no other process has, now or after the number was given to another one: None where there is no such process, or it has ended."""
    if not Path("/proc/self/stat").exists():
        return _identity_without_proc(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        if fields[0] in (b"Z", b"X"):
            return None
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {fields[19].decode()}"
    except (OSError, IndexError):
        return None


def _identity_without_proc(pid: int) -> str | None:
    import psutil

    try:
        found = psutil.Process(pid)
        return None if found.status() == psutil.STATUS_ZOMBIE else f"started {found.create_time():.3f}"
    except psutil.Error:
        return None


def find(files: Files) -> int | None:
    """The process of a job whose number is not known: the app that started it ended before it could write it down."""
    mark = f"{_MARK}={files.progress}".encode()
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        with contextlib.suppress(OSError, ValueError):
            pid = int(entry)
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") and os.getsid(pid) == pid:  # its workers are no leaders
                return pid
    return None


def send(pid: int, identity: str, number: signal.Signals, everyone: bool = False) -> bool:
    """Sends a signal to a process that is still the one meant; everyone: to all of its session. False where it has ended."""
    has_handles = hasattr(os, "pidfd_open")  # which mean one process, also after its number was given to another one
    try:
        handle = os.pidfd_open(pid) if has_handles else -1
    except OSError:
        return False
    try:
        if identity_of(pid) != identity:
            return False
        if everyone:
            os.killpg(pid, number)  # the leader is alive, so that the group is the one meant
        elif has_handles:
            signal.pidfd_send_signal(handle, number)
        else:
            os.kill(pid, number)
        return True
    except OSError:
        return False
    finally:
        if has_handles:
            os.close(handle)


def read_progress(files: Files) -> dict[str, Any]:
    """What the process has written last; empty where there is nothing, or nothing of that form."""
    try:
        found = json.loads(files.progress.read_bytes()[:100_000])
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def figures_of(told: dict[str, Any]) -> dict[str, Any] | None:
    """How far a process is as a page shows it; None where it has told nothing of that yet."""
    if "label" not in told:
        return None
    words = "  ".join(str(told[name]) for name in ("label", "text") if told.get(name))
    return {"text": words, **{name: told.get(name) for name in ("done", "total", "unit", "eta_seconds")}}


def read_result(files: Files, since: int) -> dict[str, Any] | None:
    """The object on the last line of what the process has printed for programs since it was started."""
    try:
        with open(files.out, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(since, end - _MOST_RESULT))
            last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
        found = json.loads(last)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def last_lines(path: Path, lines: int = 12, most: int = 4_000) -> str:
    """The end of a log."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - most))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return "\n".join(text.strip().splitlines()[-lines:])
