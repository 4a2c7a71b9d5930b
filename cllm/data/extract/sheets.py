"""Spreadsheets (xlsx): one document a sheet, as a Markdown table of the values that were last computed. Formulas are not evaluated."""

import datetime
import io
import zipfile
from collections.abc import Iterable
from typing import Any

from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.markdown import pipe_table
from cllm.data.extract.options import Options
from cllm.data.extract.package import Package, iso_date, language_code, properties

MOST_ROWS = 200_000  # of a sheet
MOST_CELLS = 2_000_000  # of a file, empty ones included
MOST_COLUMNS = 256
MOST_SHEETS = 1_000


def read(data: bytes, name: str, options: Options) -> list[Document]:
    """One document for each sheet with values. Raises Unreadable."""
    package = Package(data)
    for part in sorted(package.names):  # the library unpacks these by itself, without a limit
        if part.endswith((".xml", ".rels")):
            package.read(part)
    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = load_workbook(io.BytesIO(data), read_only=True, data_only=True, keep_links=False)
    except (InvalidFileException, KeyError, ValueError, TypeError, AttributeError, IndexError, zipfile.BadZipFile, OSError, SyntaxError) as error:
        raise Unreadable("damaged: the parts of the workbook do not fit together") from error
    core = properties(package.optional_xml("docProps/core.xml"))
    date = iso_date(core.get("modified") or core.get("created") or "")
    found, cells_left = [], MOST_CELLS
    try:
        for sheet in book.worksheets[:MOST_SHEETS]:
            sheet.reset_dimensions()  # what a file says of its size may be wrong by a million rows
            rows, note, used = _rows(sheet.iter_rows(values_only=True), cells_left)
            cells_left -= used
            table = ["\n".join(row[0] for row in rows)] if rows and len(rows[0]) == 1 else pipe_table(rows)
            if table:
                title = core.get("title") or sheet.title
                found.append(
                    Document(
                        table[0], part=f"sheet {sheet.title}", title=title, date=date, language=language_code(core.get("language", "")), note=note
                    )
                )
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, zipfile.BadZipFile, OSError, SyntaxError, EOFError) as error:
        if not found:
            raise Unreadable("damaged: a sheet of the workbook cannot be read") from error
    finally:
        book.close()
    if not found:
        raise Unreadable("empty: no sheet has a value")
    return found


def _rows(rows: Iterable[tuple[Any, ...]], cells_left: int) -> tuple[list[list[str]], str, int]:
    """The rows with a value, without empty columns; what was cut off; how many cells were looked at."""
    kept: list[list[str]] = []
    used, note = 0, ""
    for row in rows:
        used += len(row)
        if len(kept) >= MOST_ROWS or used > cells_left:
            note = f"truncated after {len(kept):,} rows"
            break
        texts = [shown(value) for value in row]
        while texts and not texts[-1]:
            texts.pop()
        if texts:
            kept.append(texts)
    kept = without_empty_columns(kept)
    if kept and len(kept[0]) > MOST_COLUMNS:
        note = f"truncated after {MOST_COLUMNS} columns"
    return kept, note, used


def without_empty_columns(rows: list[list[str]]) -> list[list[str]]:
    """Rows of one width without the columns that are empty in all of them."""
    width = max(map(len, rows), default=0)
    full = [column for column in range(width) if any(len(row) > column and row[column] for row in rows)]
    return [[row[column] if len(row) > column else "" for column in full] for row in rows]


def shown(value: Any) -> str:
    """A cell's value as a reader of the sheet sees it, in one line of a table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"
    if isinstance(value, datetime.datetime):
        return value.isoformat(sep=" ").removesuffix(" 00:00:00")
    return " ".join(str(value).split()).replace("|", "\\|")
