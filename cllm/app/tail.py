"""The end of a file that grows: what is new in it since the last look."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

_MOST = 256 << 10  # bytes of one look
_SIGN = 64  # bytes before the place, by which a file is known again


class Tail:
    """Begins at the end of what the file holds now, of complete lines with `lines`. A file that there is not yet is one without bytes."""

    def __init__(self, path: Path, *, lines: bool) -> None:
        self.path, self._lines = path, lines
        self.place, self._file, self._sign = 0, 0, b""
        self._begin()

    def new(self) -> bytes | None:
        """What has been written since; None where the file is another one now, or was cut back: the place is then its end again."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if (self._file and status.st_ino != self._file) or status.st_size < self.place or self._sign_in(file) != self._sign:
                    self._begin()
                    return None
                self._file = status.st_ino
                if status.st_size == self.place:
                    return b""
                file.seek(self.place)
                found = file.read(_MOST)
                found = found[: found.rfind(b"\n") + 1] if self._lines else _whole_characters(found)
                self.place += len(found)
                self._sign = self._sign_in(file)
                return found
        except FileNotFoundError:
            if not self._file:
                return b""
            self._begin()
            return None

    def _begin(self) -> None:
        self.place, self._file, self._sign = 0, 0, b""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                self._file, self.place = status.st_ino, status.st_size
                if self._lines:
                    file.seek(max(0, self.place - _MOST))
                    rest = file.read(_MOST)
                    self.place -= len(rest) - (rest.rfind(b"\n") + 1)
                self._sign = self._sign_in(file)
        except FileNotFoundError:
            return

    def _sign_in(self, file: IO[bytes]) -> bytes:
        start = max(0, self.place - _SIGN)
        return os.pread(file.fileno(), self.place - start, start)


def _whole_characters(found: bytes) -> bytes:
    """Without the bytes at the end that are the beginning of a character of UTF-8."""
    for length in range(1, min(4, len(found)) + 1):
        byte = found[-length]
        if byte >= 0xC0:  # the first of a character of two to four bytes
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return found[:-length] if length < needed else found
        if byte < 0x80:
            break
    return found
