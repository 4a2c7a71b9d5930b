"""What lies in the workspace: runs, models, prepared data and crawls, found by the names of their files. Nothing is opened.

A folder that is one of these is not looked into any further, hidden ones are passed over, and no link is followed. What a folder held is remembered
for as long as its time of change stays, so that a second look costs one call of the system for each folder.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

MOST_FOLDERS = 5_000  # that are looked into: a workspace may be somebody's home
MOST_ENTRIES = 10_000  # of one folder; one of more holds text or pictures
DEEPEST = 6
_SETTLED = 2.0  # seconds after which a folder that changes again has another time of change, on every file system in use

RUN, FOLLOWED, MODEL_FILE, HUGGING_FACE, GGUF, PREPARED, CRAWL = "run", "rounds", "file", "hf", "gguf", "prepared", "crawl"
_FILES = {".cllm": MODEL_FILE, ".gguf": GGUF}


@dataclass(frozen=True)
class Found:
    """Something of a kind that is known. path: below the workspace, with /."""

    path: str
    kind: str
    place: Path

    @property
    def name(self) -> str:
        return self.place.name


@dataclass(frozen=True)
class _Listing:
    changed: int
    """Time of change of the folder in nanoseconds."""
    files: frozenset[str]
    folders: tuple[str, ...]


class Inventory:
    """Looks through the folder `root`. For any thread. is_whole: whether the last look came to its end before its limits."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.is_whole = True
        self._known: dict[str, _Listing] = {}
        self._lock = threading.Lock()

    def look(self, *kinds: str) -> list[Found]:
        """Everything of these kinds, by path. Folders near the root are looked at first."""
        with self._lock:
            found: list[Found] = []
            seen: dict[str, _Listing] = {}
            level = [""]
            self.is_whole = True
            for _ in range(DEEPEST):
                below: list[str] = []
                for folder in level:
                    if len(seen) >= MOST_FOLDERS:
                        self.is_whole = False
                        break
                    listing = self._listing(folder)
                    if listing is None:
                        continue
                    seen[folder] = listing
                    kind = _kind_of(listing) if folder else None
                    if kind is not None:
                        found.append(Found(folder, kind, self.root / folder))
                    if kind is None:
                        found += [self._file(folder, name) for name in listing.files if os.path.splitext(name)[1] in _FILES]
                        below += [f"{folder}/{name}" if folder else name for name in listing.folders]
                    elif kind == FOLLOWED:
                        below += [f"{folder}/{name}" for name in listing.folders if name == "rounds"]
                level = below
            self.is_whole = self.is_whole and not level
            self._known = seen
        return sorted((each for each in found if each.kind in kinds), key=lambda each: each.path)

    def _file(self, folder: str, name: str) -> Found:
        path = f"{folder}/{name}" if folder else name
        return Found(path, _FILES[os.path.splitext(name)[1]], self.root / path)

    def _listing(self, folder: str) -> _Listing | None:
        """What a folder holds; None where it cannot be read, or is gone meanwhile."""
        place = self.root / folder
        try:
            changed = os.stat(place, follow_symlinks=False).st_mtime_ns
            known = self._known.get(folder)
            if known is not None and known.changed == changed:
                return known
            files, folders = set(), []
            with os.scandir(place) as entries:
                for number, entry in enumerate(entries):
                    if number >= MOST_ENTRIES:
                        self.is_whole = False
                        break
                    if entry.name.startswith(".") or not is_utf8(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.name)
                    elif entry.is_file(follow_symlinks=False):
                        files.add(entry.name)
        except OSError:
            return None
        is_settled = time.time_ns() - changed > _SETTLED * 1e9
        return _Listing(changed if is_settled else -1, frozenset(files), tuple(sorted(folders)))


def _kind_of(listing: _Listing) -> str | None:
    files = listing.files
    if "rounds.jsonl" in files or "follow.json" in files:
        return FOLLOWED
    if "config.toml" in files or "metrics.jsonl" in files or "checkpoints" in listing.folders:
        return RUN
    if "prepared.json" in files:
        return PREPARED
    if "crawl.json" in files and "crawl.sqlite" in files:
        return CRAWL
    if "config.json" in files and any(name.endswith((".safetensors", ".safetensors.index.json")) for name in files):
        return HUGGING_FACE
    return None


def is_utf8(name: str) -> bool:
    """Whether a name can stand in a reply and come back in a request."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return all(ord(each) >= 32 and ord(each) != 127 for each in name)
