"""Files and folders that appear whole or not at all.

New content is written beside its destination under a name of its own, `.NAME.1f2e3d4c5b6a7988.tmp`, flushed to the disk, and then renamed. A
reader sees the old content or the new content and never a part of either, and so does a program that starts after a crash or a power failure.

Each writer holds a lock (flock) on its temporary entry. The kernel releases the lock when the process ends, however it ends, so an entry that
nobody has locked was left behind by a killed writer, and the next writer of the same destination removes it.

These functions raise OSError. `cllm.files` turns it into an error for people.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TEMPORARY = re.compile(r"\.(?P<label>.+)\.[0-9a-f]+(?P<old>\.old)?\.tmp", re.DOTALL)
_LONGEST_NAME = 255 - len("..0123456789abcdef.old.tmp")  # bytes of a name that its temporary name still has room for
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP)


def write_file(place: str | Path, content: bytes) -> None:
    """Creates or replaces a file in one step. Missing parent folders are created."""
    with new_file(place) as beside:
        beside.write_bytes(content)


@contextmanager
def new_file(place: str | Path) -> Iterator[Path]:
    """Yields the path of an empty file to fill, which becomes `place` at the end of the block.

    If the block raises, `place` is left as it was. A link is followed, so the file that it points to is the one replaced. Anything that exists
    and is not a regular file (a folder, a device, a pipe) raises OSError.
    """
    place = _destination(place)
    if place.exists() and not place.is_file():
        raise OSError(errno.EEXIST, "it exists and is not a regular file", str(place))
    beside, lock = _create(place, folder=False)
    try:
        yield beside
        flush(beside)
        os.replace(beside, place)
        flush(place.parent)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def new_folder(place: str | Path) -> Iterator[Path]:
    """Yields the path of an empty folder to fill, which becomes `place` at the end of the block, instead of the folder that was there.

    If the block raises, `place` is left as it was. Replacing a folder takes two renames. A process that is killed between them leaves the old
    folder beside its place, and `clean` or the next writer puts it back.
    """
    place = _destination(place)
    if place.exists() and not place.is_dir():
        raise OSError(errno.ENOTDIR, "it exists and is not a folder", str(place))
    beside, lock = _create(place, folder=True)
    old = _temporary(place, ".old")
    try:
        yield beside
        _flush_all(beside)
        if place.exists():
            os.rename(place, old)
        os.rename(beside, place)
        flush(place.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        with suppress(OSError):
            if old.exists() and not place.exists():
                os.rename(old, place)
        raise
    finally:
        if place.exists():  # otherwise the old folder is all there is, and stays for `clean` to put back
            shutil.rmtree(old, ignore_errors=True)
        os.close(lock)


def remove_folder(place: str | Path) -> None:
    """Deletes a folder. It loses its name first, so that a folder that is half deleted is never taken for a whole one."""
    doomed = _temporary(Path(place))
    os.rename(place, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clean(folder: str | Path, name: str | None = None, *, alone: bool = False) -> None:
    """Removes what killed writers left in `folder`, or only what was to become `name` there, and puts back a folder that was moved aside.

    Entries whose writer is still at work are kept. `alone=True` skips that question: the caller knows that nobody else writes into the folder.
    """
    folder, wanted = Path(folder), None if name is None else _label(name)
    for entry in os.listdir(folder) if folder.is_dir() else ():
        found = _TEMPORARY.fullmatch(entry)
        if found is None or wanted not in (None, found["label"]):
            continue
        with suppress(OSError):  # another process was faster, or the entry is not ours to remove
            handle = os.open(folder / entry, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                if not alone:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _take_away(folder / entry, folder / (name or found["label"]) if found["old"] else None)
            finally:
                os.close(handle)


def flush(path: str | Path) -> None:
    """Returns when the content of a file, or the list of names in a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:  # some file systems have no flush for folders
            raise
    finally:
        os.close(handle)


def _flush_all(folder: Path) -> None:
    for inside, _, names in os.walk(folder, topdown=False):
        for name in names:
            flush(Path(inside, name))
        flush(inside)


def _destination(place: str | Path) -> Path:
    """The real path of a destination whose parent folders exist and hold no leftovers of it."""
    place = Path(os.path.realpath(place))
    _make_folders(place.parent)
    clean(place.parent, place.name)
    return place


def _make_folders(folder: Path) -> None:
    """Creates a folder and its parents; each of their names survives a power failure."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not folder.exists():
        _make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        flush(folder.parent)


def _label(name: str) -> str:
    """The part of a temporary name that tells its destination: the destination's name, or a digest of a name that is too long for that."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= _LONGEST_NAME else hashlib.sha256(encoded).hexdigest()[:32]


def _temporary(place: Path, kind: str = "") -> Path:
    return place.with_name(f".{_label(place.name)}.{os.urandom(8).hex()}{kind}.tmp")


def _create(place: Path, folder: bool) -> tuple[Path, int]:
    """Makes a temporary file or folder for `place`. Returns its path and the descriptor that holds its lock."""
    while True:
        beside = _temporary(place)
        if folder:
            beside.mkdir()
        else:
            beside.touch(exist_ok=False)
        # In the moment before it is locked, another writer may take it for a leftover and remove it. Then a new one is made.
        try:
            handle = os.open(beside, os.O_RDONLY)
        except FileNotFoundError:
            continue
        except OSError:
            _take_away(beside)
            raise
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if beside.exists():
            return beside, handle
        os.close(handle)


def _take_away(leftover: Path, original: Path | None = None) -> None:
    """Removes a leftover, or gives it back the name `original` where nothing has taken its place."""
    if original is not None and not original.exists():
        os.rename(leftover, original)
    elif leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)
