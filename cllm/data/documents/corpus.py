"""All documents of a folder, read and measured once: which there are, how large, and on which side of train and validation each belongs.

What a file told is remembered in sources.json and sources.bin, and a file is read again only when its size, times or inode changed.

Sides. A document goes to validation when the hash of its text, as a fraction, is below val_fraction: the same text always lands on the same
side, and no document moves when others arrive. Where that leaves one side (nearly) empty or validation far too large, because the documents
are few, they are taken in the order of their hashes until validation has its share; and where that cannot be done either (one book), each
document is cut by position: its first int((1 - val_fraction) * characters) characters are for training, the rest for validation.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cllm.data.documents.charset import Charset
from cllm.data.documents.files import ROW, FileInfo, Skipped, SourceFile, find, read, scan
from cllm.data.tokens.shards import write_atomically
from cllm.runtime.errors import DataError, UserError

SCAN_VERSION = 1
TRAIN, VAL = 0, 1
Report = Callable[[int], None]  # called with a number of bytes that were just dealt with


class Segment(NamedTuple):
    """A document, or the part of it on one side; the chunks must be taken before the next segment is."""

    side: int  # TRAIN or VAL
    name: str
    key: int
    chunks: Iterable[str]


@dataclass(frozen=True)
class Corpus:
    """The files that hold text, in order, with a row for each document of each."""

    root: Path
    files: list[tuple[SourceFile, FileInfo]]
    rows: np.ndarray  # (num_documents,) of ROW
    skipped: Skipped
    files_read: int  # how many were not known from last time

    @property
    def num_bytes(self) -> int:
        """Bytes of text, as UTF-8."""
        return int(self.rows["bytes"].sum())

    @property
    def num_chars(self) -> int:
        return int(self.rows["chars"].sum())

    def digest(self) -> str:
        """A hash of the names and contents of all files and of how they are decoded."""
        listed = [[file.name, info.kind, info.digest, *info.charset[:2]] for file, info in self.files]
        return hashlib.blake2b(json.dumps([SCAN_VERSION, listed]).encode("utf-8"), digest_size=16).hexdigest()

    def segments(self, plan: "SplitPlan", report: Report | None = None) -> Iterator[Segment]:
        """The text of all documents, in order; DataError when a file is not any more what it was when it was measured."""
        number = 0
        for file, info in self.files:
            documents = 0
            for document in read(file, info):
                if number >= len(self.rows):
                    break
                row = self.rows[number]
                cursor = _Cursor(document.chunks, report)
                if plan.sides is None:
                    cut = plan.cut(int(row["chars"]))
                    yield Segment(TRAIN, document.name, int(row["key"]), cursor.take(cut))
                    yield Segment(VAL, document.name, int(row["key"]), cursor.take(None))
                else:
                    yield Segment(int(plan.sides[number]), document.name, int(row["key"]), cursor.take(None))
                cursor.check(int(row["chars"]), file.path)
                number += 1
                documents += 1
            if documents != len(info.rows):
                raise _changed(file.path)


class _Cursor:
    """Takes characters from a stream of chunks, at most so many at a time."""

    def __init__(self, chunks: Iterable[str], report: Report | None):
        self._chunks = iter(chunks)
        self._rest = ""
        self._report = report
        self.taken = 0

    def take(self, count: int | None) -> Iterator[str]:
        """The next `count` characters, None for all that is left."""
        while count is None or count > 0:
            chunk = self._rest or next(self._chunks, "")
            if not chunk:
                return
            part, self._rest = (chunk, "") if count is None else (chunk[:count], chunk[count:])
            if count is not None:
                count -= len(part)
            self.taken += len(part)
            yield part
            if self._report:
                self._report(len(part) if part.isascii() else len(part.encode("utf-8")))

    def check(self, expected: int, path: Path) -> None:
        if self.taken != expected or self._rest or next(self._chunks, ""):
            raise _changed(path)


def _changed(path: Path) -> DataError:
    return DataError(f"{path} changed while it was being read. Run the same command again when nothing writes to it.")


@dataclass(frozen=True)
class SplitPlan:
    """Which side each document is on; sides None: each document is cut by position."""

    val_fraction: float
    method: str  # "hash", "hash order" or "position", in words for people and in the key of the cache
    sides: np.ndarray | None  # (num_documents,) uint8: TRAIN or VAL

    def cut(self, num_chars: int) -> int:
        """Characters of a document for training when it is cut by position."""
        return int((1 - self.val_fraction) * num_chars)

    def train_bytes(self, rows: np.ndarray) -> int:
        if self.sides is None:
            return int((1 - self.val_fraction) * int(rows["bytes"].sum()))
        return int(rows["bytes"][self.sides == TRAIN].sum())


def plan_split(rows: np.ndarray, val_fraction: float) -> SplitPlan:
    """The side of each document from the hash of its text; see the top of this file."""
    if not 0.0 <= val_fraction < 1.0:
        raise UserError(f"val_fraction must be at least 0 and below 1, got {val_fraction}. Use a value like 0.1.")
    if val_fraction == 0.0:
        return SplitPlan(0.0, "hash", np.full(len(rows), TRAIN, dtype=np.uint8))
    total = int(rows["bytes"].sum())

    def fits(sides: np.ndarray) -> bool:
        share = float(rows["bytes"][sides == VAL].sum()) / total
        return val_fraction / 3 <= share <= min(3 * val_fraction, (1 + val_fraction) / 2) and bool((sides == TRAIN).any())

    sides = (rows["key"].astype(np.float64) / 2.0**64 < val_fraction).astype(np.uint8)
    if fits(sides):
        return SplitPlan(val_fraction, "hash", sides)

    keys, inverse = np.unique(rows["key"], return_inverse=True)
    sizes = np.bincount(inverse, weights=rows["bytes"])  # of each distinct text, in the order of the hashes
    chosen = np.zeros(len(keys), dtype=bool)
    filled = 0.0
    for i, size in enumerate(sizes):
        if filled < val_fraction * total and filled + size <= 1.5 * val_fraction * total:
            chosen[i] = True
            filled += size
    sides = chosen[inverse].astype(np.uint8)
    if fits(sides):
        return SplitPlan(val_fraction, "hash order", sides)
    return SplitPlan(val_fraction, "position", None)


def load_corpus(
    path: str | os.PathLike[str],
    memory: Path,
    exclude: Iterable[str | os.PathLike[str]] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> Corpus:
    """Find and measure all text at `path`. `memory`: the folder of sources.json and sources.bin.

    Raises DataError when there is no text, and says what was found instead.
    """
    files, skipped = find(path, exclude)
    known = _recall(memory)
    used: list[tuple[SourceFile, FileInfo]] = []
    remembered: dict[str, dict[str, Any]] = {}
    total = sum(file.size for file in files)
    done = files_read = 0

    def report(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress:
            progress("Reading files", min(done, total), total)

    for file in files:
        stamp = [str(file.path.resolve()), file.size, *file.stamp]
        last = known.get(file.name)
        if last is not None and last[0] == stamp:
            info = last[1]
            report(file.size)
        else:
            info = scan(file, report)
            files_read += 1
        if isinstance(info, str):
            skipped.add(info, file.name)
            remembered[file.name] = {"stamp": stamp, "reason": info}
            continue
        skipped.update(info.skipped)
        used.append((file, info))
        entry = {"stamp": stamp, "kind": info.kind, "digest": info.digest, "charset": list(info.charset), "rows": len(info.rows)}
        remembered[file.name] = {**entry, "skipped": info.skipped.to_dict()}
    if not used:
        raise DataError(_no_text(Path(path), skipped))
    rows = np.concatenate([info.rows for _, info in used])
    if files_read or set(known) != set(remembered):
        write_atomically(memory / "sources.bin", rows.tobytes())
        write_atomically(memory / "sources.json", json.dumps({"version": SCAN_VERSION, "rows": len(rows), "files": remembered}).encode("utf-8"))
    return Corpus(Path(path), used, rows, skipped, files_read)


def _recall(memory: Path) -> dict[str, tuple[list[Any], "FileInfo | str"]]:
    """What is known of the files from last time; nothing when the record is missing, damaged or of another version."""
    try:
        record = json.loads((memory / "sources.json").read_text("utf-8"))
        rows = np.fromfile(memory / "sources.bin", dtype=ROW)
        if record["version"] != SCAN_VERSION or record["rows"] != len(rows):
            return {}
        known: dict[str, tuple[list[Any], FileInfo | str]] = {}
        first = 0
        for name, entry in record["files"].items():
            if "reason" in entry:
                known[name] = (entry["stamp"], str(entry["reason"]))
                continue
            own = rows[first : first + entry["rows"]]
            first += entry["rows"]
            known[name] = (
                entry["stamp"],
                FileInfo(str(entry["kind"]), str(entry["digest"]), Charset(*entry["charset"]), own, Skipped.from_dict(entry["skipped"])),
            )
        return known if first == len(rows) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _no_text(path: Path, skipped: Skipped) -> str:
    kinds = "Text, Markdown, source code and JSONL with a text field can be used."
    if not skipped.total:
        return f"{path} is empty. {kinds}"
    if path.is_file():
        return f"{path} holds no text: it is {next(iter(skipped.counts))}. {kinds}"
    return f"{path} holds no text. Left out: {'; '.join(skipped.lines()[:5])}. {kinds}"
