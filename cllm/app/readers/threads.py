"""What the threads of a process do at this moment, as Linux counts it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

_LEAST = 0.01  # of a core: a thread that waits is not shown


def busy(pid: int, seconds: float = 0.25) -> list[dict[str, Any]]:
    """The threads of a process that compute, as {"main": whether the process began with it, "share": of a core}. It takes so many seconds.

    Empty where the process has ended, or the system does not tell.
    """
    before, began = _ticks(pid), time.monotonic()
    if not before:
        return []
    time.sleep(seconds)
    after, passed = _ticks(pid), time.monotonic() - began
    ticks = os.sysconf("SC_CLK_TCK")
    shares = {thread: (count - before.get(thread, count)) / ticks / passed for thread, count in after.items()}
    return [{"main": thread == pid, "share": min(1.0, share)} for thread, share in sorted(shares.items()) if share >= _LEAST]


def _ticks(pid: int) -> dict[int, int]:
    """The processor time of each thread, in ticks of the system's clock."""
    found = {}
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            fields = Path(f"/proc/{pid}/task/{thread}/stat").read_bytes().rpartition(b")")[2].split()
            found[int(thread)] = int(fields[11]) + int(fields[12])  # in programs, and in the system for them
    except (OSError, ValueError, IndexError):
        return found
    return found
