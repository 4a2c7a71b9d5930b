"""The jobs of a workspace on disk: one SQLite file, which one connection writes."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cllm.runtime.errors import OutputError

ACTIVE = ("running", "pausing", "stopping")  # with a process
ENDED = ("paused", "stopped", "done", "failed", "lost")
_VERSION = 1


@dataclass
class Job:
    """One job. state: queued, running, pausing, paused, stopping, stopped, done, failed or lost. asked: "pause" or "stop" since it was asked for.
    words: the arguments of its process. device: where it trains, "cpu" or "cuda"; of several GPUs "cuda:" and which one, once it has begun.
    identity: tells its process from a later one with the same number. since: bytes of its JSON lines that are from before it was started the last
    time. Times are Unix seconds."""

    number: int
    command: str
    options: dict[str, Any]
    words: list[str]
    line: str
    title: str
    run: str | None
    out: str | None
    device: str | None
    state: str = "queued"
    asked: str = ""
    created: float = 0.0
    started: float | None = None
    ended: float | None = None
    exit_status: int | None = None
    pid: int | None = None
    identity: str | None = None
    since: int = 0
    error: str | None = None
    progress: dict[str, Any] | None = None
    result: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def id(self) -> str:
        return f"j{self.number}"

    def to_dict(self) -> dict[str, Any]:
        """As the page sees it."""
        hidden = ("number", "words", "asked", "identity", "since")
        return {"id": self.id, **{each.name: getattr(self, each.name) for each in fields(self) if each.name not in hidden}}


_COLUMNS = [each.name for each in fields(Job)]
_AS_JSON = frozenset({"options", "words", "progress", "result"})


class JobStore:
    """Every call is one transaction. warn: told where the file was damaged; it is kept beside a new one."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._lock = threading.Lock()
        try:
            self._connection = self._open(path)
        except sqlite3.DatabaseError as error:
            kept = path.with_name(f"{path.name}.damaged-{int(time.time())}")
            warn(f"the list of jobs was damaged ({error}); it is kept as {kept.name}, and a new one is begun")
            for suffix in ("", "-wal", "-shm"):
                beside = path.with_name(path.name + suffix)
                if beside.exists():
                    beside.replace(kept.with_name(kept.name + suffix))
            self._connection = self._open(path)

    def _open(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")  # a job that was answered for is on the disk
            if connection.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("its pages do not fit together")
            columns = ", ".join("number INTEGER PRIMARY KEY AUTOINCREMENT" if each == "number" else each for each in _COLUMNS)
            connection.execute(f"CREATE TABLE IF NOT EXISTS jobs ({columns})")
            connection.execute(f"PRAGMA user_version={_VERSION}")
            connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs LIMIT 1")
        except BaseException:
            connection.close()
            raise
        path.chmod(0o600)
        return connection

    def read(self) -> list[Job]:
        """All jobs, the oldest first."""
        with self._lock:
            rows = self._connection.execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs ORDER BY number").fetchall()
        return [_job(row) for row in rows]

    def add(self, job: Job) -> Job:
        """The job with its number. Raises OutputError where it cannot be written."""
        names = _COLUMNS[1:]
        marks = ", ".join("?" * len(names))
        job.number = self._write(f"INSERT INTO jobs ({', '.join(names)}) VALUES ({marks})", [_cell(job, each) for each in names])
        return job

    def save(self, job: Job) -> None:
        """Raises OutputError where it cannot be written."""
        names = _COLUMNS[1:]
        values = [*(_cell(job, each) for each in names), job.number]
        self._write(f"UPDATE jobs SET {', '.join(f'{each}=?' for each in names)} WHERE number=?", values)

    def remove(self, job: Job) -> None:
        self._write("DELETE FROM jobs WHERE number=?", [job.number])

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _write(self, statement: str, values: list[Any]) -> int:
        try:
            with self._lock:
                return self._connection.execute(statement, values).lastrowid or 0
        except sqlite3.Error as error:
            raise OutputError(f"the list of jobs cannot be written: {error}. Free some space on the disk, and try again.") from error


def _cell(job: Job, name: str) -> Any:
    value = getattr(job, name)
    return None if value is None else json.dumps(value) if name in _AS_JSON else value


def _job(row: tuple[Any, ...]) -> Job:
    return Job(**{name: json.loads(value) if name in _AS_JSON and value is not None else value for name, value in zip(_COLUMNS, row)})
