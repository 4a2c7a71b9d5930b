"""The child process of a sandbox: reads one file after the other, as asked for over its input, and answers over its output (see frames.py)."""

import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import IO, Any

from cllm.data.extract import readers
from cllm.data.extract.confine import confine, limit_cpu, peak_bytes, quiet
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.frames import DIVISION, DONE, LENGTH, MORE, UNREADABLE, Answer, write_answer
from cllm.data.extract.options import Options
from cllm.data.extract.parts import Left, Part
from cllm.runtime.printable import printable

_BATCH_CHARS = 1 << 18
_BATCH_DOCUMENTS = 256


class _Pieces(io.RawIOBase):
    """The file that follows a request, as a stream."""

    def __init__(self, source: IO[bytes]):
        self._source = source
        self._left = 0  # of the current piece
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left and not self._ended:
            self._left = LENGTH.unpack(_exactly(self._source, LENGTH.size))[0]
            self._ended = not self._left
        if self._ended:
            return 0
        content = _exactly(self._source, min(len(buffer), self._left))
        buffer[: len(content)] = content
        self._left -= len(content)
        return len(content)

    def drain(self) -> None:
        buffer = bytearray(1 << 16)
        while self.readinto(buffer):
            pass


def _exactly(source: IO[bytes], count: int) -> bytes:
    """So many bytes; the process ends quietly where its parent has gone."""
    content = source.read(count)
    if len(content) < count:
        sys.exit(0)
    return content


def main() -> None:
    number, target = quiet()
    with open(number, "rb", buffering=1 << 16) as source:
        options = Options.from_dict(json.loads(_exactly(source, LENGTH.unpack(_exactly(source, LENGTH.size))[0])))
        confine(options)
        _serve(source, target, options)


def _serve(source: IO[bytes], target: int, options: Options) -> None:
    """Answers one request after the other until the parent closes the pipe."""
    while head := source.read(LENGTH.size):
        request = json.loads(_exactly(source, LENGTH.unpack(head)[0]))
        pieces = _Pieces(source)
        for answer in _answers(request, pieces, options):
            _write(target, write_answer(answer))
            limit_cpu(options.seconds)
        if request["path"] is None:
            pieces.drain()


def _answers(request: dict[str, Any], pieces: _Pieces, options: Options) -> Iterator[Answer]:
    """Some documents each; an exception is an answer as well, but for what ends a process."""
    limit_cpu(options.seconds)
    batch: list[Document] = []
    try:
        told = replace(options, content_type=request["content_type"])
        with open(request["path"], "rb") if request["path"] is not None else io.BufferedReader(pieces) as file:
            if request["kind"] == DIVISION:
                yield Answer(DONE, [], told=readers.divide(file, request["name"], told))
                return
            held, left = 0, Left()
            part = Part(**request["part"]) if request["part"] else None
            for document in readers.documents(file, request["kind"], request["name"], told, part, left):
                batch.append(document)
                held += len(document.text)
                if held >= _BATCH_CHARS or len(batch) >= _BATCH_DOCUMENTS:
                    yield Answer(MORE, batch, position=file.tell() if file.seekable() else 0)
                    batch, held = [], 0
        yield Answer(DONE, batch, "", peak_bytes(), told=left.to_dict() if part else None)
    except Unreadable as error:
        yield Answer(UNREADABLE, batch, printable(error), peak_bytes())
    except OSError as error:  # of the path, which was there a moment ago
        yield Answer(UNREADABLE, batch, f"unreadable ({error.strerror})", peak_bytes())


def _write(target: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        try:
            left = left[os.write(target, left) :]
        except BrokenPipeError:
            sys.exit(0)


if __name__ == "__main__":
    main()
