"""Foreign files are read in a child process that has limits and no network: whatever their bytes are, the process that asks lives on.

    with Sandbox(options) as sandbox:
        for document in sandbox.documents(source, name):     # raises Unreadable
            ...

A child reads thousands of files. One that crashes, hangs or takes too much costs the file that it was reading, and the next file gets a new child.
What a file gives must not depend on the files before it, so a file at which an old child was lost is read once more in a new one, whose answer
counts.
"""

import io
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from cllm.data.extract import readers
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.frames import DIVISION, PIECE, UNREADABLE, Answer, AnswerReader, write_piece, write_request
from cllm.data.extract.kinds import HEAD_BYTES, kind_of
from cllm.data.extract.options import Options
from cllm.data.extract.parts import Part
from cllm.data.extract.readers import ARCHIVES, COMPRESSED
from cllm.runtime.quantities import size

_FILES_EACH = 5000  # that a child reads before a new one takes over
_HARMLESS = frozenset({"text", "code"})
_HARMLESS_BYTES = 1 << 20  # up to which such files are read in this process: no parser is involved, and their time is bounded by their size
_WALL = 10  # times the seconds of CPU that an answer may take
_COMPLAINT_BYTES = 4096

Source = bytes | Path | IO[bytes]


class Sandbox:
    """Reads files one after the other in a child process of its own. It belongs to the thread that uses it."""

    def __init__(self, options: Options = Options()):
        self._options = options
        self._child: _Child | None = None
        self.position = 0
        """How far the newest file has been read in the child, in bytes, where it is one of the disk."""
        self.told: dict[str, Any] = {}
        """What the child has said of the newest file beside its documents."""

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None

    def read(self, source: Source, name: str, content_type: str = "") -> list[Document]:
        """All documents of a file; see `documents`."""
        return list(self.documents(source, name, content_type=content_type))

    def divide(self, path: Path, name: str) -> dict[str, Any]:
        """How the parts of a file of records are to be read (see `records.divide`); nothing where it has to be read as a whole."""
        self.told = {}
        try:
            list(self.documents(path, name, DIVISION))
        except (Unreadable, OSError):  # as who reads the whole will find as well
            return {}
        return self.told

    def documents(self, source: Source, name: str, kind: str = "", content_type: str = "", part: Part | None = None) -> Iterator[Document]:
        """The documents of a file, in order.

        source: its content, where it lies on the disk, or a stream, which is read once. name: tells the kind of file where its content does not.
        kind: what `kind_of` says where it is known. content_type: what a server said. part: of a file of the disk that is divided; then `told` is
        what the part has left.
        Raises Unreadable with the reason in words, also after some documents where a file is damaged further on, and OSError where a path
        cannot be opened.
        """
        if isinstance(source, Path):
            with open(source, "rb") as file:  # permissions are the user's to mend, and told by this process
                head = b"" if kind and kind not in _HARMLESS else file.read(_HARMLESS_BYTES)
                kind = kind or kind_of(name, head[:HEAD_BYTES])
                if kind in _HARMLESS and len(head) < _HARMLESS_BYTES:
                    source = head
        elif isinstance(source, bytes):
            kind = kind or kind_of(name, source[:HEAD_BYTES])
        elif not kind:
            raise ValueError("a stream has to be given with its kind")
        if kind in ARCHIVES | COMPRESSED:
            raise Unreadable(f"unknown type (a {kind} archive where a single file was expected)")
        if isinstance(source, bytes) and kind in _HARMLESS and len(source) <= _HARMLESS_BYTES:
            yield from readers.documents(io.BytesIO(source), kind, name, replace(self._options, content_type=content_type))
            return
        path = os.path.abspath(source) if isinstance(source, Path) else None
        request = {"name": name, "kind": kind, "path": path, "content_type": content_type, "part": part and part.to_dict()}
        given = 0
        while True:
            child = self._ready(new=given > 0 or not isinstance(source, bytes | Path))
            skipped = given
            try:
                for document in child.documents(request, source):
                    self.position = child.position
                    if skipped:
                        skipped -= 1
                        continue
                    given += 1
                    yield document
                self.told = child.told
                return
            except _Lost as lost:
                self.close()
                if child.files == 1 or not isinstance(source, bytes | Path):
                    raise Unreadable(lost.reason) from None
            finally:
                if child.is_busy:  # nobody asks for the rest
                    self.close()

    def _ready(self, new: bool) -> "_Child":
        """A child that can take a file; `new`: one that has read none yet."""
        child = self._child
        if child is not None and (child.is_used_up if not new else child.files > 0):
            self.close()
        if self._child is None:
            self._child = _Child(self._options)
        return self._child


class _Lost(Exception):
    """A child that gave no last answer, and what that says about the file."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class _Child:
    """The process and its pipes. `files`: how many it was given; `is_busy`: whether it has not answered all of the last one."""

    def __init__(self, options: Options):
        self.files = 0
        self.is_busy = False
        self.position = 0
        self.told: dict[str, Any] = {}
        self._options = options
        self._peak_bytes = 0
        self._answers = AnswerReader()
        self._complaint = b""
        self._is_mute = False
        # A session of its own, so that Ctrl-C reaches the parent alone; -P, so that no file of the user's folder passes for a module.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cllm.data.extract.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env=_environment(),
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._input, self._output, self._errors = (pipe.fileno() for pipe in (self._process.stdin, self._process.stdout, self._process.stderr))
        for number in (self._input, self._output, self._errors):
            os.set_blocking(number, False)
        self._first = write_request(options.to_dict())

    @property
    def is_used_up(self) -> bool:
        return self.files >= _FILES_EACH or self._peak_bytes > self._options.memory_bytes // 2

    def documents(self, request: dict[str, Any], source: Source) -> Iterator[Document]:
        """Raises Unreadable as the child or the source says, _Lost where the child could not say it."""
        self.files += 1
        self.is_busy = True
        self.position = 0
        outgoing = _Outgoing(self._first + write_request(request), source)
        self._first = b""
        for answer in self._exchange(outgoing):
            self._peak_bytes = max(self._peak_bytes, answer.peak_bytes)
            self.position = max(self.position, answer.position)
            yield from answer.documents
            if not answer.is_last:
                continue
            self.is_busy = False
            self.told = answer.told or {}
            if outgoing.failure is not None:
                raise outgoing.failure
            if answer.reason.startswith("out of memory"):
                raise _Lost(answer.reason)
            if answer.state == UNREADABLE:
                raise Unreadable(answer.reason)

    def _exchange(self, outgoing: "_Outgoing") -> Iterator[Answer]:
        """Sends a request and gives the answers as they come. The last one is given when everything was sent, so that the next request can follow."""
        allowed = _WALL * self._options.seconds
        deadline = time.monotonic() + allowed
        last: Answer | None = None
        pending = memoryview(outgoing.next(True))
        while pending or last is None:
            ready = self._wait(bool(pending), deadline)
            if not ready:
                raise _Lost(f"time limit (no answer after {allowed} seconds)")
            if self._errors in ready:
                self._hear()
            if self._input in ready:
                try:
                    pending = pending[os.write(self._input, pending) :]
                    deadline = time.monotonic() + allowed
                except BrokenPipeError:  # what the child has answered before it went is still there to be read
                    pending = memoryview(b"")
                    outgoing.end()
                if not pending:
                    pending = memoryview(outgoing.next(last is None))
            if self._output in ready:
                content = os.read(self._output, 1 << 20)
                if not content:
                    raise _Lost(self._fate())
                self._answers.add(content)
                for answer in self._answers.answers():
                    deadline = time.monotonic() + allowed
                    if answer.is_last:
                        last = answer
                    else:
                        yield answer
        assert last is not None
        yield last

    def _wait(self, is_sending: bool, deadline: float) -> set[int]:
        """The pipes that have something to read or room to write; none when the time is up."""
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        if not self._is_mute:
            poll.register(self._errors, select.POLLIN)
        if is_sending:
            poll.register(self._input, select.POLLOUT)
        return {number for number, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)}

    def _hear(self) -> bool:
        """Takes what libraries say of an error, of which the end may tell why a process went; whether there was anything."""
        try:
            content = os.read(self._errors, 1 << 16)
        except BlockingIOError:
            return False
        self._is_mute = not content
        self._complaint = (self._complaint + content)[-_COMPLAINT_BYTES:]
        return bool(content)

    def _fate(self) -> str:
        """Why the process ended, in words about the file that it was reading."""
        status = self._process.wait()
        while self._hear():
            pass
        if status == -signal.SIGXCPU:
            return f"time limit (more than {self._options.seconds} seconds)"
        if status == -signal.SIGKILL or re.search(rb"alloc|[Mm]emory", self._complaint):
            return f"out of memory (more than {size(self._options.memory_bytes)})"
        return "damaged (the parser crashed, or needs more memory than it may have)"

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


class _Outgoing:
    """What is sent for one file: the request, and then the file in pieces unless the child opens it itself."""

    def __init__(self, head: bytes, source: Source):
        self.failure: Unreadable | None = None
        """Why the source could not be read to its end."""
        self._head = head
        self._file = None if isinstance(source, Path) else io.BytesIO(source) if isinstance(source, bytes) else source

    def next(self, is_wanted: bool) -> bytes:
        """What to send next; nothing at the end. Where the rest is not wanted any more, only its end is sent."""
        if self._head:
            head, self._head = self._head, b""
            return head
        if self._file is None:
            return b""
        content = b""
        if is_wanted:
            try:
                content = self._file.read(PIECE)
            except Unreadable as error:
                self.failure = error
        if not content:
            self._file = None
        return write_piece(content)

    def end(self) -> None:
        self._file = None


def _environment() -> dict[str, str]:
    """Of the child: this cllm, one thread in every library, and the same order in sets at every start."""
    home = str(Path(__file__).parents[3])
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT"), "1")
    path = os.pathsep.join([home, *map(os.path.abspath, inherited)])
    return {**os.environ, **threads, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "2"}
