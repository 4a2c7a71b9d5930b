"""Deleting that can be undone: what is deleted moves into a folder of the app's own, and back.

    .cllm/trash/ID/entry.json    what it was and where
                   content       the file or folder itself

Both lie on one file system as a rule, so that moving is one step whatever the size.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from cllm.app.readers.inside import tree_bytes
from cllm.files import reason
from cllm.runtime.errors import OutputError
from cllm.runtime.files import remove_folder
from cllm.serve.errors import Refused

_ID = re.compile("[0-9a-f]{16}")


class Trash:
    """The trash in `folder`, of the workspace `root`."""

    def __init__(self, folder: Path, root: Path) -> None:
        self._folder, self._root = folder, root

    def put(self, place: Path, kind: str) -> str:
        """Moves a file or folder into the trash; the id to bring it back by. Raises OutputError where it cannot be moved."""
        identity = secrets.token_hex(8)
        here = self._folder / identity
        path = place.relative_to(self._root).as_posix()
        size = tree_bytes(place) if place.is_dir() else place.stat().st_size
        try:
            here.mkdir(mode=0o700)
            entry = {"path": path, "kind": kind, "bytes": size, "deleted": time.time()}
            (here / "entry.json").write_text(json.dumps(entry), "utf-8")
            os.rename(place, here / "content")
        except OSError as error:
            shutil.rmtree(here, ignore_errors=True)
            raise OutputError(f"{path} could not be moved into the trash ({reason(error)}). Nothing was changed.") from error
        return identity

    def list(self) -> list[dict[str, Any]]:
        """What can be brought back, the newest first."""
        entries = [entry for each in self._folder.iterdir() if _ID.fullmatch(each.name) and (entry := self._entry(each.name)) is not None]
        return sorted(entries, key=lambda entry: -entry["deleted"])

    def entry(self, identity: str) -> dict[str, Any]:
        """Raises Refused (404) where nothing has this id."""
        found = self._entry(identity) if _ID.fullmatch(identity) else None
        if found is None:
            raise Refused(404, "this is not in the trash any more.", param="trash", code="not_found")
        return found

    def restore(self, identity: str, place: Path) -> None:
        """Moves something back to `place`. Raises Refused (409) where something else is there, OutputError where it cannot be moved."""
        path = place.relative_to(self._root).as_posix()
        if os.path.lexists(place):
            raise Refused(409, f"there is something at {path} again. Rename or delete that first.", param="trash", code="exists")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self._folder / identity / "content", place)
        except OSError as error:
            raise OutputError(f"{path} could not be brought back ({reason(error)}). It is still in the trash.") from error
        remove_folder(self._folder / identity)

    def forget(self, identity: str) -> int:
        """Deletes something for good; how many bytes are free by it. Raises Refused (404), OutputError."""
        size = self.entry(identity)["bytes"]
        try:
            remove_folder(self._folder / identity)
        except OSError as error:
            raise OutputError(f"it could not be deleted ({reason(error)}).") from error
        return size

    def _entry(self, identity: str) -> dict[str, Any] | None:
        here = self._folder / identity
        try:
            values = json.loads((here / "entry.json").read_text("utf-8"))
            found = {"id": identity, **{name: values[name] for name in ("path", "kind", "bytes", "deleted")}}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if os.path.lexists(here / "content") else None
