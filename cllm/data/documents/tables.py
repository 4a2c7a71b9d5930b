"""Tables in text: which character separates the columns, how fields are quoted, whether the first row names them, and the rows themselves.

Python's csv module takes a row apart; what it leaves open is decided here. It cannot tell a delimiter or a header reliably (its Sniffer guesses from
letter counts), and it never complains about a quote that is not closed, which swallows the rows after it.
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

LINE_CHARS = 1 << 27  # a longer line is passed over: it would have to be held whole
FIELD_CHARS = 1 << 26  # a longer field is taken to be one whose quote is not closed
_NO_DELIMITER = "\x1f"  # for a table of one column
_SNIFFED_ROWS = 200
_LINES_ABOVE = 5  # that may stand above the first row
_HEADER_NAMES = """
    id index key uuid text content contents body title subject headline name author user username date time timestamp created_at url link source lang
    language label labels class category tag tags score rating stars sentiment split article document story passage paragraph sentence abstract
    summary description comment review message post tweet transcript lyrics code answer
    question instruction input output prompt completion response context
    query system history
"""
HEADER_NAMES = frozenset(_HEADER_NAMES.split())

Malformed = Callable[[str, str], None]


@dataclass(frozen=True)
class Dialect:
    """How the rows of a table are written. `columns`: their names, "column 1" and so on where the file has none."""

    delimiter: str
    columns: tuple[str, ...]
    quoted: bool = True
    escape: str | None = None
    has_header: bool = True
    skipped_lines: int = 0
    last_is_longest: bool = False  # then delimiters too many in a row belong to the last column

    def reader(self, lines: Iterable[str], strict: bool = False) -> Any:
        csv.field_size_limit(FIELD_CHARS)
        return csv.reader(
            lines, delimiter=self.delimiter, quoting=csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE,
            escapechar=self.escape, doublequote=self.escape is None, strict=strict,
        )  # fmt: skip


def lines_of(chunks: Iterable[str]) -> Iterator[str]:
    """Lines with their newline, whatever the chunks they come in. Of one longer than LINE_CHARS, its beginning, which is longer as well: `is_cut`."""
    parts: list[str] = []
    size = 0
    for chunk in chunks:
        *whole, rest = chunk.split("\n")
        for line in whole:
            if size <= LINE_CHARS:
                parts.append(line)
            yield "".join(parts) + "\n"
            parts.clear()
            size = 0
        if rest and size <= LINE_CHARS:
            parts.append(rest)
            size += len(rest)
    if parts:
        yield "".join(parts)


def is_cut(line: str) -> bool:
    """Whether `lines_of` may have left out the end of a line."""
    return len(line) > LINE_CHARS


def dialect_of(head: str, complete: bool) -> Dialect:
    """The dialect of a table from the beginning of it; `complete`: that is all of it."""
    lines = list(lines_of([head]))
    if not complete and len(lines) > 1:
        lines.pop()
    skipped = 0
    named = re.fullmatch(r"\ufeff?\"?sep=(.)\"?\s*", lines[0]) if lines else None  # what Excel writes to name its delimiter
    if named:
        lines, skipped = lines[1:], 1
    text = "".join(lines)
    escape = "\\" if text.count('\\"') > 1 and '""' not in text.replace(',""', "") else None
    best: tuple[tuple[float, float, int, bool], Dialect, list[list[str]]] | None = None
    for delimiter in named[1] if named else ",\t;|":
        for quoted in (True, False) if delimiter == "\t" and '"' in text else (True,):
            dialect = Dialect(delimiter, (), quoted, escape, skipped_lines=skipped)
            above, rows = _first_rows(dialect, lines)
            width = len(rows[0]) if rows else 0
            if width < 2:
                continue
            even = sum(len(row) == width for row in rows) / len(rows)
            # Commas in sentences may happen to be equally many in each row, but a blank follows them.
            close = -text.count(delimiter + " ") / text.count(delimiter)
            rank = even, close, width, quoted == (delimiter != "\t" or _quotes_fields(text))
            if best is None or rank > best[0]:
                best = rank, replace(dialect, skipped_lines=skipped + above), rows
    if best is not None:
        (even, close, width, _), dialect, rows = best
        has_header = _is_header(rows)
        ragged = has_header and all(len(row) >= width for row in rows)  # the last column holds delimiters
        if (even >= 0.5 or ragged) and (has_header or close > -0.9):
            return _with_columns(dialect, rows)
    dialect = Dialect(_NO_DELIMITER, (), escape=escape, skipped_lines=skipped)
    return _with_columns(dialect, _first_rows(dialect, lines)[1])


def _quotes_fields(text: str) -> bool:
    """Whether quotes enclose fields between tabs; many programs write a quote there as it is."""
    opened = len(re.findall(r'(?:^|\t)"', text, re.MULTILINE))
    closed = len(re.findall(r'"(?:$|\t)', text, re.MULTILINE))
    return opened == closed


def _first_rows(dialect: Dialect, lines: list[str]) -> tuple[int, list[list[str]]]:
    """The first rows that are not blank, without a title or remarks above them, and how many lines those are."""
    rows: list[list[str]] = []
    ends: list[int] = []  # lines up to the end of each row
    reader = dialect.reader(lines)
    try:
        for row in islice(reader, _SNIFFED_ROWS):
            if row:
                rows.append(row)
                ends.append(reader.line_num)
    except csv.Error:  # a field that never ends: what came before it tells enough
        pass
    widths = Counter(map(len, rows))
    usual = max(widths, key=lambda width: (widths[width], width), default=1)
    above = next((number for number, row in enumerate(rows[: _LINES_ABOVE + 1]) if len(row) == usual), 0)
    remarks, table = rows[:above], rows[above:]
    if above and widths[usual] >= 0.8 * len(table) and all(len(row) == 1 or row[0].startswith("#") for row in remarks) and _is_header(table):
        return ends[above - 1], table
    return 0, rows


def _with_columns(dialect: Dialect, rows: list[list[str]]) -> Dialect:
    width = len(rows[0]) if rows else 1
    has_header = _is_header(rows)
    given = [cell.strip().lstrip("\ufeff") for cell in rows[0]] if has_header else [""] * width
    columns = tuple(name or f"column {number}" for number, name in enumerate(given, 1))
    lengths = [sum(len(row[i]) for row in rows[has_header:] if len(row) == width) for i in range(width)]
    longest = width > 1 and lengths[-1] == max(lengths) and '"' not in "".join(rows[0])
    return Dialect(dialect.delimiter, columns, dialect.quoted, dialect.escape, has_header, dialect.skipped_lines, longest)


def _is_header(rows: list[list[str]]) -> bool:
    """Whether the first row names the columns: short, different, no numbers, and a usual name among them or unlike what stands below."""
    if not rows:
        return False
    names = [cell.strip().lstrip("\ufeff") for cell in rows[0]]
    if not any(names) or any(not name for name in names[1:]) or len(set(names)) < len(names):
        return False
    if any(len(name) > 64 or name.count(" ") > 5 or _is_number(name) for name in names):
        return False
    if any(name.lower() in HEADER_NAMES for name in names) or len(rows) == 1:
        return True
    below = [row for row in rows[1:] if len(row) == len(names)] or rows[1:]
    if not any(" " in name for name in names) and sum(" " in "".join(row).strip() for row in below) > len(below) / 2:
        return True
    for i, name in enumerate(names):
        cells = [row[i] for row in below if i < len(row) and row[i].strip()]
        if cells and (sum(map(_is_number, cells)) > len(cells) / 2 or sum(map(len, cells)) >= max(20, 3 * len(name)) * len(cells)):
            return True
    return False


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"\s*[-+]?[\d.,]+(e[-+]?\d+)?\s*%?\s*", cell, re.IGNORECASE) is not None and any(c.isdigit() for c in cell)


class _Lines:
    """Lines as csv takes them, with those of the row that is being read at hand, so that they can be given back."""

    def __init__(self, lines: Iterator[str], number: int):
        self._lines = lines
        self._returned: list[str] = []  # in reverse
        self.number = number  # of lines taken, and before those
        self.row: list[str] = []

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._returned.pop() if self._returned else next(self._lines, None)
        if line is None:
            raise StopIteration
        self.number += 1
        self.row.append(line)
        return line

    def give_back(self) -> None:
        """All lines of this row but the first."""
        self.number -= len(self.row) - 1
        self._returned += reversed(self.row[1:])
        self.row = self.row[:1]


def rows(chunks: Iterable[str], dialect: Dialect, malformed: Malformed, line: int = 1) -> Iterator[tuple[str, dict[str, str]]]:
    """(line that it begins in, column -> field) of each row. line: the number of the first one."""
    lines = _Lines(lines_of(chunks), line - 1)
    for _ in range(dialect.skipped_lines):
        next(lines, None)
    reader = dialect.reader(lines)
    width, is_first = len(dialect.columns), dialect.has_header
    while True:
        lines.row = []
        place = str(lines.number + 1)
        try:
            row = next(reader, None)
        except csv.Error:  # the only one without `strict`: a field longer than allowed
            if len(lines.row) == 1:
                malformed(f"row with a field of more than {FIELD_CHARS >> 20} million characters", place)
            row = []
        if row is None:
            return
        if len(lines.row) > 1 and (len(row) != width or not _is_closed(dialect, lines.row)):
            malformed("row with a quote that is not closed", place)
            lines.give_back()
            continue
        if any(map(is_cut, lines.row)):
            malformed(f"row of more than {LINE_CHARS >> 20} million characters", place)
            continue
        if row and is_first:
            is_first = False
            continue
        if len(row) > width:
            if not dialect.last_is_longest or '"' in "".join(lines.row):
                malformed("row with more fields than the table has columns", place)
                continue
            row = [*row[: width - 1], dialect.delimiter.join(row[width - 1 :])]
        if any(row):
            yield place, dict(zip(dialect.columns, row))


def _is_closed(dialect: Dialect, lines: list[str]) -> bool:
    """Whether a row of several lines ends where its quotes say: a quote that was never closed ends at the next one, in the middle of a field."""
    try:
        next(dialect.reader(iter(lines), strict=True))
    except csv.Error:
        return False
    return True
