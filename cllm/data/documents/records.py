"""Records of structured text: JSON in every layout that programs write (json_records.py), tables (tables.py) and Parquet (parquet.py), whose rows
become dicts.

    records = Records(path, decoding_of(path))
    for place, value in records.read(malformed):     # place: "12", the line that the record begins in; "12#2" for the second one there; of
                                                     # Parquet the number of the row
        ...

A record is a JSON object, a string, or a list of messages. No file is held in memory, only the record that is being read. What cannot be read is
reported to `malformed(reason, place)` and passed over: reading goes on with the next record that can be told.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cllm.data.documents import json_records, parquet, tables
from cllm.data.documents.charset import AUTO, Binary, Charset
from cllm.data.documents.json_records import Malformed
from cllm.data.documents.record_text import charset_of, text_of

JSON_EXTENSIONS = frozenset({".jsonl", ".ndjson", ".jsonlines", ".json"})
TABLE_EXTENSIONS = frozenset({".csv", ".tsv", ".tab"})
RECORD_EXTENSIONS = JSON_EXTENSIONS | TABLE_EXTENSIONS | {parquet.EXTENSION}
HEAD_CHARS = 1 << 20  # from which the layout is told


def decoding_of(path: Path, encoding: str = AUTO) -> Charset | Binary:
    """How to decode a file of records, or why it cannot be read. `encoding`: see `charset.examine`. Raises OSError as `open` does."""
    if path.suffix.lower() == parquet.EXTENSION:
        reason = parquet.refusal(path)
        return Binary(reason) if reason else Charset("utf-8", "strict", "the format")
    with open(path, "rb") as file:
        return charset_of(file, encoding)


@dataclass
class Records:
    """The records of one file. How they lie in it is told from its beginning: `layout` of JSON, `table` of a table; both are None of Parquet, which
    says itself how it is to be read.

    head: the file is taken to end after these bytes.
    """

    path: Path
    charset: Charset
    head: bytes | None = None
    layout: json_records.Layout | None = field(init=False, default=None)
    table: tables.Dialect | None = field(init=False, default=None)

    @classmethod
    def of_head(cls, path: Path) -> "Records | Binary":
        """What the first megabyte holds, for a look at a file that may be large; of Parquet, the file itself."""
        if path.suffix.lower() == parquet.EXTENSION:
            decoding = decoding_of(path)
            return decoding if isinstance(decoding, Binary) else cls(path, decoding)
        with open(path, "rb") as file:
            head = file.read(HEAD_CHARS)
        if len(head) == HEAD_CHARS:  # not in the middle of a character
            head = head[: head.rfind(b"\n") + 1] or head.rstrip(bytes(range(128, 256)))
        charset = charset_of(io.BytesIO(head))
        return charset if isinstance(charset, Binary) else cls(path, charset, head)

    def __post_init__(self) -> None:
        if self.path.suffix.lower() == parquet.EXTENSION:
            return
        text, complete = "", True
        with self._open() as file:
            for chunk in text_of(file, self.charset):
                if len(text) >= HEAD_CHARS:
                    complete = False
                    break
                text += chunk
        if self.path.suffix.lower() in TABLE_EXTENSIONS:
            self.table = tables.dialect_of(text, complete)
        else:
            self.layout = json_records.layout_of(text, complete)

    @property
    def unit(self) -> str:
        """What people call a record in this layout."""
        return "record" if self.layout is not None else "row"

    @property
    def file_kind(self) -> str:
        """What people call a file in this layout."""
        return "JSON file" if self.layout is not None else "table" if self.table is not None else "Parquet file"

    def read(
        self, malformed: Malformed, report: Callable[[int], None] | None = None, fields: Sequence[str] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """(place, value) of each record, in order. `report` hears how many bytes of the file were read since it was last called.

        fields: those that are needed; others may be missing where leaving them out saves time.
        """
        if self.layout is None and self.table is None:
            yield from parquet.rows(self.path, malformed, fields, report)
            return
        with self._open() as file:
            chunks = text_of(file, self.charset) if report is None else _counted(text_of(file, self.charset), file, report)
            if self.table is not None:
                yield from tables.rows(chunks, self.table, malformed)
            elif self.layout is not None:
                yield from json_records.read(chunks, self.layout, malformed)

    def sample(self, count: int = 1000, chars: int = HEAD_CHARS) -> list[Any]:
        """The first records, at most so many, and none that begins after so many characters of values."""
        found: list[Any] = []
        size = 0
        for _, value in self.read(lambda reason, place: None):
            found.append(value)
            size += _rough_size(value)
            if len(found) >= count or size >= chars:
                break
        return found

    def _open(self) -> IO[bytes]:
        return open(self.path, "rb") if self.head is None else io.BytesIO(self.head)


def _counted(chunks: Iterator[str], file: IO[bytes], report: Callable[[int], None]) -> Iterator[str]:
    done = 0
    for chunk in chunks:
        place = file.tell()
        report(place - done)
        done = place
        yield chunk


def _rough_size(value: Any) -> int:
    if isinstance(value, dict):
        return sum(len(each) if isinstance(each, str | list) else 8 for each in value.values())
    return len(value) if isinstance(value, str | list) else 8
