"""The one way to write files: whole or not at all, and one clear line when the disk does not take them. What a file of another kind is.

    write_file(run / "config.toml", content, RUN)
    with new_folder(out, DATA) as beside: ...          # fill `beside`; it becomes `out` at the end of the block

`cllm.runtime.files` says how a file or folder is replaced and what a crash can leave. Here its OSError becomes an error for people, whose class
and words the caller chooses: a `Wording`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cllm.runtime import files
from cllm.runtime.errors import CheckpointError, CLLMError, DataError, OutputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Wording:
    """How a failed write is reported."""

    error: type[CLLMError]
    """Class of the error that is raised."""
    elsewhere: str
    """Where to write instead, to follow "choose"."""
    kept: str = "What was there is unchanged, and nothing half-written was left."
    """A sentence about what the failure has not touched."""

    def of(self, place: Path, error: OSError, num_bytes: int | None = None) -> CLLMError:
        """The error for `place`, which takes `num_bytes` when that is known."""
        full, denied = error.errno in _FULL, error.errno in _DENIED
        remedy = "Free some space or choose" if full else "Make the folder writable or choose" if denied else "Choose"
        what = f"{place}, the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(place)
        room = _room(place, num_bytes) if full else ""
        return self.error(f"could not write {what}: {reason(error)}{room}. {self.kept} {remedy} {self.elsewhere}.")


# Files of a run's folder beside its checkpoints; prepared text and tokens; a model in a file or folder of its own.
RUN = Wording(OutputError, "another folder with --out, then run the same command to go on", "Checkpoints are untouched.")
DATA = Wording(DataError, "another place")
MODEL = Wording(CheckpointError, "another place")


def write_file(place: str | Path, content: bytes, wording: Wording) -> None:
    """Creates or replaces a file in one step. Missing parent folders are created. Raises `wording.error`."""
    with new_file(place, wording, len(content)) as beside:
        beside.write_bytes(content)


@contextmanager
def new_file(place: str | Path, wording: Wording, num_bytes: int | None = None) -> Iterator[Path]:
    """Yields the path of an empty file to fill, which becomes `place` at the end of the block. `num_bytes`: its size, for the error.

    Raises `wording.error` when the disk does not take it. `place` is then left as it was, and also when the block raises anything else.
    """
    with reported(place, wording, num_bytes), files.new_file(place) as beside:
        yield beside


@contextmanager
def new_folder(place: str | Path, wording: Wording, num_bytes: int | None = None) -> Iterator[Path]:
    """Yields the path of an empty folder to fill, which becomes `place` at the end of the block, instead of the folder that was there.

    Raises `wording.error` when the disk does not take it. `place` is then left as it was, and also when the block raises anything else.
    """
    with reported(place, wording, num_bytes), files.new_folder(place) as beside:
        yield beside


def check_writable(place: str | Path, wording: Wording) -> None:
    """Raises `wording.error` where nothing can be written at `place`, as far as permissions tell, before the work of which it is the result."""
    folder = Path(os.path.abspath(place))
    folder = folder if folder.is_dir() else folder.parent
    while not os.path.lexists(folder):  # missing parents are created
        folder = folder.parent
    number = errno.ENOTDIR if not folder.is_dir() else errno.EACCES if not os.access(folder, os.W_OK | os.X_OK) else 0
    if number:
        raise wording.of(Path(place), OSError(number, os.strerror(number), str(folder)))


class Appender:
    """Adds whole lines to the end of a file, which is created where there is none. A context manager.

    What a failed write has added is taken back, and a last line that a killed process left unfinished is ended. Raises `wording.error`.
    """

    def __init__(self, place: str | Path, wording: Wording) -> None:
        self._place, self._wording = Path(place), wording
        with reported(place, wording):
            self._file = open(place, "a+b", buffering=0)  # noqa: SIM115 (closed by `close`)
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self.write("\n")

    def write(self, lines: str) -> None:
        """Adds lines. When this returns the operating system has them, so they survive a kill of this process."""
        with reported(self._place, self._wording):
            before, left = os.fstat(self._file.fileno()).st_size, memoryview(lines.encode("utf-8", "replace"))
            try:
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                self._file.truncate(before)
                raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@contextmanager
def reported(place: str | Path, wording: Wording, num_bytes: int | None = None) -> Iterator[None]:
    """Turns an OSError about `place` into `wording.error`. One about another file, such as a source that cannot be read, passes through."""
    try:
        yield
    except OSError as error:
        if not _concerns(place, error):
            raise
        raise wording.of(Path(place), error, num_bytes) from error


def reason(error: BaseException) -> str:
    """What went wrong, in one short line: the system's words for an OSError."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def _room(place: Path, num_bytes: int | None) -> str:
    folder = Path(os.path.abspath(place)).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    needed = "" if num_bytes is None else f"it needs {num_bytes / 1e6:,.2f} MB, "
    with contextlib.suppress(OSError):
        return f" ({needed}{shutil.disk_usage(folder).free / 1e6:,.2f} MB are free)"
    return ""


def _concerns(place: str | Path, error: OSError) -> bool:
    """Whether an error is about the destination, its temporary entry or its parents. An error without a file name came from writing."""
    if not isinstance(error.filename, str | os.PathLike):
        return True
    real, name = Path(os.path.realpath(place)), Path(os.path.realpath(error.filename))
    if name == real or name in real.parents or real in name.parents:
        return True
    beside = name.relative_to(real.parent).parts[0] if real.parent in name.parents else ""
    return beside.startswith(".") and beside.endswith(".tmp")


# -- files that somebody has named ------------------------------------------------------------------------------------------


def read_named(path: str | Path) -> bytes:
    """The content of a file that was named on the command line: a regular file, or a pipe that has a writer, such as a shell's `<(command)`.

    Raises OSError for everything else. A pipe without a writer and a device such as /dev/zero are refused, because reading them might never end.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # the system has words of its own for a folder
        return Path(path).read_bytes()
    if not stat.S_ISFIFO(mode):
        raise OSError(errno.EINVAL, "it is a device or a socket, not a file", str(path))
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(pipe, "rb") as file:
        try:
            first = os.read(pipe, 1 << 16)
        except BlockingIOError:  # there is a writer, which has not written yet
            first = b""
        else:
            if not first:
                raise OSError(errno.EINVAL, "it is a pipe that nothing is written to", str(path))
        os.set_blocking(pipe, True)
        return first + file.read()


# -- files that are not what was expected ----------------------------------------------------------------------------------

_FOREIGN = (
    (b"GGUF", "is a GGUF file, which CLLM writes and does not read. Give the run or the .cllm file that it was made from."),
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself. Fetch the file with `git lfs pull`."),
    (b"PK\x03\x04", "is a zip archive, as torch.save writes it. A pickle inside can run any code, so it is never opened. Save it as safetensors."),
    (b"\x89HDF", "is an HDF5 file, which CLLM does not read. Save it as safetensors."),
    (b"\x93NUMPY", "is an array of NumPy, which CLLM does not read. Save it as safetensors."),
    (b"\x1f\x8b", "is a gzip archive. Unpack it first."),
    (b"\x28\xb5\x2f\xfd", "is a zstd archive. Unpack it first."),
    (b"BZh", "is a bzip2 archive. Unpack it first."),
    (b"\xfd7zXZ", "is an xz archive. Unpack it first."),
    (b"<!doctype html", "is a web page, not the file itself. Download the file again."),
    (b"<html", "is a web page, not the file itself. Download the file again."),
    (b"<?xml", "is XML, often the error message of a server instead of the file. Download the file again."),
)
_PICKLE = re.compile(rb"\x80[\x02-\x05][^\0]")  # a safetensors file can begin with the same two bytes, then zeros
_ONNX = re.compile(rb"\x08[\x01-\x1f]\x12")  # version of the format, then the name of the program that wrote it


def foreign(path: str | Path, text: bool = True) -> str | None:
    """What a file of another program is, by its first bytes, and what to do: words that follow its name. None where that is not known.

    text: whether a text may be the right file; otherwise it is named too.
    """
    try:
        if not os.path.isfile(path):  # reading a pipe would take from it what the caller is about to read
            return None
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError:
        return None
    if not head:
        return "is empty. Copy or download it again."
    known = next((words for magic, words in _FOREIGN if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(magic.lower())), None)
    if known is not None:
        return known
    if _PICKLE.match(head):
        return "is a pickle. Opening one can run any code, so it is never opened. Save it as safetensors."
    if _ONNX.match(head):
        return "is an ONNX file, which CLLM does not read. Save the weights as safetensors."
    if head[257:262] == b"ustar":
        return "is a tar archive. Unpack it first."
    if not text and not head.translate(None, bytes(range(32, 127)) + b"\t\r\n\f"):
        return "is a text file."
    return None
