"""The app's own log: a line of JSON for each event, the newest in memory, all of them in a file that cannot grow without limit."""

from __future__ import annotations

import json
import threading
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_KEPT = 1_000  # lines in memory
_LARGEST = 2 << 20  # bytes of the file before it becomes the older of two


class Log:
    """Only what happened: no token, no text of a model, no query of an address."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()

    def __call__(self, event: str, level: str = "info", **values: Any) -> None:
        """level: "info", "warning" or "error"."""
        line = {"ts": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "event": event, **values}
        text = json.dumps(line, default=str)
        with self._lock:
            self._lines.append(line)
            try:
                if self.path.exists() and self.path.stat().st_size > _LARGEST:
                    self.path.replace(self.path.with_suffix(".old.log"))
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(text + "\n")
            except OSError:
                return  # a full disk does not end the app; the lines in memory remain

    def lines(self) -> list[dict[str, Any]]:
        """The newest, the oldest of them first."""
        with self._lock:
            return list(self._lines)
