"""How far the task of this process is, for whoever runs it: a large file may be one task, and takes long."""

from __future__ import annotations

import time
from collections.abc import Callable

_PAUSE = 0.5  # seconds between two of its words

hear: Callable[[float], None] | None = None
"""Who wants to know; a worker of the pool sets it."""
_due = 0.0


def tell(done: float) -> None:
    """`done`: of the weight of the task. Most calls cost a look at the clock."""
    global _due
    if hear is not None and time.monotonic() >= _due:
        hear(done)
        _due = time.monotonic() + _PAUSE
