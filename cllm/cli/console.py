"""How a command talks: to people on stdout, or with --json one object on the last line of stdout and all else on stderr."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cllm.runtime.errors import CLLMError


@dataclass
class Console:
    """Prints for people, or for programs when `as_json` is set."""

    as_json: bool = False
    _finished: bool = field(default=False, repr=False)

    def print(self, text: object = "", end: str = "\n") -> None:
        """Something for a person to read; never part of the machine-readable result."""
        stream = sys.stderr if self.as_json else sys.stdout
        stream.write(f"{text}{end}")
        stream.flush()

    def result(self, values: dict[str, Any]) -> None:
        """The outcome of the command, once: the last line of stdout under --json, otherwise nothing (it was told in words)."""
        if self.as_json and not self._finished:
            self._finished = True
            sys.stdout.write(json.dumps(values, default=str, allow_nan=False) + "\n")
            sys.stdout.flush()

    def error(self, error: CLLMError) -> None:
        """One clear line on stderr, and the same as an object under --json."""
        sys.stderr.write(f"error: {error}\n")
        self.result({"error": str(error), "kind": type(error).__name__, "exit_status": error.exit_status})


_current = Console()


def open_console(as_json: bool) -> Console:
    """The console of the command that begins."""
    global _current
    _current = Console(as_json)
    return _current


def current() -> Console:
    """The console of the command that runs, through which its errors are told."""
    return _current


def table(rows: Sequence[tuple[str, ...]], indent: str = "  ") -> str:
    """Columns padded to their widest cell, for plain terminals and logs alike."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return "\n".join((indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths))).rstrip() for row in rows)


def readable(value: Any) -> str:
    """A number with its thousands apart, or to four digits; all else as it is."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
