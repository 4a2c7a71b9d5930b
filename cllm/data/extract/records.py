"""JSON in every layout, tables of text and Parquet as `cllm train` reads them (documents/records.py), here as streams: a document for each record.

Fields with usual names beside the text tell its title, address, date, language and licence.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import IO, Any

from cllm.data.documents import fields, json_records, parquet, tables
from cllm.data.documents.charset import Binary, Charset
from cllm.data.documents.chat_forms import mostly_conversations
from cllm.data.documents.files import Skipped
from cllm.data.documents.record_text import charset_of, is_plain_utf8, text_of
from cllm.data.documents.records import TABLE_EXTENSIONS
from cllm.data.documents.scan import are_texts, parts_of, text_in
from cllm.data.extract import code
from cllm.data.extract.decoding import declared, plain, refusal
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.kinds import extension_of
from cllm.data.extract.options import Options
from cllm.data.extract.parts import Left, Part
from cllm.runtime.quantities import size

_HEAD_BYTES = 1 << 20
_SAMPLE = 1000
_CHATS = "no text (a file of chats, which teach a trained model to answer; give it to cllm train --from MODEL)"
_URL, _TITLE, _DATE = ("url", "link", "source_url"), ("title", "headline"), ("date", "published", "created", "created_at", "timestamp", "time")
_LANGUAGE, _LICENCE = ("language", "lang"), ("licence", "license", "spdx")
_NESTED = ("meta", "metadata")
_ABOUT = frozenset((*_URL, *_DATE, *_LANGUAGE, *_LICENCE))
_ISO_DATE = re.compile(r"\d{4}(?:-\d\d(?:-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:\.\d+)?(?:Z|[+-]\d\d:?\d\d)?)?)?)?")

Read = Callable[[json_records.Malformed], Iterator[tuple[str, Any]]]
Layout = json_records.Layout | tables.Dialect


def stream(file: IO[bytes], name: str, options: Options) -> Iterator[Document]:
    """Documents are told by the line that their record begins in, those of Parquet by the number of their row."""
    head = file.read(_HEAD_BYTES)
    if head.startswith(b"PAR"):
        yield from _parquet(head, file, options)
        return
    charset, layout, text = _begin(head, name, options)
    whole = io.BufferedReader(_Rejoined(head, file))
    if options.every_text:
        yield from _all_texts(_reads(text_of(whole, charset), layout), _unit(layout))
        return
    sample = _first(_reads(iter([text]), layout)(lambda reason, place: None))
    choice = _choice(sample, options)
    if extension_of(name) == ".json" and (not choice.fields or not are_texts(sample, choice.fields)):
        yield from _as_code(head, file, name, options)
        return
    if sample and not choice.fields:
        kind = "a table" if isinstance(layout, tables.Dialect) else "JSON"
        raise Unreadable(f"no text ({kind} in which {choice.reason.replace('data.text_field', '--text-field')})")
    yield from _whole(_reads(text_of(whole, charset), layout), choice.fields, _unit(layout), options)


def divide(file: IO[bytes], name: str, options: Options) -> dict[str, Any]:
    """How each part of a file is to be read, as JSON can hold it: "fields", and of text "codec" and "dialect", of Parquet "groups", the bytes of each
    row group. Nothing where only the whole can be read: a record of JSON may go over many lines, and a field of a table between quotes as well, so
    that a table whose dialect is `quoted` is fit for parts only where no quote is in it. Raises Unreadable."""
    head = file.read(_HEAD_BYTES)
    if head.startswith(b"PAR"):
        file.seek(0)
        choice = _choice(_first(parquet.rows(file, lambda reason, place: None)), options)
        groups = parquet.group_sizes(file) if choice.fields else []
        return {"fields": choice.fields, "groups": groups} if len(groups) > 1 else {}
    charset, layout, text = _begin(head, name, options)
    by_lines = layout.escape is None if isinstance(layout, tables.Dialect) else layout.kind == "lines"
    if not by_lines or not is_plain_utf8(charset):
        return {}
    sample = _first(_reads(iter([text]), layout)(lambda reason, place: None))
    choice = _choice(sample, options)
    if not choice.fields or (extension_of(name) == ".json" and not are_texts(sample, choice.fields)):
        return {}
    return {"fields": choice.fields, "codec": charset.codec, "dialect": asdict(layout) if isinstance(layout, tables.Dialect) else None}


def part(file: IO[bytes], wanted: Part, options: Options, left: Left) -> Iterator[Document]:
    """The documents of a part of a file, as those of the whole are told. left: counts what is to be told of the file at its end."""
    how = wanted.how
    if wanted.is_groups:
        yield from _documents(lambda malformed: parquet.rows(file, malformed, groups=(wanted.begin, wanted.end)), how["fields"], "row", options, left)
        return
    is_first = wanted.begin == 0  # has the byte order mark, and the header of a table
    layout: Layout = json_records.Layout("lines")
    if how["dialect"] is not None:
        layout = tables.Dialect(**{**how["dialect"], **({} if is_first else {"has_header": False, "skipped_lines": 0})})
    lines = io.BufferedReader(_Slice(file, wanted.begin, wanted.end))
    chunks = text_of(lines, Charset(how["codec"] if is_first else "utf-8", "replace", ""))
    yield from _documents(_reads(chunks, layout, wanted.line), how["fields"], _unit(layout), options, left)


def _begin(head: bytes, name: str, options: Options) -> tuple[Charset, Layout, str]:
    """The charset, the layout and the text of the beginning of a file. Raises Unreadable."""
    is_whole = len(head) < _HEAD_BYTES
    begin = head if is_whole else head[: head.rfind(b"\n") + 1] or head.rstrip(bytes(range(128, 256)))
    charset = charset_of(io.BytesIO(begin), declared(options, begin))
    if isinstance(charset, Binary):
        raise Unreadable(refusal(charset) if head.strip() else "empty")
    text = "".join(text_of(io.BytesIO(begin), charset))
    if not text.strip():
        raise Unreadable("empty")
    is_table = extension_of(name) in TABLE_EXTENSIONS
    return charset, tables.dialect_of(text, is_whole) if is_table else json_records.layout_of(text, is_whole), text


def _unit(layout: Layout) -> str:
    """What a record is called."""
    return "row" if isinstance(layout, tables.Dialect) else "record"


def _reads(chunks: Iterator[str], layout: Layout, line: int = 1) -> Read:
    """Reads records out of chunks of text that begin with this line of the file."""
    if isinstance(layout, tables.Dialect):
        return lambda malformed: tables.rows(chunks, layout, malformed, line)
    return lambda malformed: json_records.read(chunks, layout, malformed, line)


def _first(records: Iterator[tuple[str, Any]]) -> list[Any]:
    return [value for _, (_, value) in zip(range(_SAMPLE), records)]


def _choice(sample: list[Any], options: Options) -> fields.Choice:
    """Which fields hold the text. Raises Unreadable for a file of chats."""
    if not options.text_field and mostly_conversations(sample):
        raise Unreadable(_CHATS)
    return fields.choose(sample, options.text_field)


def _whole(read: Read, names: Sequence[str], unit: str, options: Options) -> Iterator[Document]:
    """Raises Unreadable at the end where some records gave no document."""
    left = Left()
    yield from _documents(read, names, unit, options, left)
    if left.reason:
        raise Unreadable(left.reason)


def _documents(read: Read, names: Sequence[str], unit: str, options: Options, left: Left) -> Iterator[Document]:
    place_word = "line" if unit == "record" else "row"
    for place, record in read(lambda reason, place: left.damaged.add(reason, f"{place_word} {place}")):
        text = text_in(record, tuple(names))[1]
        if text is None or not text.strip():
            left.empty.add(f"{unit} without text", f"{place_word} {place}")
            continue
        told = _told(record)
        parts = parts_of(plain(text), options.separator)
        for number, part in enumerate(parts, 1):
            left.documents += 1
            yield Document(part, f"{place_word} {place}" if len(parts) == 1 else f"{place_word} {place}.{number}", **told)


def _all_texts(read: Read, unit: str) -> Iterator[Document]:
    """Raises Unreadable at the end where some records are damaged."""
    damaged = Skipped()
    for place, record in read(lambda reason, place: damaged.add(reason, f"{unit} {place}")):
        for text in _texts_in(record):
            yield Document(plain(text), f"{unit} {place}")
    if damaged.total:
        raise Unreadable(f"damaged ({'; '.join(damaged.lines()[:3])})")


def _texts_in(value: Any) -> Iterator[str]:
    """All strings of a record, at any depth, but for those that tell of it and not what it says; a list of strings as lines as well."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, list):
        yield from (text for each in value for text in _texts_in(each))
        if len(value) > 1 and all(isinstance(each, str) for each in value):
            yield "\n".join(value)
    elif isinstance(value, dict):
        yield from (text for name, each in value.items() if str(name).lower() not in _ABOUT for text in _texts_in(each))


def _told(record: Any) -> dict[str, str]:
    """What a record says of its text."""
    if not isinstance(record, dict):
        return {}
    places = [record, *(record[key] for key in _NESTED if isinstance(record.get(key), dict))]

    def value(names: tuple[str, ...]) -> str:
        found = (place.get(name) for place in places for name in names)
        return next((each.strip() for each in found if isinstance(each, str) and each.strip()), "")

    date = _ISO_DATE.match(value(_DATE))
    language = value(_LANGUAGE).lower()
    url = value(_URL)
    return {
        "url": url if "://" in url else "",
        "title": value(_TITLE),
        "date": date[0] if date else "",
        "language": language[:2] if re.fullmatch(r"[a-z]{2}(?:[-_].*)?", language) else "",
        "licence": value(_LICENCE),
    }


def _parquet(head: bytes, file: IO[bytes], options: Options) -> Iterator[Document]:
    """Parquet is sought in: a file of the disk is read where it lies, and one in an archive is held in memory."""
    if head.startswith(b"PARE"):
        raise Unreadable("encrypted (Parquet; write it without encryption)")
    source: IO[bytes] = file
    if not file.seekable():
        data = head + file.read(options.input_bytes + 1 - len(head))
        if len(data) > options.input_bytes:
            raise Unreadable(f"too large (a Parquet file of more than {size(options.input_bytes)} inside an archive; unpack it first)")
        source = io.BytesIO(data)

    def read(malformed: json_records.Malformed) -> Iterator[tuple[str, Any]]:
        source.seek(0)
        return parquet.rows(source, malformed)

    if options.every_text:
        yield from _all_texts(read, "row")
        return
    sample = _first(read(lambda reason, place: None))
    choice = _choice(sample, options)
    if not sample or not choice.fields:
        reason = choice.reason.replace("data.text_field", "--text-field") if sample else "there is no row"
        raise Unreadable(f"no text (Parquet in which {reason})")
    yield from _whole(read, choice.fields, "row", options)


def _as_code(head: bytes, file: IO[bytes], name: str, options: Options) -> Iterator[Document]:
    """Settings and the like, which are learnt as they are written."""
    data = head + file.read(options.document_bytes + 1 - len(head)) if len(head) >= _HEAD_BYTES else head
    if len(data) > options.document_bytes:
        raise Unreadable(f"too large (JSON of more than {size(options.document_bytes)} that holds no records with a text)")
    for document in code.read(data, name, options):
        yield Document(document.text, code="json", licence=document.licence, note=document.note)


class _Rejoined(io.RawIOBase):
    """A stream whose first bytes were looked at, from its beginning."""

    def __init__(self, head: bytes, rest: IO[bytes]):
        self._head = memoryview(head)
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(content) :]
        buffer[: len(content)] = content
        return len(content)


class _Slice(io.RawIOBase):
    """Bytes `begin` to `end` of a file, which is sought in."""

    def __init__(self, file: IO[bytes], begin: int, end: int):
        file.seek(begin)
        self._file = file
        self._left = end - begin

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self._file.read(min(len(buffer), self._left))
        self._left -= len(content)
        buffer[: len(content)] = content
        return len(content)
