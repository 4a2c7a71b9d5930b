"""The newest pages of a crawl, as a person reads them: title and plain text, out of the end of its newest WARC file."""

from __future__ import annotations

import html
import re
import string
import zlib
from dataclasses import dataclass
from pathlib import Path

from cllm.app.readers.inside import problem

_END = 4 << 20  # bytes of the end of a segment, which hold the newest pages
_MEMBER = b"\x1f\x8b\x08"
_MOST_RECORD = 4 << 20  # bytes of a record that are unpacked
_MOST_MARKUP = 256 << 10  # bytes of a page that a text is made of
TEXT = 4_000  # characters that are shown
_TITLE = re.compile(rb"<title[^>]{0,500}>([^<]{0,2000})", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]{0,2000}>")
_BREAK = re.compile(r"<(?:/?(?:p|div|br|li|h[1-6]|tr|section|article|ul|ol|pre|table|blockquote)\b)[^<>]{0,2000}>", re.IGNORECASE)
_SMALL = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)  # other small letters may be longer, and places would not fit
_CHARSET = re.compile(rb"charset=[\"']?([A-Za-z0-9_-]{1,40})", re.IGNORECASE)


@dataclass(frozen=True)
class Page:
    """title and text are plain text, the text at most TEXT characters; bytes: of the whole answer."""

    url: str
    title: str
    text: str
    bytes: int


def newest_pages(folder: Path, root: Path, count: int) -> list[Page]:
    """The last pages that were stored below `folder`, the newest first. What is damaged is passed over."""
    found: list[Page] = []
    segments = sorted([*folder.glob("*.warc.gz"), *folder.glob("*.warc.gz.open")], key=lambda each: each.name.partition(".")[0])
    for segment in reversed(segments[-2:]):
        if problem(segment, root) is None:
            found += _pages(segment, count - len(found))
        if len(found) >= count:
            break
    return found


def _pages(segment: Path, count: int) -> list[Page]:
    try:
        with open(segment, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _END))
            content = file.read(_END)
    except OSError:
        return []
    found: list[Page] = []
    made_from = ""
    end = len(content)
    while len(found) < count and (begin := content.rfind(_MEMBER, 0, end)) >= 0:
        fields, rest = _record(content[begin : begin + _END])
        identity = fields.get("warc-record-id", "")
        if fields.get("warc-type") == "conversion" or (fields.get("warc-type") == "response" and identity != made_from):
            found.append(_page(fields, rest))
        made_from = fields.get("warc-refers-to", "") or made_from
        end = begin
    return found


def _record(member: bytes) -> tuple[dict[str, str], bytes]:
    """Fields and block of the record that begins here; both empty where there is none, as where the magic number stands inside packed bytes."""
    unpacker = zlib.decompressobj(31)
    try:
        record = unpacker.decompress(member, _MOST_RECORD)
    except zlib.error:
        return {}, b""
    head, _, rest = record.partition(b"\r\n\r\n")
    return (_fields(head), rest) if head.startswith(b"WARC/1.") else ({}, b"")


def _page(fields: dict[str, str], rest: bytes) -> Page:
    """The page in the block of a record: an answer of HTTP, or what the scripts of the page have made of it."""
    is_answer = fields["warc-type"] == "response"
    answer, end, body = rest.partition(b"\r\n\r\n") if is_answer else (b"", b"", rest)
    length = fields.get("content-length", "")
    size = int(length) - len(answer + end) if length.isascii() and length.isdigit() and len(length) < 16 else len(body)
    kind = (_fields(answer) if is_answer else fields).get("content-type", "")
    title, text = _readable(body[:_MOST_MARKUP], kind)
    return Page(fields.get("warc-target-uri", "")[:2_000], title, text, max(0, size))


def _fields(head: bytes) -> dict[str, str]:
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:100])
    return {name.strip().lower().decode("latin-1"): value.strip().decode("latin-1")[:4_000] for name, _, value in lines}


def _readable(body: bytes, kind: str) -> tuple[str, str]:
    declared = _CHARSET.search(kind.encode("latin-1", "replace")) or _CHARSET.search(body[:2_000])
    charset = declared[1].decode("ascii") if declared else "utf-8"
    try:
        text = body.decode(charset, "replace")
    except (LookupError, ValueError):
        text = body.decode("utf-8", "replace")
    if "html" not in kind.lower():
        return "", _shortened(text) if kind.lower().startswith("text/") or "json" in kind.lower() or "xml" in kind.lower() else ""
    found = _TITLE.search(body)
    title = (
        " ".join(html.unescape(found[1].decode(charset if declared else "utf-8", "replace")).split())[:300] if found and _is_known(charset) else ""
    )
    for name in ("title", "script", "style", "template", "svg"):
        text = _without(text, name)
    return title, _shortened(html.unescape(_TAG.sub(" ", _BREAK.sub("\n", text))))


def _is_known(charset: str) -> bool:
    try:
        return "".encode(charset) == b"".decode(charset).encode(charset)
    except (LookupError, ValueError):
        return False


def _without(text: str, name: str) -> str:
    """A text of HTML without these elements. One pass, whatever is open or closed."""
    small, parts, place = text.translate(_SMALL), [], 0
    while (begin := small.find(f"<{name}", place)) >= 0:
        parts.append(text[place:begin])
        end = small.find(f"</{name}", begin)
        if end < 0:
            return " ".join(parts)
        place = end + len(name) + 3
    return " ".join([*parts, text[place:]])


def _shortened(text: str) -> str:
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return "\n".join(line for line in lines if line)[:TEXT]
