"""Pages on disk: WARC segments, which are written at their end only and never change once they are sealed.

    pages/000000.warc.gz          sealed: whole, for any reader
    pages/000001.warc.gz.open     being written

The frontier's database says which segment is open and how many of its bytes count. A record is on the disk before the database says so; what a killed
crawl wrote beyond that number is cut off when the next one starts, and its pages are fetched again. So each page is in exactly one place.

Format: ISO 28500 (WARC 1.1), one gzip member per record, so that a reader can begin at any record. Bodies are kept without their transfer
and content codings, as Common Crawl keeps them.
"""

from __future__ import annotations

import os
import uuid
import zlib
from base64 import b32encode
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import sha1
from pathlib import Path

from cllm.files import DATA, Wording, reported
from cllm.runtime.errors import DataError
from cllm.runtime.files import flush

SEGMENT_BYTES = 64 << 20  # a segment of this size is sealed
SEGMENT_SECONDS = 300.0  # and so is one that was begun so long ago, for those who read along
_LEVEL = 3  # of gzip: twice the speed of the usual 6 for a tenth more bytes
_CODINGS = {b"content-encoding", b"transfer-encoding", b"content-length", b"connection", b"keep-alive"}
_DISK = Wording(DATA.error, "another folder with --out", "Pages that were stored are whole.")


def response_record(url: str, date: float, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bytes:
    """A page as one gzip member. `date`: seconds since 1970; `headers`: of the answer, as they came; `body`: decoded."""
    kept = [(name, value) for name, value in headers if name.lower() not in _CODINGS]
    kept.append((b"Content-Length", b"%d" % len(body)))
    block = _head(status, kept) + body
    digests = [("WARC-Payload-Digest", _sha1(body)), ("WARC-Block-Digest", _sha1(block))]
    return _record("response", url, date, "application/http;msgtype=response", block, digests)


def revisit_record(url: str, date: float, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes, same_as: str) -> bytes:
    """A page whose bytes are those of another address, `same_as`: a record without a body that points to it."""
    kept = [(name, value) for name, value in headers if name.lower() not in _CODINGS]
    fields = [
        ("WARC-Profile", "http://netpreserve.org/warc/1.1/revisit/identical-payload-digest"),
        ("WARC-Refers-To-Target-URI", _ascii(same_as)),
        ("WARC-Payload-Digest", _sha1(body)),
    ]
    return _record("revisit", url, date, "application/http;msgtype=response", _head(status, kept), fields)


def conversion_record(url: str, date: float, page: bytes) -> bytes:
    """A page after its scripts have run, as HTML in UTF-8; it belongs to the response of the same address and date."""
    fields = [("WARC-Refers-To", _identity("response", _moment(date), url)), ("WARC-Block-Digest", _sha1(page))]
    return _record("conversion", url, date, "text/html; charset=utf-8", page, fields)


def info_record(number: int, date: float, software: str) -> bytes:
    """The first record of a segment: who wrote it."""
    block = f"software: {software}\r\nformat: WARC File Format 1.1\r\nrobots: obeyed\r\n".encode()
    return _record("warcinfo", f"{number:06d}.warc.gz", date, "application/warc-fields", block, [])


def _head(status: int, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    clean = (name + b": " + value.replace(b"\r", b" ").replace(b"\n", b" ") for name, value in headers if name and not set(name) & set(b"\r\n:"))
    return b"HTTP/1.1 %d\r\n" % status + b"".join(line + b"\r\n" for line in clean) + b"\r\n"


def _record(kind: str, url: str, date: float, content_type: str, block: bytes, more: list[tuple[str, str]]) -> bytes:
    when = _moment(date)
    target = ("WARC-Filename", url) if kind == "warcinfo" else ("WARC-Target-URI", _ascii(url))
    fields = [
        ("WARC-Type", kind),
        ("WARC-Record-ID", _identity(kind, when, url)),
        ("WARC-Date", when),
        target,
        *more,
        ("Content-Type", content_type),
        ("Content-Length", str(len(block))),
    ]
    head = "WARC/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields) + "\r\n"
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)
    return packer.compress(head.encode() + block + b"\r\n\r\n") + packer.flush()


def _moment(date: float) -> str:
    return datetime.fromtimestamp(date, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _identity(kind: str, when: str, url: str) -> str:
    return f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{kind} {when} {url}')}>"


def _ascii(url: str) -> str:
    """A URL in a header: no byte of it may end the line."""
    return "".join(each if "!" <= each <= "~" else "".join(f"%{byte:02X}" for byte in each.encode("utf-8", "replace")) for each in url)


def _sha1(content: bytes) -> str:
    return "sha1:" + b32encode(sha1(content, usedforsecurity=False).digest()).decode()


class Store:
    """The segments of a crawl folder, of which one process writes.

    number, committed: the segment that is open, and how many of its bytes the database counts. Bytes beyond them are cut off. Raises DataError where
    bytes that count are gone.
    """

    def __init__(self, folder: Path, number: int, committed: int, sealed: Sequence[tuple[int, int]] = ()) -> None:
        self.folder, self.number = folder, number
        with reported(folder, _DISK):
            folder.mkdir(parents=True, exist_ok=True)
            for each, size in sealed:  # killed between the database's word and the renaming
                if self.open_path(each).exists():
                    self._finish(each, size)
            for path in folder.glob("*.warc.gz.open"):
                if path != self.open_path(number):
                    path.unlink()
            path = self.open_path(number)
            if committed and (not path.exists() or path.stat().st_size < committed):
                raise DataError(
                    f"{path} should hold {committed:,} bytes of pages, and {'is shorter' if path.exists() else 'is not there'}. "
                    "Put it back, or begin a new crawl with another --out; the sealed segments beside it are whole."
                )
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)
            self._file.truncate(committed)
            flush(folder)
        self.size = committed

    def open_path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.warc.gz.open"

    def sealed_path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.warc.gz"

    def append(self, records: Sequence[bytes]) -> None:
        """Returns when the records are on the disk. What a failed write has added is taken back. Raises DataError."""
        with reported(self.open_path(self.number), _DISK, sum(map(len, records))):
            try:
                left = memoryview(b"".join(records))
                while left:
                    left = left[self._file.write(left) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(self.size)
                raise
        self.size += sum(map(len, records))

    def next_segment(self) -> None:
        """Seals the open segment and begins another. The database has committed both before."""
        with reported(self.folder, _DISK):
            self._file.close()
            self._finish(self.number, self.size)
            self.number, self.size = self.number + 1, 0
            self._file = open(self.open_path(self.number), "ab", buffering=0)  # noqa: SIM115

    def _finish(self, number: int, size: int) -> None:
        os.truncate(self.open_path(number), size)
        flush(self.open_path(number))
        os.replace(self.open_path(number), self.sealed_path(number))
        flush(self.folder)

    def close(self) -> None:
        """An open segment without a record leaves no file."""
        self._file.close()
        if not self.size:
            self.open_path(self.number).unlink(missing_ok=True)
