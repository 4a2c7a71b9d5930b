"""All documents of a folder, read and measured once: which there are, how large, and on which side of train and validation each belongs.

What a file told is remembered in sources.json and sources.bin, and a file is read again only when its size, times or inode changed.

Sides. A document goes to validation when the hash of its text, as a fraction, is below val_fraction: the same text always lands on the same
side, and no document moves when others arrive. Where that leaves one side (nearly) empty or validation far too large, because the documents
are few, they are taken in the order of their hashes until validation has its share; and where that cannot be done either (one book), each
document is cut by position: its first int((1 - val_fraction) * characters) characters are for training, the rest for validation.

Where no val_fraction is given, `default_val_fraction` takes it from the amount of text. As text is added it can only fall: documents then may
leave validation for training, and none goes the other way.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cllm.data.documents.chat_forms import EXAMPLE
from cllm.data.documents.files import Skipped, SourceFile, find
from cllm.data.documents.scan import ROW, FileInfo, Reading, read, scan
from cllm.files import DATA, write_file
from cllm.runtime.errors import DataError, UserError
from cllm.runtime.printable import printable, quoted
from cllm.runtime.progress import ByteProgress

SCAN_VERSION = 3
TRAIN, VAL = 0, 1
VAL_OF_SMALL, VAL_LEAST, VAL_SHARE, VAL_MOST = 0.1, 1_000_000, 0.01, 8_000_000  # share, bytes, share, bytes: see default_val_fraction
Report = Callable[[int], None]  # called with a number of bytes that were just dealt with
PIECE_CHARS = 1 << 15  # the trainer of the tokenizers library buffers 256 items, so items are small
_SAFE_CUT = re.compile(r"(?<=[^\W_])(?=[ \n])")


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
        """A hash of the names and contents of all files and of how their texts are taken out of them."""
        listed = [[file.name, info.digest, *info.how()] for file, info in self.files]
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


def default_val_fraction(num_bytes: int) -> float:
    """The share of `num_bytes` of text that is kept for validation when none was given.

    A tenth up to 10 MB, then 1 MB, from 100 MB on one hundredth, and at most 8 MB: about 2 million tokens, on which a mean loss is known to
    about 0.002 nats (tokens spread by about 3 nats, divided by the root of their number). More would be taken from training, and cost time in
    every evaluation, without telling more.
    """
    return min(VAL_OF_SMALL, max(VAL_SHARE, VAL_LEAST / max(1, num_bytes)), VAL_MOST / max(1, num_bytes))


def plan_split(rows: np.ndarray, val_fraction: float | None) -> SplitPlan:
    """The side of each document from the hash of its text; see the top of this file. val_fraction None: `default_val_fraction` chooses."""
    if val_fraction is None:
        val_fraction = default_val_fraction(int(rows["bytes"].sum()))
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
    reading: Reading = Reading(),
) -> Corpus:
    """Find and measure all text at `path`, taken out of the files as `reading` says. `memory`: the folder of sources.json and sources.bin.

    Raises DataError when there is no text, and says what was found instead.
    """
    files, skipped = find(path, exclude)
    known = _recall(memory, reading)
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
            info = scan(file, report, reading)
            files_read += 1
        if isinstance(info, str):
            skipped.add(info, file.name)
            remembered[file.name] = {"stamp": stamp, "reason": info}
            continue
        skipped.update(info.skipped)
        used.append((file, info))
        remembered[file.name] = {"stamp": stamp, **info.to_dict()}
    if not used:
        raise DataError(_no_text(Path(path), skipped))
    rows = np.concatenate([info.rows for _, info in used])
    if files_read or set(known) != set(remembered):
        write_file(memory / "sources.bin", rows.tobytes(), DATA)
        record = {"version": SCAN_VERSION, "reading": asdict(reading), "rows": len(rows), "files": remembered}
        write_file(memory / "sources.json", json.dumps(record).encode("utf-8"), DATA)
    return Corpus(Path(path), used, rows, skipped, files_read)


def _recall(memory: Path, reading: Reading) -> dict[str, tuple[list[Any], "FileInfo | str"]]:
    """What is known of the files from last time; nothing when the record is missing, damaged, of another version or another reading."""
    try:
        record = json.loads((memory / "sources.json").read_text("utf-8"))
        rows = np.fromfile(memory / "sources.bin", dtype=ROW)
        if record["version"] != SCAN_VERSION or record["reading"] != asdict(reading) or record["rows"] != len(rows):
            return {}
        known: dict[str, tuple[list[Any], FileInfo | str]] = {}
        first = 0
        for name, entry in record["files"].items():
            if "reason" in entry:
                known[name] = (entry["stamp"], str(entry["reason"]))
                continue
            own = rows[first : first + entry["rows"]]
            first += entry["rows"]
            known[name] = (entry["stamp"], FileInfo.from_dict(entry, own))
        return known if first == len(rows) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _no_text(path: Path, skipped: Skipped) -> str:
    kinds = (
        'Text, Markdown and source code can be used, and records with a text: JSON such as {"text": "..."}, one a line or in a list, or CSV and TSV '
        f"with a column of text. Chats are records such as {EXAMPLE}."
    )
    if not skipped.total:
        return f"{path} is empty. {kinds}"
    if path.is_file():
        reason = next(iter(skipped.counts))
        return f"{path} holds no text: it is {'a ' if reason.startswith(('table ', 'file ', 'JSON file ')) else ''}{reason}. {kinds}"
    return f"{path} holds no text. Left out: {'; '.join(skipped.lines()[:5])}. {kinds}"


# -- the text itself ------------------------------------------------------------------------------------------------------------------


def measure(path: str | os.PathLike[str], bar: ByteProgress, log: Callable[[str], None] | None = None) -> Corpus:
    """All text at a path, found and measured without anything being remembered; `log` hears what was found."""
    with tempfile.TemporaryDirectory(prefix="cllm-") as scratch:
        corpus = load_corpus(path, Path(scratch), (), bar)
    if log is not None:
        describe(corpus, plan_split(corpus.rows, 0.0), log)
    return corpus


def stream_texts(
    path: str | os.PathLike[str], *, log: Callable[[str], None] | None = None, progress: Callable[[str, int, int], None] | None = None
) -> Iterator[str]:
    """All text at a path as a stream of pieces, documents not marked; for statistics.

    log gets a sentence about what was found; progress(step, bytes done, bytes in all) replaces the progress line.
    Raises DataError when there is no text.
    """
    with ByteProgress(progress) as bar:
        corpus = measure(path, bar, log)
        for segment in corpus.segments(plan_split(corpus.rows, 0.0), bar.step("Reading text", corpus.num_bytes)):
            yield from pieces(segment.chunks)


@dataclass
class TextSample:
    """The pieces of text that a tokenizer learns from: a share of those of `of_bytes`, counted in `bytes` and `pieces` as they are taken."""

    bytes: int
    of_bytes: int
    pieces: int
    share: float

    def take(self, corpus: Corpus, plan: SplitPlan, sides: Container[int], report: Report) -> Iterator[str]:
        """The pieces of all documents on these sides that belong to the sample. Which they are depends on the documents alone."""
        threshold = int(self.share * 2**64)
        for segment in corpus.segments(plan, report):
            if segment.side not in sides:
                for _ in segment.chunks:  # the next segment begins where this one ends
                    pass
                continue
            for number, piece in enumerate(pieces(segment.chunks)):
                if self.share < 1.0 and _hash(segment.key, number) >= threshold:
                    continue
                self.bytes += len(piece.encode("utf-8"))
                self.pieces += 1
                yield piece


def _hash(key: int, number: int) -> int:
    """An even 64-bit hash of one piece of a document."""
    return int.from_bytes(hashlib.blake2b(f"{key}:{number}".encode(), digest_size=8).digest(), "little")


def pieces(chunks: Iterable[str], size: int = PIECE_CHARS) -> Iterator[str]:
    """Cut a stream of text into pieces of `size` to 2 `size` characters; joined they are the text again.

    Cuts fall between a letter or digit and a following blank or newline, where every token of both patterns ends, so that encoding the
    pieces gives the tokens of the whole. Only where `size` characters hold no such place (one endless word) a piece is cut anywhere.
    The cuts depend on the text alone, not on the chunks it arrives in.
    """
    buffer, start = "", 0
    for chunk in chunks:
        buffer = buffer[start:] + chunk
        start = 0
        while len(buffer) - start > 2 * size:
            found = _SAFE_CUT.search(buffer, start + size, start + 2 * size)
            end = found.start() if found else start + 2 * size
            yield buffer[start:end]
            start = end
    if len(buffer) > start:
        yield buffer[start:]


def describe(corpus: Corpus, plan: SplitPlan, tell: Callable[[str], None]) -> tuple[str, str, str]:
    """Tells what was found, what was left out and how it is split; returns it as a step of `prepare`: (step, "done" or "cached", in words)."""
    files, documents = len(corpus.files), len(corpus.rows)
    words = f"{files:,} file{'s' * (files != 1)}, {documents:,} document{'s' * (documents != 1)}, {corpus.num_bytes / 1e6:,.2f} MB of text"
    state = "cached" if not corpus.files_read else "done" if corpus.files_read >= files else f"{corpus.files_read:,} read, the others cached"
    tell(f"files: {words} ({state})")
    for line in _origins(corpus):
        tell(f"  {line}")
    others = sorted({info.charset.codec for _, info in corpus.files} - {"utf-8", "utf-8-sig"})
    if others:
        tell(f"  decoded from {', '.join(others)}")
    for line in corpus.skipped.report():
        tell(f"  {line}")
    if plan.val_fraction:
        kept = corpus.num_bytes - plan.train_bytes(corpus.rows)
        how = "the end of each document, because the documents are few" if documents > 1 else "the end of the text"
        if plan.sides is not None:
            how = f"{int((plan.sides == VAL).sum()):,} documents, chosen by the hash of their text"
        tell(f"  validation: {kept / 1e6:,.2f} MB ({100 * kept / corpus.num_bytes:.1f} %), {how}")
    return "files", "cached" if not corpus.files_read else "done", words


def _origins(corpus: Corpus) -> list[str]:
    """Where the documents are in files that are not one document each, a line for all files that are alike."""
    alike: dict[tuple[Any, ...], list[tuple[SourceFile, FileInfo]]] = {}
    for file, info in corpus.files:
        if info.kind == "records":
            alike.setdefault(("records", info.unit, info.used), []).append((file, info))
        elif info.separator:
            alike.setdefault(("cut", info.separator, info.guarded), []).append((file, info))
        if info.not_records:
            alike.setdefault(("text", info.not_records if len(corpus.files) == 1 else ""), []).append((file, info))
    lines = []
    for (kind, *key), members in alike.items():
        names = [printable(file.name) for file, _ in members]
        shown = names[0] if len(names) == 1 else f"{len(names):,} files ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        count = sum(len(info.rows) for _, info in members)
        documents = f"{count:,} document{'s' * (count != 1)}"
        if kind == "records":
            unit, used = key
            where = f"text from {'column' if unit == 'row' else 'field'} {' or '.join(quoted(name) for name in used)}" if used else "each a text"
            units = sum(info.num_units for _, info in members)
            lines.append(f"{shown}: {units:,} {unit}{'s' * (units != 1)}, {where}{f', cut into {documents}' if units != count else ''}")
        elif kind == "cut":
            whole = "; data.separator=none keeps a file whole" if key[1] else ""
            lines.append(f"{shown}: {documents}, cut at {key[0]!r}{whole}")
        else:
            reason = f" ({key[0]})" if key[0] else ""
            lines.append(f"{shown}: learnt as written, because no records with a text were found in {'it' if len(names) == 1 else 'them'}{reason}")
    return lines
