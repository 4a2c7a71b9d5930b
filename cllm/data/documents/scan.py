"""What a file holds: told once by `scan`, and read again by `read`. Both give the same documents in the same order.

A file of text is one document, or several where a separator stands between them (see separators.py). A file of records (JSON, tables, Parquet) gives
one document for each record that has a text (see records.py, fields.py). Line ends become \\n as in Python's universal newlines, a byte order mark
is dropped, halves of surrogate pairs (JSON can hold them) become U+FFFD; nothing else in a text is changed. No file is held in memory: text comes in
chunks.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from cllm.data.documents import charset, fields, parquet
from cllm.data.documents.charset import Binary, Charset
from cllm.data.documents.chat_forms import mostly_conversations
from cllm.data.documents.files import CODE_EXTENSIONS, Skipped, SourceFile
from cllm.data.documents.guess import Evidence
from cllm.data.documents.json_records import clean
from cllm.data.documents.records import RECORD_EXTENSIONS, Records, decoding_of
from cllm.data.documents.separators import AUTO, MARKERS, NONE, Splitter, passing, recognise
from cllm.data.documents.separators import parse as parse_separator
from cllm.runtime.errors import DataError
from cllm.runtime.printable import printable, quoted

CHUNK_CHARS = 1 << 18
SMALL_BYTES = 1 << 16  # a file of at most so many is read once and decoded at once: there may be a hundred thousand of them
LONG_LINE = 5000  # characters in the longest line, and
LONG_MEAN = 200  # on average, from which source code counts as minified or generated
ROW = np.dtype([("key", "<u8"), ("chars", "<i8"), ("bytes", "<i8")])  # one document: hash of its text, its size in characters and in UTF-8
CHATS = "file of chats, which teach a trained model to answer (give chats alone to cllm train, with --from MODEL)"

PARQUET_OF_ANOTHER_NAME = "Parquet file of another name (rename it so that it ends with .parquet)"

_RECORDS = "|".join(f"(?<={re.escape(each)})" for each in sorted(RECORD_EXTENSIONS))
_PLACE = re.compile(rf"(?:{_RECORDS}):\d+(?:#\d+)?(?:\.\d+)?$|#\d+$", re.I)


@dataclass(frozen=True)
class Reading:
    """How texts are taken out of files, as data.text_field, data.separator and data.encoding say."""

    text_field: str = ""  # empty: found by itself
    separator: str = AUTO  # as `separators.parse` gives it
    encoding: str = charset.AUTO  # as `charset.check_encoding` gives it

    @classmethod
    def of(cls, text_field: str, separator: str, encoding: str = charset.AUTO) -> "Reading":
        """From the values of the settings; UserError for those that cannot be used."""
        return cls(text_field, parse_separator(separator), charset.check_encoding(encoding))


@dataclass
class FileInfo:
    """What reading a file told: its content hash, how to decode it, where its texts are, and a row for each of its documents."""

    kind: str  # "text" or "records"
    digest: str
    charset: Charset
    rows: np.ndarray  # (num_documents,) of ROW
    skipped: Skipped = field(default_factory=Skipped)
    fields: tuple[str, ...] = ()  # of records: which hold the text; the first one that a record has counts
    used: tuple[str, ...] = ()  # those that were found
    unit: str = ""  # of records: what people call them in this layout
    num_units: int = 0  # of records: how many have a text; a separator may make several documents of one
    separator: str = ""  # of text: what it is cut at; of records: Reading.separator, by which each text is cut
    guarded: bool = False  # see Splitter
    not_records: str = ""  # of text that could have been records: why it is none

    def to_dict(self) -> dict[str, Any]:
        """All but the rows, for JSON."""
        names = ("kind", "digest", "fields", "used", "unit", "num_units", "separator", "guarded", "not_records")
        values = {name: getattr(self, name) for name in names}
        return {**values, "charset": list(self.charset), "skipped": self.skipped.to_dict(), "rows": len(self.rows)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], rows: np.ndarray) -> "FileInfo":
        texts = {name: str(values[name]) for name in ("kind", "digest", "unit", "separator", "not_records")}
        lists = {name: tuple(map(str, values[name])) for name in ("fields", "used")}
        charset, skipped = Charset(*values["charset"]), Skipped.from_dict(values["skipped"])
        num_units, guarded = int(values["num_units"]), bool(values["guarded"])
        return cls(**texts, **lists, charset=charset, rows=rows, skipped=skipped, num_units=num_units, guarded=guarded)  # type: ignore[arg-type]

    def how(self) -> list[Any]:
        """Everything beside the content that decides what the documents are."""
        return [self.kind, *self.charset[:2], self.fields, self.separator, self.guarded]


class Document(NamedTuple):
    """A name and the text in chunks; the chunks must be taken before the next document is."""

    name: str
    chunks: Iterable[str]


def file_of(document: str) -> str:
    """The file of a document: its name without the place in the file."""
    return _PLACE.sub("", document)


@dataclass(frozen=True)
class Undecided:
    """A file of text of which only the letters tell the charset: `guess.pool` decides with the files around it, then `scan_decoded` reads it."""

    digest: str
    evidence: Evidence
    not_records: str = ""  # see FileInfo

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"digest": self.digest, "evidence": self.evidence.to_dict(), "not_records": self.not_records}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Undecided":
        return cls(str(values["digest"]), Evidence.from_dict(values["evidence"]), str(values["not_records"]))


def scan(file: SourceFile, report: Callable[[int], None] | None = None, reading: Reading = Reading()) -> FileInfo | Undecided | str:
    """Read a file once and say what it holds, or why it is left out."""
    suffix = file.path.suffix.lower()
    try:
        with _opened(file.path) as raw:
            digest = _digest(raw, report)
            raw.seek(0)
            if suffix != parquet.EXTENSION and raw.read(4) == parquet.MAGIC:
                return PARQUET_OF_ANOTHER_NAME
            raw.seek(0)
            found = _scan_records(file, digest, reading) if suffix in RECORD_EXTENSIONS else _NotRecords()
            if not isinstance(found, _NotRecords):
                return found
            raw.seek(0)
            decided = charset.examine(charset.blocks(raw), reading.encoding)
            source = raw.getvalue() if isinstance(raw, io.BytesIO) else file.path
        if isinstance(decided, Binary):
            return decided.reason
        if isinstance(decided, Evidence):
            return Undecided(digest, decided, found.reason)
        return _scan_text(file.path, source, digest, decided, reading, found.reason)
    except OSError as error:
        return _unreadable(error)


def scan_decoded(file: SourceFile, undecided: Undecided, codec: str, reading: Reading = Reading()) -> FileInfo | str:
    """What a file holds when it is decoded with this codec."""
    try:
        return _scan_text(file.path, file.path, undecided.digest, charset.guessed(codec), reading, undecided.not_records)
    except OSError as error:
        return _unreadable(error)


def _unreadable(error: OSError) -> str:
    return f"unreadable ({(error.strerror or str(error)).lower()})"


def read(file: SourceFile, info: FileInfo) -> Iterator[Document]:
    """The documents of a file, in the order of info.rows."""
    name = printable(file.name)
    try:
        if info.kind == "records":
            records = Records(file.path, info.charset)
            for place, text in _texts(records, info.fields, info.separator, Skipped(), name):
                yield Document(f"{name}:{place}", [text])
        elif info.separator:
            splitter = Splitter(info.separator, info.guarded)
            for number, chunks in enumerate(splitter.documents(_read_text(file.path, info.charset)), 1):
                yield Document(f"{name}#{number}", chunks)
        else:
            yield Document(name, _read_text(file.path, info.charset))
    except OSError as error:
        raise DataError(f"{file.path} cannot be read any more ({error.strerror}). Run the same command again.") from None


def _digest(raw: IO[bytes], report: Callable[[int], None] | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    while block := raw.read(1 << 20):
        digest.update(block)
        if report:
            report(len(block))
    return digest.hexdigest()


# -- text ---------------------------------------------------------------------------------------------------------------------------


def _scan_text(path: Path, source: Path | bytes, digest: str, decoding: Charset, reading: Reading, not_records: str) -> FileInfo | str:
    """source: the content of a small file, the path of any other."""
    is_code = path.suffix.lower() in CODE_EXTENSIONS
    wanted: tuple[str, ...] = MARKERS if reading.separator == AUTO else (reading.separator,)
    if reading.separator == NONE or (reading.separator == AUTO and is_code):  # a program may well print a marker
        wanted = ()
    seen: list[bool] = []
    row, longest, mean = _measure(passing(_read_text(source, decoding), wanted, seen))
    if row is None:
        return "empty"
    if is_code and longest > LONG_LINE and mean > LONG_MEAN:
        return "minified or generated"
    info = FileInfo("text", digest, decoding, np.array([row], dtype=ROW), not_records=not_records)
    guarded = reading.separator == AUTO
    separator = (recognise(_read_text(source, decoding)) if guarded else reading.separator) if seen else ""
    if separator:
        documents = Splitter(separator, guarded).documents(_read_text(source, decoding))
        rows = [each for each, _, _ in map(_measure, documents) if each is not None]
        if not rows:
            return "empty"
        info.separator, info.guarded, info.rows = separator, guarded, np.array(rows, dtype=ROW)
    return info


def _opened(path: Path) -> IO[bytes]:
    """A file of the disk; where it is small, its content in memory."""
    raw = open(path, "rb", buffering=0)  # noqa: SIM115 - closed here, or by who gets it
    content = raw.read(SMALL_BYTES + 1)
    if len(content) <= SMALL_BYTES and not raw.read(1):
        raw.close()
        return io.BytesIO(content)
    raw.seek(0)
    return io.BufferedReader(raw)


def _read_text(source: Path | bytes, decoding: Charset) -> Iterator[str]:
    raw = io.BytesIO(source) if isinstance(source, bytes) else _opened(source)
    if isinstance(raw, io.BytesIO) and decoding.codec == "utf-8":
        whole = raw.getvalue().decode("utf-8", decoding.errors).removeprefix("\ufeff")
        if "\r" in whole:
            whole = whole.replace("\r\n", "\n").replace("\r", "\n")
        if whole:
            yield whole if whole.isascii() else clean(whole)
        return
    with io.TextIOWrapper(raw, encoding=decoding.codec, errors=decoding.errors, newline=None) as text:
        chunk = text.read(CHUNK_CHARS).removeprefix("\ufeff")
        while chunk:
            yield chunk if chunk.isascii() else clean(chunk)
            chunk = text.read(CHUNK_CHARS)


def _measure(chunks: Iterable[str]) -> tuple[tuple[int, int, int] | None, int, float]:
    """Row of a document (None when it is blank), characters of its longest line, and of its mean line."""
    key = hashlib.blake2b(digest_size=8)
    chars = num_bytes = longest = open_line = newlines = 0
    blank = True
    for chunk in chunks:
        encoded = chunk.encode("utf-8")
        key.update(encoded)
        chars += len(chunk)
        num_bytes += len(encoded)
        blank = blank and not chunk.strip()
        first, *rest = chunk.split("\n")
        longest = max(longest, open_line + len(first), max(map(len, rest), default=0))
        open_line = len(rest[-1]) if rest else open_line + len(first)
        newlines += len(rest)
    if blank:
        return None, 0, 0.0
    return (int.from_bytes(key.digest(), "little"), chars, num_bytes), longest, chars / (newlines + 1)


# -- records ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _NotRecords:
    """A file that is learnt as the text it is, and why where it could have been records."""

    reason: str = ""


def _scan_records(file: SourceFile, digest: str, reading: Reading) -> FileInfo | str | _NotRecords:
    decoding = decoding_of(file.path, reading.encoding)
    if isinstance(decoding, Binary):
        return decoding.reason
    records = Records(file.path, decoding)
    unit, file_kind = records.unit, records.file_kind
    sample = records.sample()
    if not reading.text_field and mostly_conversations(sample):
        return CHATS
    choice = fields.choose(sample, reading.text_field)
    if file.path.suffix.lower() == ".json" and (not choice.fields or not are_texts(sample, choice.fields)):
        return _NotRecords(choice.reason or "its texts are a small part of it")
    skipped = Skipped()
    if not sample:
        for _ in records.read(lambda reason, place: skipped.add(reason, f"{file.name}:{place}")):
            pass
        return f"{file_kind} in which no {unit} can be read{''.join(f'; {line}' for line in skipped.lines())}"
    if not choice.fields:
        return f"{file_kind} in which {choice.reason}"
    used: Counter[str] = Counter()
    texts = _texts(records, choice.fields, reading.separator, skipped, file.name, used)
    rows = [row for row in (_measure([text])[0] for _, text in texts) if row is not None]
    if not rows:
        return f"{file_kind} in which no {unit} has a text ({'; '.join(skipped.lines())})"
    info = FileInfo("records", digest, decoding, np.array(rows, dtype=ROW), skipped, choice.fields, tuple(name for name in used if name), unit)
    info.num_units, info.separator = used.total(), reading.separator
    return info


def are_texts(sample: list[Any], names: tuple[str, ...]) -> bool:
    """Whether the JSON in a .json file is there for its texts. A program's settings may hold a text as well, and are better learnt as they are."""
    texts = [text for text in (text_in(record, names)[1] for record in sample) if text is not None]
    if all(isinstance(record, str) for record in sample):
        return sum(map(len, texts)) >= fields.CONVINCING_CHARS * len(texts)
    if len(sample) > 1:
        return 2 * len(texts) >= len(sample)
    return 2 * sum(map(len, texts)) >= sum(len(json.dumps(record, ensure_ascii=False)) for record in sample)


def text_in(record: Any, names: tuple[str, ...]) -> tuple[str, str | None]:
    """The first of these fields that holds a text, and the text; ("", None) where none does."""
    for name in names:
        text = fields.text_at(record, name)
        if text is not None:
            return name, text
    return "", None


def _texts(
    records: Records, names: tuple[str, ...], separator: str, skipped: Skipped, file: str, used: Counter[str] | None = None
) -> Iterator[tuple[str, str]]:
    """(place, text) of each text in the records of a file; what has none is counted, and `used` counts which fields gave one."""
    called = " or ".join(quoted(name) for name in names)
    unit = records.unit
    for place, record in records.read(lambda reason, place: skipped.add(reason, f"{file}:{place}"), fields=names):
        name, text = text_in(record, names)
        if text is None:
            skipped.add(f"{unit} without a text in {called}", f"{file}:{place}")
        elif not text.strip():
            skipped.add(f"{unit} with empty text", f"{file}:{place}")
        else:
            if used is not None:
                used["" if isinstance(record, str) else name] += 1
            parts = parts_of(text.replace("\r\n", "\n").replace("\r", "\n"), separator)
            for number, part in enumerate(parts, 1):
                yield (place if len(parts) == 1 else f"{place}.{number}"), part


def parts_of(text: str, separator: str) -> list[str]:
    """The documents in the text of one record."""
    if separator == AUTO:
        marker = recognise([text]) if any(each in text for each in MARKERS) else ""
        return ["".join(part) for part in Splitter(marker, True).documents([text])] if marker else [text]
    if separator == NONE or separator not in text:
        return [text]
    return ["".join(part) for part in Splitter(separator, False).documents([text])]
