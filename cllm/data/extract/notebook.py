"""Jupyter notebooks: prose as it is, which is Markdown, and code between fences. What the code printed is left out: it can be made again."""

import json
from typing import Any

from cllm.data.extract.decoding import plain, text_of
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.licences import licence_of
from cllm.data.extract.markup import fenced, title_of
from cllm.data.extract.options import Options


def read(data: bytes, name: str, options: Options) -> list[Document]:
    text, _ = text_of(data, options)
    try:
        notebook = json.loads(text)
    except ValueError:
        raise Unreadable("truncated" if not text.rstrip().endswith("}") else "damaged (no valid JSON)") from None
    if not isinstance(notebook, dict):
        raise Unreadable("damaged (no notebook)")
    language = _language(notebook)
    blocks: list[str] = []
    code_chars = 0
    for cell in _cells(notebook):
        source = plain(_source(cell)).strip("\n")
        if not source.strip():
            continue
        kind = cell.get("cell_type")
        if kind == "code":
            code_chars += len(source)
            blocks.append(fenced(source, _cell_language(cell, language)))
        elif kind == "heading":
            level = cell.get("level")
            blocks.append(f"{'#' * (level if isinstance(level, int) and 0 < level < 7 else 1)} {source}")
        else:
            blocks.append(source)
    if not blocks:
        raise Unreadable("empty (a notebook without cells that hold anything)")
    whole = "\n\n".join(blocks) + "\n"
    return [Document(whole, title=title_of(whole), code=language if 2 * code_chars > len(whole) else "", licence=licence_of(whole))]


def _cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Of format 4, or of format 3, which has worksheets."""
    sheets = notebook.get("worksheets")
    places = [notebook, *sheets] if isinstance(sheets, list) else [notebook]
    lists = [place["cells"] for place in places if isinstance(place, dict) and isinstance(place.get("cells"), list)]
    return [cell for cells in lists for cell in cells if isinstance(cell, dict)]


def _source(cell: dict[str, Any]) -> str:
    source = cell.get("source", cell.get("input", ""))
    if isinstance(source, list):
        return "".join(each for each in source if isinstance(each, str))
    return source if isinstance(source, str) else ""


def _language(notebook: dict[str, Any]) -> str:
    metadata = notebook.get("metadata")
    places = [metadata.get(key) for key in ("language_info", "kernelspec")] if isinstance(metadata, dict) else []
    names = [place.get(key) for place in places if isinstance(place, dict) for key in ("name", "language")]
    name = next((each for each in names if isinstance(each, str) and each), "python")
    return "python" if name.lower().startswith(("python", "ipython")) else name.lower()


def _cell_language(cell: dict[str, Any], language: str) -> str:
    """Of a cell that begins with a magic such as %%bash, what that names."""
    first = _source(cell).lstrip().split("\n", 1)[0]
    magic = first[2:].split()[0] if first.startswith("%%") and first[2:].split() else ""
    return magic if magic in ("bash", "sh", "html", "javascript", "js", "latex", "markdown", "perl", "ruby", "sql", "r") else language
