"""A folder as a zip archive that is made while it is sent: nothing is written to the disk, and little is held in memory."""

from __future__ import annotations

import io
import os
import stat
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20
MOST_FILES = 100_000
_FIRST, _LAST = 315_619_200, 4_354_732_799  # the times that a zip knows: 1980 to 2107


class _Sent(io.RawIOBase):
    """What `zipfile` writes to: bytes that are taken from it piece by piece."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self._parts.append(bytes(content))
        return len(content)

    def take(self) -> bytes:
        found, self._parts = b"".join(self._parts), []
        return found


def zipped(folder: Path) -> Iterator[bytes]:
    """The archive of all regular files below a folder, under the folder's name, as they are: weights do not become smaller.

    Links and what starts with a dot are left out. A file that grows meanwhile is taken as long as it was; one that cannot be read is left out.
    """
    sent = _Sent()
    with zipfile.ZipFile(sent, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for place in files_below(folder):
            try:
                handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                continue
            with open(handle, "rb") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode):
                    continue
                name = f"{folder.name}/{place.relative_to(folder).as_posix()}"
                when = time.gmtime(min(max(found.st_mtime, _FIRST), _LAST))[:6]
                info = zipfile.ZipInfo(name.encode("utf-8", "replace").decode("utf-8"), when)
                info.external_attr = 0o644 << 16
                left = found.st_size
                with archive.open(info, "w", force_zip64=True) as entry:
                    while left > 0 and (block := file.read(min(_BLOCK, left))):
                        entry.write(block)
                        left -= len(block)
                        yield sent.take()
    yield sent.take()


def files_below(folder: Path) -> Iterator[Path]:
    """Regular files below a folder by name, hidden ones and links left out."""
    count = 0
    for here, folders, names in os.walk(folder, followlinks=False):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for name in sorted(names):
            place = Path(here) / name
            if not name.startswith(".") and place.is_file() and not place.is_symlink():
                count += 1
                if count > MOST_FILES:
                    return
                yield place
