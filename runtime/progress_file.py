"""What a program that watches a command can read: how far it is, and in the end its exit status, as one JSON object in a file that it named.

    {"label": "training", "text": "loss 2.31", "done": 25, "total": 100, "unit": "steps", "eta_seconds": 65.0}
    {..., "exit_status": 0}

The variable CLLM_PROGRESS_FILE names the file. It is for one process: those that a command starts, or that are forked off it, write nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

_SECONDS = 0.25  # between two writes
_path, _process = "", 0
_newest: dict[str, Any] = {}
_due = 0.0


def begin() -> None:
    """To be called by the command that the variable is for, before it starts anything else."""
    global _path, _process
    _path, _process = os.environ.pop("CLLM_PROGRESS_FILE", ""), os.getpid()


def tell(values: Callable[[], dict[str, Any]]) -> None:
    """Writes what `values` gives, where a file was named and the last write is long enough ago."""
    global _due, _newest
    if not _path or time.monotonic() < _due or os.getpid() != _process:
        return
    _due = time.monotonic() + _SECONDS
    _newest = values()
    _write(_newest)


def ended(status: int) -> None:
    """Writes the exit status of the command: a process that did not start it cannot wait for it. To be called last."""
    if _path and os.getpid() == _process:
        _write({**_newest, "exit_status": status})


def _write(values: dict[str, Any]) -> None:
    """The whole object or none. Where it cannot be written, the work goes on without it."""
    beside = f"{_path}.new"
    try:
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(values, file)
        os.replace(beside, _path)
    except OSError:
        return
