"""How a sandbox and its child talk over pipes. Numbers are 32-bit, little endian.

    request    length, JSON of the request; then, where it names no path, the file in pieces: length, bytes; a length of 0 ends it
    answer     length of the JSON, length of the texts, JSON, the texts of its documents as UTF-8, one after the other

An answer holds some documents; the last one of a request says "done", or "unreadable" and the reason.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

from cllm.data.documents.json_records import clean
from cllm.data.extract.document import Document

PIECE = 1 << 18  # bytes of a file that are sent together
MORE, DONE, UNREADABLE = "more", "done", "unreadable"
DIVISION = "division"  # asked for instead of a kind: how a file of records is read in parts
LENGTH = struct.Struct("<I")
_LENGTHS = struct.Struct("<II")
_FIELD_CHARS = 2000  # of a title or another field beside the text


class Answer(NamedTuple):
    state: str
    documents: list[Document]
    reason: str = ""
    peak_bytes: int = 0
    """The most memory that the child ever held."""
    position: int = 0
    """How far the child has read the file, where it has opened it itself."""
    told: dict[str, Any] | None = None
    """Beside documents: how a file is divided, or what a part of it has left (see parts.py)."""

    @property
    def is_last(self) -> bool:
        return self.state != MORE


def write_request(request: dict[str, Any]) -> bytes:
    content = json.dumps(request).encode("ascii")
    return LENGTH.pack(len(content)) + content


def write_piece(content: bytes) -> bytes:
    return LENGTH.pack(len(content)) + content


def write_answer(answer: Answer) -> bytes:
    """Halves of surrogate pairs, which a text may hold and UTF-8 cannot, become U+FFFD."""
    texts = [clean(document.text).encode("utf-8") for document in answer.documents]
    fields = [_fields(document) for document in answer.documents]
    header = {**answer._asdict(), "documents": fields, "sizes": [len(text) for text in texts]}
    content = json.dumps(header, ensure_ascii=True).encode("ascii")
    return b"".join([_LENGTHS.pack(len(content), sum(map(len, texts))), content, *texts])


def _fields(document: Document) -> dict[str, str]:
    values = asdict(document)
    del values["text"]
    return {name: clean(str(value)[:_FIELD_CHARS]) for name, value in values.items() if value}


class AnswerReader:
    """Takes bytes as they arrive, and gives the answers that are complete."""

    def __init__(self) -> None:
        self._held = bytearray()

    def add(self, content: bytes) -> None:
        self._held += content

    def answers(self) -> Iterator[Answer]:
        """Raises ValueError for what is no answer."""
        while len(self._held) >= _LENGTHS.size:
            header_size, text_size = _LENGTHS.unpack_from(self._held)
            begin = _LENGTHS.size + header_size
            if len(self._held) < begin + text_size:
                return
            header = json.loads(bytes(self._held[_LENGTHS.size : begin]))
            documents = []
            for fields, size in zip(header.pop("documents"), header.pop("sizes"), strict=True):
                documents.append(Document(text=self._held[begin : begin + size].decode("utf-8"), **fields))
                begin += size
            del self._held[:begin]
            yield Answer(documents=documents, **header)
