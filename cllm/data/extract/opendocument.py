"""OpenDocument files: text (odt), spreadsheets (ods) and slides (odp), as Markdown."""

from collections.abc import Iterator
from typing import Any

from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.markdown import pipe_table
from cllm.data.extract.options import Options
from cllm.data.extract.package import Package, iso_date, language_code, local, properties
from cllm.data.extract.sheets import MOST_CELLS, MOST_COLUMNS, MOST_ROWS, MOST_SHEETS, without_empty_columns

_SILENT = frozenset(
    ("tracked-changes", "annotation", "annotation-end", "forms", "sequence-decls", "variable-decls", "bookmark", "note", "desc", "title")
)
_GROUPS = frozenset(
    ("section", "index-body", "table-of-content", "frame", "text-box", "g", "custom-shape", "rect", "shape-group", "page-thumbnail", "list-header")
)
_MOST_SPACES = 1_000


def read(data: bytes, name: str, options: Options) -> list[Document]:
    """One document; of a spreadsheet one for each sheet. Raises Unreadable."""
    package = Package(data)
    manifest = package.optional_xml("META-INF/manifest.xml")
    if manifest is not None and next(manifest.iter("{*}encryption-data"), None) is not None:
        raise Unreadable("encrypted: the document has a password; save a copy without one")
    body = next(package.xml("content.xml").iter("{*}body"), None)
    kind = (
        next((element for element in body if local(element) in ("text", "spreadsheet", "presentation", "drawing")), None)
        if body is not None
        else None
    )
    if kind is None:
        raise Unreadable("damaged: its part content.xml has no body")
    told = properties(package.optional_xml("meta.xml"))
    common = {
        "date": iso_date(told.get("date") or told.get("creation-date") or ""),
        "language": language_code(told.get("language", "")),
    }
    if local(kind) == "spreadsheet":
        found = _sheets(kind, told.get("title", ""), common)
    else:
        slides = local(kind) != "text"
        text = "\n\n".join(_slides(kind) if slides else _blocks(kind, 0))
        found = [Document(text, title=told.get("title") or _first_heading(text), **common)] if text else []
    if not found:
        raise Unreadable("empty: the document has no text; text in its pictures needs cllm[ocr]")
    return found


def _blocks(parent: Any, depth: int) -> Iterator[str]:
    for child in parent:
        tag = local(child)
        if tag == "h":
            if text := " ".join(_text(child).split()):
                yield f"{'#' * min(_whole(_attribute(child, 'outline-level'), 1), 6)} {text}"
            yield from _notes(child)
        elif tag == "p":
            if text := _text(child).strip():
                yield text
            for frame in child.iter("{*}text-box"):
                yield from _blocks(frame, depth + 1)
            yield from _notes(child)
        elif tag in ("list", "ordered-list", "unordered-list"):
            if items := list(_items(child, 0)):
                yield "\n".join(items)
        elif tag == "table":
            yield from pipe_table(_rows(child, MOST_CELLS)[0])
        elif tag in _GROUPS and depth < 100:
            yield from _blocks(child, depth + 1)


def _items(parent: Any, depth: int) -> Iterator[str]:
    for item in parent:
        if local(item) not in ("list-item", "list-header"):
            continue
        first = True
        for child in item:
            if local(child) in ("list", "ordered-list", "unordered-list"):
                if depth < 20:
                    yield from _items(child, depth + 1)
            elif local(child) in ("p", "h") and (text := _text(child).strip()):
                yield "  " * depth + ("- " if first else "  ") + text.replace("\n", "\n" + "  " * (depth + 1))
                first = False


def _text(element: Any) -> str:
    pieces = [element.text or ""]
    for child in element:
        tag = local(child)
        if tag == "s":
            pieces.append(" " * min(_whole(_attribute(child, "c"), 1), _MOST_SPACES))
        elif tag == "tab":
            pieces.append("\t")
        elif tag == "line-break":
            pieces.append("\n")
        elif tag not in _SILENT and tag not in _GROUPS and tag:
            pieces.append(_text(child))
        pieces.append(child.tail or "")
    return "".join(pieces)


def _notes(element: Any) -> Iterator[str]:
    """Footnotes, after the paragraph that they belong to."""
    for note in element.iter("{*}note-body"):
        yield from (text for paragraph in note.iter("{*}p") if (text := _text(paragraph).strip()))


def _slides(drawing: Any) -> Iterator[str]:
    for number, page in enumerate(drawing.iter("{*}page"), 1):
        title, blocks = "", []
        for frame in page:
            if local(frame) == "notes":
                said = [block for inner in frame for block in _blocks(inner, 0)]
                blocks += ["Notes:", *said] if said else []
                continue
            text = [block for box in frame for block in _blocks(box, 0)] if local(frame) == "frame" else list(_blocks(frame, 0))
            if _attribute(frame, "class") == "title" and not title:
                title = " ".join(" ".join(text).split())
            else:
                blocks += text
        if title or blocks:
            yield f"## {title or f'Slide {number}'}"
            yield from blocks


def _sheets(book: Any, title: str, common: dict[str, str]) -> list[Document]:
    found = []
    cells_left = MOST_CELLS
    for sheet in list(book.iter("{*}table"))[:MOST_SHEETS]:
        name = _attribute(sheet, "name")
        rows, used, note = _rows(sheet, cells_left)
        cells_left -= used
        if table := pipe_table(without_empty_columns(rows)):
            found.append(Document(table[0], part=f"sheet {name}", title=title or name, note=note, **common))
    return found


def _rows(table: Any, cells_left: int) -> tuple[list[list[str]], int, str]:
    """The rows of a table, of which a repeated one is written once for each time if it has a value; how many cells that were; what was cut off."""
    rows: list[list[str]] = []
    used = 0
    for row in table.iter("{*}table-row"):
        if next(row.iterancestors("{*}table"), None) is not table:
            continue
        cells: list[str] = []
        for cell in row:
            if local(cell) not in ("table-cell", "covered-table-cell"):
                continue
            text = " ".join(" ".join(_text(paragraph) for paragraph in cell.iter("{*}p")).split()).replace("|", "\\|")
            cells += [text] * min(_whole(_attribute(cell, "number-columns-repeated"), 1), max(0, MOST_COLUMNS - len(cells)))
        while cells and not cells[-1]:
            cells.pop()
        if cells:
            times = min(_whole(_attribute(row, "number-rows-repeated"), 1), MOST_ROWS - len(rows), max(0, (cells_left - used) // len(cells)))
            rows += [cells] * times
            used += times * len(cells)
            if len(rows) >= MOST_ROWS or used + len(cells) > cells_left:
                return rows, used, f"truncated after {len(rows):,} rows"
    return rows, used, ""


def _first_heading(text: str) -> str:
    first = text.partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def _attribute(element: Any, name: str) -> str:
    return next((value for key, value in element.attrib.items() if key.rpartition("}")[2] == name), "")


def _whole(text: str, otherwise: int) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 and int(text) > 0 else otherwise
