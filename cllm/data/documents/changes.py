"""Whether the text at a place is still what it was when it was packed, by the record that `load_corpus` left (sources.json)."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cllm.data.documents.files import SourceFile, find
from cllm.data.documents.scan import scan


def same_text(path: str | os.PathLike[str], memory: Path, exclude: Iterable[str | os.PathLike[str]] = ()) -> bool | None:
    """Whether the files at `path` hold the text that sources.json in `memory` remembers; None where nothing is remembered.

    `path` may be another place than the text was read from. A file is read only where its size is the remembered one and its times are not.
    Raises DataError when there is nothing at `path`.
    """
    known = _remembered(memory)
    if not known:
        return None
    files, _ = find(path, exclude)
    used = {name for name, entry in known.items() if "digest" in entry}
    if Path(path).is_file() and len(used) == 1:  # a single file may have another name by now
        return not _differs(files[0], known[used.pop()])
    if used - {file.name for file in files}:
        return False
    return not any(_differs(file, known.get(file.name)) for file in files)


def digests_of(memory: Path) -> set[str]:
    """The digests of the contents of all files whose text sources.json in `memory` remembers; nothing where it is missing or damaged."""
    return {str(entry["digest"]) for entry in _remembered(memory).values() if "digest" in entry}


def _differs(file: SourceFile, entry: dict[str, Any] | None) -> bool:
    """Whether a file holds other text than its entry says; without an entry, or with one that says why it was left out, any text at all."""
    if entry is not None and entry["stamp"] == [str(file.path.resolve()), file.size, *file.stamp]:
        return False
    if entry is None or "digest" not in entry:
        return not isinstance(scan(file), str)
    return entry["stamp"][1] != file.size or _digest(file.path) != entry["digest"]


def _digest(path: Path) -> str:
    """The digest that `scan` takes of a file's bytes; nothing where the file cannot be read."""
    try:
        with open(path, "rb") as raw:
            return hashlib.file_digest(raw, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return ""


def _remembered(memory: Path) -> dict[str, dict[str, Any]]:
    """The entries of sources.json by name, of whichever version; nothing where it is missing or damaged."""
    try:
        files = json.loads((memory / "sources.json").read_text("utf-8"))["files"]
        return {str(name): entry for name, entry in files.items() if isinstance(entry, dict) and len(entry["stamp"]) == 5}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
