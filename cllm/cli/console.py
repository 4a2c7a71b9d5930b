"""How a command talks: to people on stdout, or with --json one object on the last line of stdout and all else on stderr."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from cllm.runtime.errors import CLLMError, DataError
from cllm.runtime.printable import printable_text


class ReaderGone(CLLMError):
    """Nobody takes the output any more, as in `cllm generate RUN | head -1`: the command ends without a word, as other programs do."""

    exit_status = 128 + signal.SIGPIPE


@dataclass
class Console:
    """Prints for people, or for programs when `as_json` is set.

    With `needs_reader=False` the command goes on where nobody takes what it prints any more (`cllm train books/ | head -1`).
    """

    as_json: bool = False
    needs_reader: bool = True
    _finished: bool = field(default=False, repr=False)

    def print(self, text: object = "", end: str = "\n") -> None:
        """Something for a person to read; never part of the machine-readable result."""
        self._write(printable_text(f"{text}{end}"), sys.stderr if self.as_json else sys.stdout)

    def write(self, text: str) -> None:
        """Text of a model as it is. A terminal gets it without the characters that would act on it."""
        stream = sys.stderr if self.as_json else sys.stdout
        self._write(printable_text(text) if stream.isatty() else text, stream)

    def event(self, values: dict[str, Any]) -> None:
        """Something that happened, for programs: a line of its own before the result, and nothing for people."""
        if self.as_json:
            self._write(json.dumps(plain(values), default=str, allow_nan=False) + "\n", sys.stdout)

    def result(self, values: dict[str, Any]) -> None:
        """The outcome of the command, once: the last line of stdout under --json, otherwise nothing (it was told in words)."""
        if self.as_json and not self._finished:
            self._finished = True
            self._write(json.dumps(plain(values), default=str, allow_nan=False) + "\n", sys.stdout, needed=True)

    def error(self, error: CLLMError, prefix: str = "error: ") -> None:
        """One clear line on stderr, and the same as an object under --json."""
        sys.stderr.write(printable_text(f"{prefix}{error}\n"))
        self.result({"error": str(error), "kind": type(error).__name__, "exit_status": error.exit_status})

    def _write(self, text: str, stream: Any, needed: bool = False) -> None:
        try:
            stream.write(text)
            stream.flush()
        except OSError as error:
            silence_stdout()
            reason = (error.strerror or str(error)).lower()
            if not (self.needs_reader or needed):
                sys.stderr.write(f"Standard output cannot be written ({reason}); the command goes on without it.\n")
            elif isinstance(error, BrokenPipeError):
                raise ReaderGone(reason) from error
            else:
                raise DataError(f"standard output cannot be written: {reason}.") from error


_current = Console()


def open_console(as_json: bool, needs_reader: bool = True) -> Console:
    """The console of the command that begins."""
    global _current
    _current = Console(as_json, needs_reader)
    return _current


def current() -> Console:
    """The console of the command that runs, through which its errors are told."""
    return _current


class _StandardError(io.TextIOWrapper):
    """Progress and messages: when nobody can read them, the work that they tell of goes on."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            return


def prepare_streams() -> None:
    """Standard streams on which no text can fail: what an encoding lacks is written as an escape, and a stream that was closed swallows all."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed, as by `>&-`; the next file that is opened would become standard output
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if type(sys.stderr) is io.TextIOWrapper:
        encoding = sys.stderr.encoding
        sys.stderr = _StandardError(sys.stderr.detach(), encoding=encoding, errors="backslashreplace", line_buffering=True)


def silence_stdout() -> None:
    """From here on standard output goes nowhere, so that what its buffer still holds cannot fail once more when the process ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def standard_input() -> Iterator[str]:
    """The lines of standard input; DataError where they are no text in the charset of the locale."""
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise DataError(not_text("standard input", error.object[error.start], error.encoding)) from error


def not_text(what: str, byte: int, charset: str) -> str:
    """What to say of text from the shell that holds a byte which the charset of the locale does not have, and what to do."""
    names = ("PYTHONIOENCODING", "LC_ALL", "LC_CTYPE", "LANG") if what == "standard input" else ("LC_ALL", "LC_CTYPE", "LANG")
    locale = next((f"{name}={os.environ[name]}" for name in names if os.environ.get(name)), "no LC_ALL or LANG is set")
    charset = charset.upper()
    remedy = "Convert it to UTF-8, for example with iconv."
    if charset not in ("UTF-8", "UTF8"):
        remedy = "If yours is UTF-8, set LC_ALL=C.UTF-8 or PYTHONUTF8=1 and run the command again."
    return f"{what} holds the byte 0x{byte:02x}, which is no {charset}, and the locale ({locale}) says that all text is {charset}. {remedy}"


def table(rows: Sequence[tuple[str, ...]], indent: str = "  ") -> str:
    """Columns padded to their widest cell, for plain terminals and logs alike."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return "\n".join((indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths))).rstrip() for row in rows)


def readable(value: Any) -> str:
    """A number with its thousands apart, or to four digits; all else as it is."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def plain(value: Any) -> Any:
    """The same with what JSON cannot hold, as metrics.jsonl writes it: nan and inf become their names."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
