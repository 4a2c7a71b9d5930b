"""Whether the text at a place is still what it was when it was packed, by the record that `load_corpus` left (sources.json)."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cllm.data.documents.files import CODE_EXTENSIONS, SourceFile, find
from cllm.data.documents.records import RECORD_EXTENSIONS
from cllm.data.documents.scan import Reading, scan


def same_text(
    path: str | os.PathLike[str], memory: Path, exclude: Iterable[str | os.PathLike[str]] = (), reading: Reading = Reading()
) -> bool | None:
    """Whether the files at `path`, read as `reading` says, hold the text that sources.json in `memory` remembers; None where nothing is remembered.

    `path` may be another place than the text was read from. A file is read only where its size is the remembered one and its times are not.
    Raises DataError when there is nothing at `path`.
    """
    record = _record(memory)
    known = _entries(record)
    if not known:
        return None
    if record.get("reading", asdict(reading)) != asdict(reading):  # which older versions did not remember
        return False
    files, _ = find(path, exclude)
    used = {name for name, entry in known.items() if "digest" in entry}
    if Path(path).is_file() and len(used) == 1:  # a single file may have another name by now
        (name,) = used
        return _read_alike(name) == _read_alike(files[0].name) and not _differs(files[0], known[name], reading)
    if used - {file.name for file in files}:
        return False
    return not any(_differs(file, known.get(file.name), reading) for file in files)


def texts_of(memory: Path) -> set[tuple[str, ...]]:
    """What tells the texts of files apart that sources.json in `memory` remembers: of each the digest of its content, and of records also the names
    of the fields that were taken out of them. Nothing where the record is missing or damaged."""
    return {(str(entry["digest"]), *map(str, entry.get("used", ()))) for entry in _entries(_record(memory)).values() if "digest" in entry}


def _differs(file: SourceFile, entry: dict[str, Any] | None, reading: Reading) -> bool:
    """Whether a file holds other text than its entry says; without an entry, or with one that says why it was left out, any text at all."""
    if entry is not None and entry["stamp"] == [file.real, file.size, *file.stamp]:
        return False
    if entry is None or "digest" not in entry:
        return not isinstance(scan(file, reading=reading), str)
    return entry["stamp"][1] != file.size or _digest(file.path) != entry["digest"]


def _read_alike(name: str) -> str:
    """The same for files whose names let them be read in the same way: records by their format, and code, which no marker cuts."""
    suffix = Path(name).suffix.lower()
    return suffix if suffix in RECORD_EXTENSIONS else "code" if suffix in CODE_EXTENSIONS else "text"


def _digest(path: Path) -> str:
    """The digest that `scan` takes of a file's bytes; nothing where the file cannot be read."""
    try:
        with open(path, "rb") as raw:
            return hashlib.file_digest(raw, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return ""


def _record(memory: Path) -> dict[str, Any]:
    """What sources.json holds, of whichever version; nothing where it is missing or damaged."""
    try:
        record = json.loads((memory / "sources.json").read_text("utf-8"))
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):
        return {}


def _entries(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of the files by name; nothing where one of them is damaged."""
    try:
        return {str(name): entry for name, entry in record["files"].items() if isinstance(entry, dict) and len(entry["stamp"]) == 5}
    except (KeyError, TypeError, AttributeError):
        return {}
