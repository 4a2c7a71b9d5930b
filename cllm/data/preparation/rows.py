"""A document as a row of a Parquet file: its columns, and files of rows that are written and read in pieces of bounded size.

All stages pass rows of one schema, so that any of their files can be opened with any tool. Parquet's bytes depend on the version of pyarrow, which
writes its name into each file; `content_digest` does not, and is what two machines compare.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cllm.files import DATA, new_file
from cllm.runtime.errors import DataError

Row = dict[str, Any]

COLUMNS = (
    "text", "id", "url", "path", "title", "date", "language", "licence", "source", "kind", "code", "note", "scores", "dropped_because",
)  # fmt: skip
"""All are texts. `path` is the file below its source, and the part of it where it holds several documents ("mail.mbox#message 3"); `source` the name
of the source; `kind` that of the file; `code` the programming language; `note` what was lost although the document was read; `scores` a JSON object
of what the filters measured. `dropped_because` is empty for a document that is kept."""
_ANEW = "Remove it and run the same cllm prepare again, which makes it anew."
GROUP_ROWS, GROUP_CHARS = 1000, 32 << 20  # of a row group at most


def arrow() -> Any:
    """pyarrow, with its Parquet part; DataError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"documents are kept in Parquet files, which needs pyarrow ({error}). Install it: pip install 'cllm[data]'") from None
    return pyarrow


def schema() -> Any:
    pa = arrow()
    return pa.schema([(name, pa.large_string() if name == "text" else pa.string()) for name in COLUMNS])


class RowWriter:
    """Collects rows into row groups of an open Parquet file, and digests what they say."""

    def __init__(self, place: Path) -> None:
        self._pa = arrow()
        self._file = self._pa.parquet.ParquetWriter(place, schema(), compression="zstd", compression_level=3, use_dictionary=list(COLUMNS[2:]))
        self._waiting: list[Row] = []
        self._chars = 0
        self._digest = hashlib.blake2b(digest_size=16)
        self.num_rows = 0

    def add(self, row: Row) -> None:
        for name in COLUMNS:
            value = row[name].encode("utf-8", "replace")
            self._digest.update(len(value).to_bytes(8, "little"))
            self._digest.update(value)
        self._waiting.append(row)
        self._chars += len(row["text"])
        self.num_rows += 1
        if len(self._waiting) >= GROUP_ROWS or self._chars >= GROUP_CHARS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            columns = {name: [row[name] for row in self._waiting] for name in COLUMNS}
            self._file.write_table(self._pa.table(columns, schema=schema()), row_group_size=len(self._waiting))
            self._waiting, self._chars = [], 0

    def abandon(self) -> None:
        """Ends the file as it is; the error that led here is the one to tell, not that of a disk which takes no end of it either."""
        with suppress(OSError, self._pa.ArrowException):
            self._file.close()

    def close(self) -> str:
        """Ends the file; the digest of all rows."""
        self._flush()
        self._file.close()
        return self._digest.hexdigest()


@contextmanager
def writing(place: Path) -> Iterator[RowWriter]:
    """Rows that become the file `place` at the end of the block."""
    with new_file(place, DATA) as beside:
        writer = RowWriter(beside)
        try:
            yield writer
        except BaseException:
            writer.abandon()
            raise
        writer.close()


def read_rows(place: Path, columns: Sequence[str] = COLUMNS, first: int = 0, last: int | None = None) -> Iterator[Row]:
    """Rows number `first` to `last` (not included) of a file; row groups outside are not read. DataError where the file is damaged."""
    for group in read_groups(place, columns, first, last):
        lists = [group.column(name).to_pylist() for name in columns]
        for values in zip(*lists):
            yield dict(zip(columns, values))


def read_groups(place: Path, columns: Sequence[str], first: int = 0, last: int | None = None) -> Iterator[Any]:
    """The same as tables of Arrow, one for each row group that has a part in it."""
    pa = arrow()
    try:
        with pa.parquet.ParquetFile(place) as file:
            begin = 0
            for number in range(file.num_row_groups):
                end = begin + file.metadata.row_group(number).num_rows
                if end > first and (last is None or begin < last):
                    table = file.read_row_group(number, columns=list(columns), use_threads=False)
                    if table.num_columns != len(columns):
                        raise DataError(f"{place} was not written by cllm prepare: it lacks some of the columns {', '.join(columns)}. {_ANEW}")
                    start = max(first - begin, 0)
                    yield table.slice(start, (end if last is None else min(end, last)) - begin - start)
                begin = end
    except (OSError, pa.ArrowException) as error:
        why = " ".join(str(error).split())[:200].rstrip(".")
        raise DataError(f"{place} cannot be read as Parquet: {why}. {_ANEW}") from error


def texts_at(place: Path, rows: Any) -> Iterator[tuple[int, str]]:
    """(row, text) of some rows of a file, an ascending array of numbers. Row groups that hold none of them are not read."""
    pa = arrow()
    with pa.parquet.ParquetFile(place) as file:
        begin = taken = 0
        for number in range(file.num_row_groups):
            end, first = begin + file.metadata.row_group(number).num_rows, taken
            while taken < len(rows) and rows[taken] < end:
                taken += 1
            if taken > first:
                column = file.read_row_group(number, columns=["text"], use_threads=False).column("text")
                for row in rows[first:taken].tolist():
                    yield row, column[row - begin].as_py()
            begin = end


def content_digest(rows: Iterable[Row]) -> str:
    """What the rows say, whichever version of pyarrow wrote them."""
    digest = hashlib.blake2b(digest_size=16)
    for row in rows:
        for name in COLUMNS:
            value = row[name].encode("utf-8", "replace")
            digest.update(len(value).to_bytes(8, "little"))
            digest.update(value)
    return digest.hexdigest()


def file_facts(place: Path) -> list[Any]:
    """Size and digest of a finished file, as a task reports it: [bytes, blake2b]."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with open(place, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]


def as_json(values: Any) -> str:
    """One form for one value, whatever the order of its keys."""
    return json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def digest_of(values: Any) -> str:
    return hashlib.blake2b(as_json(values).encode("utf-8", "replace"), digest_size=16).hexdigest()
