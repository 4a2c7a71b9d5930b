"""All documents of a folder, read and measured once: which there are, how large, and what was found, in words.

What a file told is remembered in sources.json and sources.bin, and a file is read again only when its size, times or inode changed, or when the files
around it give another charset to it.
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
from cllm.data.documents.decodings import Decodings, listed
from cllm.data.documents.files import Skipped, SourceFile, find
from cllm.data.documents.guess import pool
from cllm.data.documents.parquet import NEEDS_PYARROW
from cllm.data.documents.scan import ROW, FileInfo, Reading, Undecided, read, scan, scan_decoded
from cllm.data.documents.sides import TRAIN, VAL, SplitPlan, plan_split
from cllm.files import DATA, write_file
from cllm.runtime.errors import DataError
from cllm.runtime.printable import printable, quoted
from cllm.runtime.progress import ByteProgress
from cllm.runtime.quantities import counted, size

SCAN_VERSION = 3
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

    def segments(self, plan: SplitPlan, report: Report | None = None) -> Iterator[Segment]:
        """The text of all documents, in order; DataError when a file is not any more what it was when it was measured."""
        first = 0
        for file, info in self.files:
            yield from self.segments_of(file, info, first, plan, report)
            first += len(info.rows)

    def segments_of(self, file: SourceFile, info: FileInfo, first: int, plan: SplitPlan, report: Report | None = None) -> Iterator[Segment]:
        """The same of one file, whose first document is number `first` of all."""
        number = 0
        for document in read(file, info):
            if number >= len(info.rows):
                raise _changed(file.path)
            row = info.rows[number]
            cursor = _Cursor(document.chunks, report)
            if plan.sides is None:
                cut = plan.cut(int(row["chars"]))
                yield Segment(TRAIN, document.name, int(row["key"]), cursor.take(cut))
                yield Segment(VAL, document.name, int(row["key"]), cursor.take(None))
            else:
                yield Segment(int(plan.sides[first + number]), document.name, int(row["key"]), cursor.take(None))
            cursor.check(int(row["chars"]), file.path)
            number += 1
        if number != len(info.rows):
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
    last = _recall(memory, reading)
    stamps = {file.name: [file.real, file.size, *file.stamp] for file in files}
    known = {file.name: last[file.name] for file in files if file.name in last and last[file.name].stamp == stamps[file.name]}
    unread = [file for file in files if file.name not in known]
    report = _counter(progress, "Reading files", sum(file.size for file in unread))
    for file in unread:
        found = scan(file, report, reading)
        stamp = stamps[file.name]
        known[file.name] = _Known(stamp, "", found) if isinstance(found, Undecided) else _Known(stamp, found)
    read_now = {file.name for file in unread}

    # A guess depends on the other files as well: one that was remembered is made again, and the file read again where it comes out otherwise.
    codecs = pool({name: each.undecided.evidence for name, each in known.items() if each.undecided is not None})
    changed = [file for file in files if codecs.get(file.name, "") != known[file.name].codec]
    report = _counter(progress, "Decoding files", sum(file.size for file in changed))
    for file in changed:
        undecided = known[file.name].undecided
        assert undecided is not None
        found = scan_decoded(file, undecided, codecs[file.name], reading)
        known[file.name] = _Known(known[file.name].stamp, found, undecided, codecs[file.name])
        read_now.add(file.name)
        report(file.size)

    used: list[tuple[SourceFile, FileInfo]] = []
    for file in files:
        held = known[file.name].found
        if isinstance(held, str):
            skipped.add(held, file.name)
        else:
            skipped.update(held.skipped)
            used.append((file, held))
    if not used:
        raise DataError(no_text(Path(path), skipped))
    rows = np.frombuffer(bytearray().join(info.rows.tobytes() for _, info in used), ROW)
    if read_now or set(last) != set(known):
        write_file(memory / "sources.bin", rows.tobytes(), DATA)
        entries = {file.name: known[file.name].to_dict() for file in files}  # in the order of the rows
        record = {"version": SCAN_VERSION, "reading": asdict(reading), "rows": len(rows), "files": entries}
        write_file(memory / "sources.json", json.dumps(record).encode("utf-8"), DATA)
    return Corpus(Path(path), used, rows, skipped, len(read_now))


def _counter(progress: Callable[[str, int, int], None] | None, label: str, total: int) -> Report:
    """A function that is told of bytes that were dealt with and passes their sum on."""
    done = 0

    def report(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress:
            progress(label, min(done, total), total)

    return report


@dataclass(frozen=True)
class _Known:
    """What is known of a file that had this stamp."""

    stamp: list[Any]
    found: FileInfo | str  # what it holds, or why it is left out
    undecided: Undecided | None = None  # where its charset is a guess: what that rests on
    codec: str = ""  # the guess

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"reason": self.found} if isinstance(self.found, str) else self.found.to_dict()
        return {"stamp": self.stamp, **values} | ({"undecided": self.undecided.to_dict(), "codec": self.codec} if self.undecided else {})


def _recall(memory: Path, reading: Reading) -> dict[str, _Known]:
    """What is known of the files from last time; nothing when the record is missing, damaged, of another version or another reading."""
    try:
        record = json.loads((memory / "sources.json").read_text("utf-8"))
        rows = np.fromfile(memory / "sources.bin", dtype=ROW)
        if record["version"] != SCAN_VERSION or record["reading"] != asdict(reading) or record["rows"] != len(rows):
            return {}
        known: dict[str, _Known] = {}
        first = 0
        for name, entry in record["files"].items():
            own = rows[first : first + entry.get("rows", 0)]
            first += len(own)
            if entry.get("reason") == NEEDS_PYARROW:
                continue  # it may have been installed since
            found = str(entry["reason"]) if "reason" in entry else FileInfo.from_dict(entry, own)
            undecided = Undecided.from_dict(entry["undecided"]) if "undecided" in entry else None
            known[name] = _Known(entry["stamp"], found, undecided, str(entry.get("codec", "")))
        return known if first == len(rows) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def no_text(path: Path, skipped: Skipped) -> str:
    """Why there is no text at a path, and what could be given instead."""
    kinds = (
        'Text, Markdown and source code can be used, and records with a text: JSON such as {"text": "..."}, one a line or in a list, or CSV, TSV and '
        f"Parquet with a column of text. Chats are records such as {EXAMPLE}."
    )
    if not skipped.total:
        return f"{path} is empty. {kinds}"
    if skipped.advice():
        kinds = f"{kinds} And {skipped.advice()}"
    if path.is_file():
        reason = next(iter(skipped.counts))
        return f"{path} holds no text: it is {'a ' if reason.startswith(('table ', 'file ', 'JSON file ', 'Parquet file ')) else ''}{reason}. {kinds}"
    return f"{path} holds no text. Left out: {'; '.join(skipped.lines()[:5])}. {kinds}"


# -- the text itself ------------------------------------------------------------------------------------------------------------------


def measure(path: str | os.PathLike[str], bar: ByteProgress, log: Callable[[str], None] | None = None, reading: Reading = Reading()) -> Corpus:
    """All text at a path, found and measured without anything being remembered; `log` hears what was found."""
    with tempfile.TemporaryDirectory(prefix="cllm-") as scratch:
        corpus = load_corpus(path, Path(scratch), (), bar, reading)
    if log is not None:
        describe(corpus, plan_split(corpus.rows, 0.0), log)
    return corpus


def stream_texts(
    path: str | os.PathLike[str],
    *,
    reading: Reading = Reading(),
    log: Callable[[str], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[str]:
    """All text at a path as a stream of pieces, documents not marked; for statistics.

    reading: how texts are taken out of the files. log gets a sentence about what was found; progress(step, bytes done, bytes in all) replaces the
    progress line. Raises DataError when there is no text.
    """
    with ByteProgress(progress) as bar:
        corpus = measure(path, bar, log, reading)
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


# -- what was found, in words ---------------------------------------------------------------------------------------------------------


def describe(corpus: Corpus, plan: SplitPlan, tell: Callable[[str], None]) -> tuple[str, str, str]:
    """Tells what was found, what was left out and how it is split; returns it as a step of `prepare`: (step, "done" or "cached", in words)."""
    files, documents = len(corpus.files), len(corpus.rows)
    words = f"{counted(files, 'file')}, {counted(documents, 'document')}, {size(corpus.num_bytes)} of text"
    others = "the other" if files - corpus.files_read == 1 else "the others"
    state = "cached" if not corpus.files_read else "done" if corpus.files_read >= files else f"{corpus.files_read:,} read, {others} cached"
    tell(f"files: {words} ({state})")
    for line in _origins(corpus):
        tell(f"  {line}")
    for line in _charsets(corpus):
        tell(f"  {line}")
    for line in corpus.skipped.report():
        tell(f"  {line}")
    if plan.val_fraction:
        kept = corpus.num_bytes - plan.train_bytes(corpus.rows)
        how = "the end of each document, because the documents are few" if documents > 1 else "the end of the text"
        if plan.sides is not None:
            chosen = int((plan.sides == VAL).sum())
            how = f"{counted(chosen, 'document')}, chosen by the hash of {'its' if chosen == 1 else 'their'} text"
        tell(f"  validation: {size(kept)} ({100 * kept / corpus.num_bytes:.1f} %), {how}")
    return "files", "cached" if not corpus.files_read else "done", words


def _charsets(corpus: Corpus) -> list[str]:
    """What the files were decoded from, where that was not UTF-8; what was guessed, with an example; what did not fit."""
    decodings = Decodings()
    for file, info in corpus.files:
        decodings.add(file.name, file.path, info.charset)
    return decodings.lines()


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
        shown = listed(names)
        count = sum(len(info.rows) for _, info in members)
        documents = counted(count, "document")
        if kind == "records":
            unit, used = key
            where = f"text from {'column' if unit == 'row' else 'field'} {' or '.join(quoted(name) for name in used)}" if used else "each a text"
            units = sum(info.num_units for _, info in members)
            lines.append(f"{shown}: {counted(units, unit)}, {where}{f', cut into {documents}' if units != count else ''}")
        elif kind == "cut":
            whole = "; data.separator=none keeps a file whole" if key[1] else ""
            lines.append(f"{shown}: {documents}, cut at {key[0]!r}{whole}")
        else:
            reason = f" ({key[0]})" if key[0] else ""
            lines.append(f"{shown}: learnt as written, because no records with a text were found in {'it' if len(names) == 1 else 'them'}{reason}")
    return lines
