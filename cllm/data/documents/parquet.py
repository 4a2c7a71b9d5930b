"""Rows of Parquet files, which `cllm prepare` writes and data sets come in: column -> value, as a line of JSON would hold them.

A file is read a few rows at a time, and of a file of many columns only those that are asked for. pyarrow reads it (the extra `data`); without
pyarrow a file is left out and the reason names the extra. A row with words in the column `dropped_because` is one that `cllm prepare` has decided
against: it is reported to `malformed` with that reason, as a damaged row of a group is, and reading goes on behind it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

EXTENSION = ".parquet"
MAGIC = b"PAR1"
NEEDS_PYARROW = "Parquet file (reading one takes pyarrow: pip install 'cllm[data]')"
DROPPED = "dropped_because"
_ROWS = 256  # decoded together
_REASONS = 20  # of dropped rows that are told apart in a file

Malformed = Callable[[str, str], None]


def refusal(path: Path) -> str:
    """Why a file cannot be read as Parquet, in words for what was left out; empty where it can. Reads its footer. Raises OSError as `open` does."""
    with open(path, "rb") as file:
        head = file.read(4)
    if head != MAGIC:
        return "Parquet file that is encrypted" if head == b"PARE" else "Parquet file that is damaged (it does not begin as one)"
    try:
        import pyarrow as arrow
    except ImportError:
        return NEEDS_PYARROW
    try:
        with _open(path):
            return ""
    except (arrow.ArrowException, OSError, ValueError) as error:
        encrypted = "encrypt" in str(error).lower() or "decrypt" in str(error).lower()
        return f"Parquet file that is {'encrypted' if encrypted else 'damaged (its list of columns cannot be read)'}"


def group_sizes(path: Path | IO[bytes]) -> list[int]:
    """The bytes of each row group in the file. None for a file that `cllm prepare` has written: the reasons of its dropped rows are told together."""
    with _open(path) as file:
        if DROPPED in file.schema_arrow.names:
            return []
        groups = map(file.metadata.row_group, range(file.num_row_groups))
        return [sum(group.column(number).total_compressed_size for number in range(group.num_columns)) for group in groups]


def rows(
    path: Path | IO[bytes],
    malformed: Malformed,
    columns: Sequence[str] | None = None,
    report: Callable[[int], None] | None = None,
    groups: tuple[int, int] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(number of the row, counted from 1; column -> value) of each row that was kept, in order. A value that is null is left out.

    columns: names, or paths of names joined by dots; None takes all. `report` hears how many bytes of the file were dealt with since the last call.
    groups: only row groups number `groups[0]` to `groups[1]` (not included).
    """
    import pyarrow as arrow

    wanted = None if columns is None else [*columns, DROPPED]
    reasons: set[str] = set()
    with _open(path) as file:
        total, done = max(1, file.metadata.num_rows), 0
        size = path.stat().st_size if isinstance(path, Path) else 0
        first = 1
        for group in range(file.num_row_groups):
            number = first
            first += file.metadata.row_group(group).num_rows
            if groups is not None and not groups[0] <= group < groups[1]:
                continue
            try:
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=wanted, use_threads=False):
                    values = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns)}
                    for i in range(batch.num_rows):
                        row = {name: each[i] for name, each in values.items() if each[i] is not None}
                        why = row.pop(DROPPED, None)
                        if isinstance(why, str) and why:
                            malformed(f"row dropped ({_few(why, reasons)})", str(number + i))
                        else:
                            yield str(number + i), row
                    number += batch.num_rows
                    place = size * (number - 1) // total
                    if report is not None and place > done:
                        report(place - done)
                        done = place
            except (arrow.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of the format, whose errors have no number
                    raise
                malformed("row that is damaged, with those after it in its group", str(number))


def _open(path: Path | IO[bytes]) -> Any:
    """Reads pages as they are needed and not the whole of a row group ahead."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, memory_map=False, page_checksum_verification=True)


def _values(column: Any) -> list[Any]:
    """The values of a column as JSON would hold them; None for one that Python cannot hold, such as a date of the year 20000."""
    import pyarrow as arrow

    try:
        values = column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast(arrow.large_binary()).to_pylist()
        values = [None if each is None else each.decode("utf-8", "replace") for each in raw]
    except (arrow.ArrowException, ValueError, OverflowError):
        return [None] * len(column)
    return values if arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type) else list(map(_without_nulls, values))


def _without_nulls(value: Any) -> Any:
    """The fields that are null are left out of what is nested, because those who wrote lines of JSON had left them out. Bytes are text."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _few(why: str, seen: set[str]) -> str:
    """A reason without the numbers in it, so that alike ones are counted together; no more than some different ones in a file."""
    short = re.sub(r"\d+(?:[.,]\d+)*", "N", " ".join(why.split()))[:80]
    if short not in seen and len(seen) >= _REASONS:
        return "for other reasons"
    seen.add(short)
    return short
