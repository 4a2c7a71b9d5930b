"""Files that may be read: regular ones, within the workspace wherever their links lead, and no larger than what they should hold.

A folder may have come from anybody. A link in it may lead to the user's keys, a pipe would be waited for without end, and a description of a
gigabyte is none.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from cllm.files import reason
from cllm.runtime.errors import DataError
from cllm.serve.errors import Refused

MOST_BYTES = 64 << 20  # of a description; the largest, prepared.json and manifest.json, have some megabytes


def problem(place: Path, root: Path) -> str | None:
    """Why a file may not be read, as words that follow its name; None where it may. One that is not there may be asked for."""
    try:
        found = os.lstat(place)
        if stat.S_ISLNK(found.st_mode) or place.parent != root:
            real = Path(os.path.realpath(place))
            if not real.is_relative_to(root):
                return "is a link out of the workspace, which is not followed"
            found = os.stat(place)
        return None if stat.S_ISREG(found.st_mode) else "is no regular file"
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be read ({reason(error)})"


def check_files(folder: Path, root: Path, *names: str) -> None:
    """Raises Refused (400) where one of these files of a folder may not be read."""
    for name in names:
        words = problem(folder / name, root)
        if words is not None:
            raise Refused(400, f"{folder.name}/{name} {words}. Put the file itself there.", param="path", code="invalid_path")


def read_bytes(place: Path, root: Path, most: int = MOST_BYTES) -> bytes:
    """The content of a file. Raises DataError where it may not be read, is not there or is larger than `most` bytes."""
    words = problem(place, root)
    if words is not None:
        raise DataError(f"{place.name} {words}.")
    try:
        with open(place, "rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise DataError(f"{place.name} cannot be read ({reason(error)}).") from error
    if len(content) > most:
        raise DataError(f"{place.name} has more than {most:,} bytes, which is too much for it.")
    return content


def read_object(place: Path, root: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises DataError for anything else."""
    try:
        value = json.loads(read_bytes(place, root))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place.name} is damaged ({reason(error)}).") from error
    if not isinstance(value, dict):
        raise DataError(f"{place.name} is damaged: an object was expected.")
    return value


def tree_bytes(folder: Path, most: int = 200_000) -> int:
    """The bytes of all files below a folder, without following links; of at most so many entries."""
    total, waiting, seen = 0, [folder], 0
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    seen += 1
                    if seen > most:
                        return total
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
    return total
