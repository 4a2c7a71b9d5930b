"""WARC files (ISO 28500): the pages that a crawl has stored, of this crawler or of another. Records come one after the other."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from cllm.data.extract.compressed import Budget, Readable
from cllm.data.extract.document import Unreadable
from cllm.data.extract.options import MEGABYTE, Options
from cllm.runtime.printable import printable
from cllm.runtime.quantities import size

_HEADER_BYTES = 1 << 16
_LINE = re.compile(rb"\r?\n")
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]*\r?\n")
_STATUS = re.compile(rb"HTTP/\d(?:\.\d)? (\d{3})\b")


@dataclass(frozen=True)
class Page:
    """A page, or why a record is none. `content_type` is what the server said. `same_as`: the address whose stored bytes the server gave again; such
    a page has no body."""

    part: str
    url: str = ""
    date: str = ""
    content_type: str = ""
    body: bytes = b""
    problem: str = ""
    same_as: str = ""


def pages(stream: Readable, options: Options, budget: Budget) -> Iterator[Page]:
    """The pages of all records that hold one. Raises Unreadable behind the last whole record where the file is damaged or ends in the middle.

    A page that was made from the answer in the record before it, as by a browser that ran its scripts, takes its place.
    """
    before, held = "", None
    try:
        for identity, made_from, page in _records(stream, options, budget):
            if held is not None and not (made_from and made_from == before and not page.problem):
                yield held
            before, held = identity, page
    except Unreadable:
        if held is not None:
            yield held
        raise
    if held is not None:
        yield held


def _records(stream: Readable, options: Options, budget: Budget) -> Iterator[tuple[str, str, Page]]:
    """Of each record with a page its name, the name of the one that it was converted from, and the page."""
    source = _Lines(stream)
    number = 0
    while True:
        header = _header(source)
        if header is None:
            return
        number += 1
        part = f"record {number}"
        length = header.get("content-length", "")
        if not length.isdecimal():
            raise Unreadable(f"damaged ({part} has no length)")
        kind = header.get("warc-type", "")
        url, date = header.get("warc-target-uri", "").strip("<>"), header.get("warc-date", "")
        same_as = header.get("warc-refers-to-target-uri", "").strip("<>")
        identity = header.get("warc-record-id", "")
        made_from = header.get("warc-refers-to", "") if kind == "conversion" else ""
        if kind == "revisit" and same_as not in ("", url):
            yield identity, "", Page(part, printable(url), date, same_as=printable(same_as))
        if kind not in ("response", "resource", "conversion") or url.startswith(("dns:", "filedesc:")):
            source.skip(int(length))
            continue
        told = Page(part, printable(url), date, header.get("content-type", ""))
        if int(length) > options.input_bytes:
            source.skip(int(length))
            yield identity, made_from, Page(part, told.url, problem=f"too large (more than {size(options.input_bytes)})")
            continue
        content = source.exactly(int(length))
        yield identity, made_from, _response(told, content, budget) if kind == "response" else _page(told, content)


def _page(told: Page, body: bytes) -> Page:
    if not body.strip():
        return Page(told.part, told.url, problem="empty")
    return Page(told.part, told.url, told.date, told.content_type, body)


def _response(told: Page, content: bytes, budget: Budget) -> Page:
    """The page in an answer of HTTP, as the server sent it."""
    head, _, body = _split(content)
    status = _STATUS.match(head)
    if status is None:
        return (
            _page(told, content) if not told.content_type.startswith("application/http") else Page(told.part, told.url, problem="damaged (no HTTP)")
        )
    if status[1] not in (b"200", b"203"):
        return Page(told.part, told.url, problem=f"no page (the server answered with status {status[1].decode()})")
    fields = _fields(head)
    page = Page(told.part, told.url, told.date, fields.get("content-type", ""))
    try:
        if fields.get("transfer-encoding", "").lower() == "chunked" and _CHUNK.match(body):
            body = _joined(body)
        for coding in reversed(fields.get("content-encoding", "").lower().replace(" ", "").split(",")):
            body = _unpacked(body, coding, budget)
    except Unreadable as error:
        return Page(told.part, told.url, problem=str(error))
    return _page(page, body)


def _split(content: bytes) -> tuple[bytes, bytes, bytes]:
    found = re.search(rb"\r?\n\r?\n", content[:_HEADER_BYTES])
    return (content[: found.start()], found[0], content[found.end() :]) if found else (content[:_HEADER_BYTES], b"", b"")


def _joined(body: bytes) -> bytes:
    """The chunks of a chunked body; crawlers differ in whether they store it so."""
    parts = []
    place = 0
    while found := _CHUNK.match(body, place):
        length = int(found[1], 16)
        if not length:
            break
        parts.append(body[found.end() : found.end() + length])
        place = found.end() + length
        place += 2 if body[place : place + 2] == b"\r\n" else 1
    return b"".join(parts)


def _unpacked(body: bytes, coding: str, budget: Budget) -> bytes:
    """A body behind a content coding; some crawlers store it unpacked and keep the header, which the first bytes tell."""
    if coding in ("gzip", "x-gzip") and body.startswith(b"\x1f\x8b"):
        return _inflated(body, 31, budget)
    if coding == "deflate":
        return _inflated(body, 15 if body[:1] == b"\x78" else -15, budget)
    return body


def _inflated(body: bytes, window: int, budget: Budget) -> bytes:
    decoder = zlib.decompressobj(window)
    parts = []
    try:
        while body and not decoder.eof:
            parts.append(decoder.decompress(body, MEGABYTE))
            budget.spend(len(parts[-1]))
            body = decoder.unconsumed_tail
    except zlib.error as error:
        if not parts:
            raise Unreadable(f"damaged ({error})") from None
    return b"".join(parts)


# -- records ------------------------------------------------------------------------------------------------------------------------


class _Lines:
    """A stream that is read by lines and by lengths."""

    def __init__(self, stream: Readable):
        self._stream = stream
        self._held = b""

    def line(self) -> bytes | None:
        """Without its end; None at the end of the stream."""
        while True:
            found = _LINE.search(self._held)
            if found:
                line, self._held = self._held[: found.start()], self._held[found.end() :]
                return line
            if len(self._held) > _HEADER_BYTES:
                raise Unreadable("damaged (a header without an end)")
            more = self._stream.read(_HEADER_BYTES)
            if not more:
                if self._held.strip():
                    raise Unreadable("truncated")
                return None
            self._held += more

    def exactly(self, count: int) -> bytes:
        parts = [self._held[:count]]
        self._held = self._held[count:]
        left = count - len(parts[0])
        while left:
            piece = self._stream.read(min(left, MEGABYTE))
            if not piece:
                raise Unreadable("truncated")
            parts.append(piece)
            left -= len(piece)
        return b"".join(parts)

    def skip(self, count: int) -> None:
        while count:
            count -= len(self.exactly(min(count, MEGABYTE)))


def _header(source: _Lines) -> dict[str, str] | None:
    """The fields of the next record, by their names in small letters; None behind the last record."""
    line = source.line()
    while line == b"":
        line = source.line()
    if line is None:
        return None
    if not line.startswith(b"WARC/"):
        raise Unreadable("damaged (no record where one should begin)")
    lines = []
    while line:
        line = source.line()
        if line is None:
            raise Unreadable("truncated")
        lines.append(line)
        if len(lines) > 1000:
            raise Unreadable("damaged (a header without an end)")
    return _fields(b"\n".join([b"", *lines]))


def _fields(header: bytes) -> dict[str, str]:
    """All lines behind the first one."""
    fields: dict[str, str] = {}
    for line in _LINE.split(header)[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            fields.setdefault(name.strip().lower().decode("latin-1"), value.strip().decode("utf-8", "replace"))
    return fields
