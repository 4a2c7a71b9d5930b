"""Data sets: folders that `cllm prepare` has made, with what was read, kept and dropped, and documents to judge the choices by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllm.app.readers.inside import problem, read_object
from cllm.app.readers.inventory import PREPARED, Found, Inventory
from cllm.data.documents.files import PREPARED_MARK
from cllm.data.preparation.look import PERSONAL, changes, figures
from cllm.data.preparation.manifest import MANIFEST, Prepared, open_prepared
from cllm.data.preparation.rows import Row, read_groups, texts_at
from cllm.data.preparation.tally import reason_class
from cllm.runtime.errors import CLLMError, DataError

SHOWN = 20  # documents of one reply
EXCERPT = 20_000  # characters of a text
_COLUMNS = ("id", "url", "path", "title", "language", "source", "kind", "dropped_because")


class Datasets:
    """The data sets below `root`, which is resolved. For one thread at a time."""

    def __init__(self, root: Path, inventory: Inventory) -> None:
        self._root, self._inventory = root, inventory
        self._known: dict[str, tuple[Any, dict[str, Any]]] = {}

    def list(self) -> list[dict[str, Any]]:
        """All data sets by path."""
        entries = [self._entry(each) for each in self._inventory.look(PREPARED)]
        paths = {entry["path"] for entry in entries}
        self._known = {path: known for path, known in self._known.items() if path in paths}
        return entries

    def _entry(self, found: Found) -> dict[str, Any]:
        blank: dict[str, Any] = {
            "path": found.path,
            "name": found.name,
            **dict.fromkeys(("documents", "kept", "dropped", "bytes", "updated", "damaged")),
            "languages": {},
        }
        try:
            stat = (found.place / PREPARED_MARK).stat()
            mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            known = self._known.get(found.path)
            if known is None or known[0] != mark:
                known = self._known[found.path] = (mark, blank | _short(opened(found.place, self._root)) | {"updated": stat.st_mtime})
            return known[1]
        except (CLLMError, OSError) as error:
            return blank | {"damaged": str(error).replace(f"{self._root}/", "")}


def opened(folder: Path, root: Path) -> Prepared:
    """A data set whose description is as `cllm prepare` writes it. Raises DataError where it is not."""
    for name in (PREPARED_MARK, MANIFEST):
        words = problem(folder / name, root)
        if words is not None:
            raise DataError(f"{name} {words}.")
    read_object(folder / PREPARED_MARK, root)
    prepared = open_prepared(folder)
    if any("/" in each.name.partition("/")[2] or ".." in each.name or each.name.startswith("/") for each in prepared.shards):
        raise DataError(f"{MANIFEST} is damaged: it names files outside of the folder.")
    try:
        figures(prepared)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{PREPARED_MARK} is damaged. Run the same cllm prepare again.") from error
    return prepared


def _short(prepared: Prepared) -> dict[str, Any]:
    found = figures(prepared)
    return {
        "documents": found["documents"],
        "kept": found["kept"],
        "dropped": found["documents"] - found["kept"],
        "bytes": sum(each.bytes for each in prepared.shards if each.is_kept),
        "languages": found["languages"],
    }


def detail(path: str, folder: Path, root: Path) -> dict[str, Any]:
    """All figures of a data set. Raises DataError."""
    prepared = opened(folder, root)
    found, summary = figures(prepared), prepared.summary
    by_rule = changes(folder)
    dropped = found["dropped_because"]
    return {
        "path": path,
        "name": folder.name,
        **_short(prepared),
        "files": summary.get("files"),
        "kept_chars": found["characters"],
        "shards": found["shards"],
        "digest": found["digest"],
        "reasons": [{"reason": reason, "count": count} for reason, count in dropped.items()],
        "languages": [{"language": name, "count": count} for name, count in found["languages"].items()],
        "sources": [{"name": name, "path": _source(summary, name, root), **counts} for name, counts in found["sources"].items()],
        "unreadable": [{"source": each[0], "path": each[1], "reason": each[2]} for each in summary["tally"].get("unreadable", []) if len(each) == 3],
        "not_looked_at": summary.get("not_looked_at"),
        "duplicates": {kind: dropped.get(f"{kind} duplicate", 0) for kind in ("exact", "near")},
        "personal_data": {name: by_rule[name] for name in PERSONAL if name in by_rule},
        "changes": {name: count for name, count in by_rule.items() if name not in PERSONAL},
        "updated": (folder / PREPARED_MARK).stat().st_mtime,
    }


def samples(folder: Path, root: Path, *, kept: bool, reason: str = "", offset: int = 0) -> list[dict[str, Any]]:
    """The documents number `offset` and on, of those that are kept or were dropped for a reason (all reasons: ""), in the order of the data set."""
    prepared = opened(folder, root)
    found: list[dict[str, Any]] = []
    skipped = 0
    for place in prepared.paths(kept=kept):
        words = problem(place, root)
        if words is not None:
            raise DataError(f"{place.name} {words}.")
        chosen: dict[int, Row] = {}
        for number, row in _described(place):
            if reason and reason_class(row["dropped_because"]) != reason:
                continue
            if skipped < offset:
                skipped += 1
                continue
            chosen[number] = row
            if len(found) + len(chosen) == SHOWN:
                break
        found += _with_texts(place, chosen)
        if len(found) == SHOWN:
            break
    return found


def _described(place: Path) -> Iterator[tuple[int, Row]]:
    """(number, row without its text) of a shard: texts are most of it, and are read of those alone that are shown."""
    number = 0
    for group in read_groups(place, _COLUMNS):
        for row in group.to_pylist():
            yield number, {name: value or "" for name, value in row.items()}
            number += 1


def _with_texts(place: Path, chosen: dict[int, Row]) -> list[dict[str, Any]]:
    import numpy as np

    found = []
    for number, text in texts_at(place, np.array(sorted(chosen), dtype=np.int64)) if chosen else ():
        row = chosen[number]
        found.append(
            {
                "id": row["id"],
                "name": row["url"] or row["path"],
                "title": row["title"],
                "source": row["source"],
                "language": row["language"],
                "kind": row["kind"],
                "reason": row["dropped_because"],
                "characters": len(text or ""),
                "text": (text or "")[:EXCERPT],
            }
        )
    return found


def _source(summary: dict[str, Any], name: str, root: Path) -> str | None:
    sources = summary.get("sources")
    place = sources.get(name) if isinstance(sources, dict) else None
    return place.removeprefix(f"{root}/") if isinstance(place, str) else None
