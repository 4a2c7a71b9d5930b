"""Folders of the workspace for choosing from: names and sizes, hidden ones left out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cllm.app.readers.inventory import is_utf8
from cllm.files import reason
from cllm.runtime.errors import DataError

MOST_ENTRIES = 5_000


def browse(folder: Path, root: Path) -> dict[str, Any]:
    """Folders and files of `folder`, each by name. A link is shown where it leads to something within the workspace.

    Raises DataError for what is no folder.
    """
    path = _relative(folder, root)
    folders: list[dict[str, Any]] = []
    files: list[dict[str, Any]] = []
    left_out = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not is_utf8(entry.name) or (entry.is_symlink() and not _is_inside(entry.path, root)):
                    continue
                if len(folders) + len(files) >= MOST_ENTRIES:
                    left_out += 1
                    continue
                described: dict[str, Any] = {"name": entry.name, "path": f"{path}/{entry.name}" if path else entry.name}
                if entry.is_dir():
                    folders.append(described)
                elif entry.is_file():
                    files.append(described | {"bytes": entry.stat().st_size})
    except OSError as error:
        raise DataError(f"{path or 'the workspace'} cannot be looked into ({reason(error)}). Choose a folder.") from error
    parent = _relative(folder.parent, root) if path else None
    return {"path": path, "parent": parent, "folders": _sorted(folders), "files": _sorted(files), "left_out": left_out}


def _sorted(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda each: (each["name"].casefold(), each["name"]))


def _relative(place: Path, root: Path) -> str:
    path = place.relative_to(root).as_posix()
    return "" if path == "." else path


def _is_inside(path: str, root: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(root)
