"""Conversations with models that are kept: a file of JSON each, whole with their branches.

    .cllm/conversations/ID.json

The page makes and reads the documents; here is only known what the list and the search need of them. Files may be damaged or come from elsewhere, so
what is no conversation is left out of the list and stops nothing.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from cllm.files import Wording, write_file
from cllm.runtime.errors import OutputError
from cllm.serve.errors import Refused

MOST_BYTES = 16 << 20  # of one conversation: some ten thousand tokens with their alternatives
_ID = re.compile("[0-9a-f]{16}")
_WORDING = Wording(OutputError, "another folder to start the app in", "What was kept before is unchanged.")


class Entry(NamedTuple):
    """What the list shows of a conversation, and the text that is searched, in lower case."""

    id: str
    title: str
    updated: float
    mode: str
    model: str | None
    messages: int
    searched: str

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in self._asdict().items() if name != "searched"}


class Conversations:
    """The conversations in `folder`. Any thread may ask."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, tuple[tuple[int, int, int], Entry | None]] = {}

    def list(self, query: str = "") -> list[dict[str, Any]]:
        """All that have every word of `query` in their title or messages, the newest first. A file is read again only when it has changed."""
        words = query.lower().split()
        with self._lock:
            found = {path.stem: path for path in self._folder.glob("*.json") if _ID.fullmatch(path.stem)}
            self._known = {identity: self._known[identity] for identity in found if identity in self._known}
            entries = [entry for identity, path in found.items() if (entry := self._entry(identity, path)) is not None]
        entries.sort(key=lambda entry: -entry.updated)
        return [entry.to_dict() for entry in entries if all(word in entry.searched for word in words)]

    def read(self, identity: str) -> dict[str, Any]:
        """A conversation as it was written. Raises Refused (404)."""
        value = _value(self._place(identity))
        if value is None:
            raise Refused(404, "this conversation is not kept here any more, or its file is damaged.", param="id", code="not_found")
        return value

    def create(self, value: dict[str, Any]) -> str:
        """Keeps a new conversation; its id. Raises Refused, OutputError."""
        identity = secrets.token_hex(8)
        self._write(self._folder / f"{identity}.json", value)
        return identity

    def replace(self, identity: str, value: dict[str, Any]) -> None:
        """Writes a conversation anew. Raises Refused (404) where it was deleted, OutputError."""
        place = self._place(identity)
        if not place.is_file():
            raise Refused(404, "this conversation was deleted. Export it from the page if it is still wanted.", param="id", code="not_found")
        self._write(place, value)

    def delete(self, identity: str) -> None:
        """Raises Refused (404)."""
        try:
            self._place(identity).unlink()
        except FileNotFoundError:
            raise Refused(404, "this conversation is deleted already.", param="id", code="not_found") from None
        except OSError as error:
            raise OutputError(f"the conversation could not be deleted: {error.strerror or error}.") from error

    def _place(self, identity: str) -> Path:
        if not _ID.fullmatch(identity):
            raise Refused(404, "there is no conversation of this name.", param="id", code="not_found")
        return self._folder / f"{identity}.json"

    def _write(self, place: Path, value: dict[str, Any]) -> None:
        if not isinstance(value.get("threads"), list):
            raise Refused(400, "a conversation must have the list threads, with what was said.", param="threads", code="invalid_value")
        content = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
        if len(content) > MOST_BYTES:
            raise Refused(413, f"the conversation is longer than {MOST_BYTES >> 20} MB. Begin a new one.", code="request_too_large")
        write_file(place, content, _WORDING)

    def _entry(self, identity: str, path: Path) -> Entry | None:
        try:
            found = path.lstat()
        except OSError:
            return None
        mark = (found.st_ino, found.st_size, found.st_mtime_ns)
        known = self._known.get(identity)
        if known is None or known[0] != mark:
            value = _value(path)
            known = self._known[identity] = (mark, None if value is None else _described(identity, found.st_mtime, value))
        return known[1]


def _value(path: Path) -> dict[str, Any] | None:
    """The object in a regular file that is not too large; None for anything else."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            content = file.read(MOST_BYTES + 1)
        value = json.loads(content) if len(content) <= MOST_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("threads"), list) else None


def _described(identity: str, updated: float, value: dict[str, Any]) -> Entry:
    threads = [each for each in value["threads"] if isinstance(each, dict)]
    nodes = [node for each in threads if isinstance(each.get("nodes"), dict) for node in each["nodes"].values() if isinstance(node, dict)]
    texts = [node["text"] for node in nodes if isinstance(node.get("text"), str)]
    title = value["title"] if isinstance(value.get("title"), str) else ""
    model = threads[0].get("model") if threads else None
    return Entry(
        id=identity,
        title=title[:200],
        updated=min(updated, time.time()),
        mode="completion" if value.get("mode") == "completion" else "chat",
        model=model if isinstance(model, str) else None,
        messages=len(texts),
        searched="\n".join([title, *texts]).lower(),
    )
