"""What a prepared folder holds: a manifest that only grows, and a mark by which the rest of cllm knows the folder.

    OUT/manifest.jsonl     one line a shard: name, rows, bytes, digest of the file and of what it says; one line for each finished run
    OUT/prepared.json      the mark, with what the newest run came to; the page and `cllm data` are made from it

A later line about a shard replaces an earlier one. Lines after the last line of a run are of one that was killed while it wrote them, and count for
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cllm.data.documents.files import PREPARED_FORMAT, PREPARED_MARK
from cllm.data.preparation.rows import digest_of
from cllm.data.preparation.shards import KEPT
from cllm.files import DATA, Appender, reported, write_file
from cllm.runtime.errors import DataError

MANIFEST = "manifest.jsonl"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """A sealed file of the result."""

    name: str
    rows: int
    bytes: int
    blake2b: str
    content: str
    """Digest of what its rows say, which no version of a library changes."""

    @property
    def is_kept(self) -> bool:
        return self.name.startswith(f"{KEPT}/")


@dataclass(frozen=True)
class Prepared:
    """A finished folder."""

    folder: Path
    shards: list[Shard]
    """In the order of their documents, the kept ones first."""
    summary: dict[str, Any]
    """What the newest run came to (see `cllm.data.preparation.plan`)."""

    @property
    def digest(self) -> str:
        """Of all that the folder says."""
        return digest_of([[shard.name, shard.content] for shard in self.shards])

    def paths(self, kept: bool | None = None) -> Iterator[Path]:
        """The files, or only those of the kept or the dropped documents."""
        return (self.folder / shard.name for shard in self.shards if kept is None or shard.is_kept == kept)


def open_prepared(folder: Path) -> Prepared:
    """Raises DataError where `cllm prepare` has not finished this folder."""
    try:
        summary = json.loads((folder / PREPARED_MARK).read_text("utf-8"))
        if summary["format"] != PREPARED_FORMAT:
            raise ValueError
        shards, _ = _read(folder / MANIFEST)
        if summary["shards"] != sum(shard.is_kept for shard in shards):
            raise ValueError
    except FileNotFoundError as error:
        unfinished = " yet. Run the same cllm prepare again" if (folder / ".ledger").is_dir() else ""
        raise DataError(
            f"{folder} holds no prepared data{unfinished or f': it has no {Path(str(error.filename)).name}. Run cllm prepare first'}."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is damaged: {PREPARED_MARK} or {MANIFEST} cannot be read. Run the same cllm prepare again.") from error
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    return Prepared(folder, shards, summary)


def _read(place: Path) -> tuple[list[Shard], int]:
    """The shards that count, and how many bytes of the file do."""
    shards: dict[str, Shard] = {}
    pending: dict[str, Shard | None] = {}
    counted = length = 0
    for line in place.read_bytes().splitlines(keepends=True):
        length += len(line)
        try:
            entry = json.loads(line) if line.endswith(b"\n") else {}
        except ValueError:
            entry = {}
        if "gone" in entry:
            pending[entry["gone"]] = None
        elif "name" in entry:
            pending[entry["name"]] = Shard(**entry)
        elif "run" in entry:
            for name, shard in pending.items():
                shards.pop(name, None)
                if shard is not None:
                    shards[name] = shard
            pending, counted = {}, length
        else:
            break  # torn: what follows was written by nobody
    return sorted(shards.values(), key=lambda shard: (not shard.is_kept, shard.name)), counted


def finish(folder: Path, shards: list[Shard], summary: dict[str, Any]) -> Prepared:
    """Adds to the manifest what has changed, and writes the mark."""
    place = folder / MANIFEST
    known: list[Shard] = []
    if place.exists():
        known, length = _read(place)
        with reported(place, DATA), open(place, "r+b") as file:
            file.truncate(length)
    prepared = Prepared(folder, shards, {"format": PREPARED_FORMAT, "version": VERSION, **summary})
    if known != shards or not place.exists():
        gone = [{"gone": shard.name} for shard in known if shard.name not in {each.name for each in shards}]
        new = [asdict(shard) for shard in shards if shard not in known]
        run = {"run": summary["recipe"], "documents": summary["documents"], "kept": summary["kept"], "content": prepared.digest}
        with Appender(place, DATA) as manifest:
            manifest.write("".join(json.dumps(entry) + "\n" for entry in [*gone, *new, run]))
    write_file(folder / PREPARED_MARK, (json.dumps(prepared.summary, indent=1) + "\n").encode("utf-8"), DATA)
    return prepared
