"""JSON in every layout, tables of text and Parquet as `cllm train` reads them (documents/records.py), here as streams: a document for each record.

Fields with usual names beside the text tell its title, address, date, language and licence.
"""

import io
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

from cllm.data.documents import fields, json_records, parquet, tables
from cllm.data.documents.charset import Binary
from cllm.data.documents.chat_forms import mostly_conversations
from cllm.data.documents.files import Skipped
from cllm.data.documents.record_text import charset_of, text_of
from cllm.data.documents.records import TABLE_EXTENSIONS
from cllm.data.documents.scan import are_texts, parts_of, text_in
from cllm.data.extract import code
from cllm.data.extract.decoding import declared, plain, refusal
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.kinds import extension_of
from cllm.data.extract.options import Options
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


def stream(file: IO[bytes], name: str, options: Options) -> Iterator[Document]:
    """Documents are told by the line that their record begins in, those of Parquet by the number of their row."""
    head = file.read(_HEAD_BYTES)
    if head.startswith(b"PAR"):
        yield from _parquet(head, file, options)
        return
    is_whole = len(head) < _HEAD_BYTES
    begin = head if is_whole else head[: head.rfind(b"\n") + 1] or head.rstrip(bytes(range(128, 256)))
    charset = charset_of(io.BytesIO(begin), declared(options, begin))
    if isinstance(charset, Binary):
        raise Unreadable(refusal(charset) if head.strip() else "empty")
    text = "".join(text_of(io.BytesIO(begin), charset))
    if not text.strip():
        raise Unreadable("empty")
    extension = extension_of(name)
    unit, kind, reads = _layout(text, is_whole, extension)
    whole = io.BufferedReader(_Rejoined(head, file))
    if options.every_text:
        yield from _all_texts(reads(text_of(whole, charset)), unit)
        return
    sample = _first(reads(iter([text]))(lambda reason, place: None))
    if not options.text_field and mostly_conversations(sample):
        raise Unreadable(_CHATS)
    choice = fields.choose(sample, options.text_field)
    if extension == ".json" and (not choice.fields or not are_texts(sample, choice.fields)):
        yield from _as_code(head, file, name, options)
        return
    if sample and not choice.fields:
        raise Unreadable(f"no text ({kind} in which {choice.reason.replace('data.text_field', '--text-field')})")
    yield from _documents(reads(text_of(whole, charset)), choice.fields, unit, options)


def _layout(text: str, is_whole: bool, extension: str) -> tuple[str, str, Callable[[Iterator[str]], Read]]:
    """What a record and a file are called, and a function that reads records out of chunks of text."""
    if extension in TABLE_EXTENSIONS:
        dialect = tables.dialect_of(text, is_whole)
        return "row", "a table", lambda chunks: lambda malformed: tables.rows(chunks, dialect, malformed)
    layout = json_records.layout_of(text, is_whole)
    return "record", "JSON", lambda chunks: lambda malformed: json_records.read(chunks, layout, malformed)


def _first(records: Iterator[tuple[str, Any]]) -> list[Any]:
    return [value for _, (_, value) in zip(range(_SAMPLE), records)]


def _documents(read: Read, names: tuple[str, ...], unit: str, options: Options) -> Iterator[Document]:
    """Raises Unreadable at the end where some records gave no document: damaged before empty ones."""
    damaged, empty = Skipped(), Skipped()
    count = 0
    place_word = "line" if unit == "record" else "row"
    for place, record in read(lambda reason, place: damaged.add(reason, f"{place_word} {place}")):
        text = text_in(record, names)[1]
        if text is None or not text.strip():
            empty.add(f"{unit} without text", f"{place_word} {place}")
            continue
        told = _told(record)
        parts = parts_of(plain(text), options.separator)
        for number, part in enumerate(parts, 1):
            count += 1
            yield Document(part, f"{place_word} {place}" if len(parts) == 1 else f"{place_word} {place}.{number}", **told)
    if damaged.total:
        raise Unreadable(f"damaged ({'; '.join(damaged.lines()[:3])})")
    if empty.total:
        raise Unreadable(f"empty ({'; '.join(empty.lines()[:3])})")
    if not count:
        raise Unreadable("empty")


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
    if not options.text_field and mostly_conversations(sample):
        raise Unreadable(_CHATS)
    choice = fields.choose(sample, options.text_field)
    if not sample or not choice.fields:
        reason = choice.reason.replace("data.text_field", "--text-field") if sample else "there is no row"
        raise Unreadable(f"no text (Parquet in which {reason})")
    yield from _documents(read, choice.fields, "row", options)


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
