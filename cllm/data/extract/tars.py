"""Tar archives as streams: members come one after the other and are never sought.

Python's tarfile takes single headers apart here, but does not walk the archive: it reads an extended header of any length into memory.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

from cllm.data.extract.compressed import Readable
from cllm.data.extract.document import Unreadable
from cllm.data.extract.options import MEGABYTE, Options
from cllm.runtime.quantities import counted

_BLOCK = 512
_HEADER_BYTES = MEGABYTE  # of an extended header; real ones are a few hundred
_PIECE = 1 << 18
_PAX = re.compile(rb"(\d{1,8}) ([^=\n]{1,200})=")
_SPECIAL = {
    tarfile.SYMTYPE: "link (not followed)",
    tarfile.LNKTYPE: "link (to another member)",
    tarfile.CHRTYPE: "special file (a device)",
    tarfile.BLKTYPE: "special file (a device)",
    tarfile.FIFOTYPE: "special file (a pipe)",
    tarfile.GNUTYPE_SPARSE: "unknown type (a sparse file; pack it again without holes)",
}
_FOLDERS = (tarfile.DIRTYPE, b"D")
_REMARKS = (b"V", b"M", b"N")  # a label of the volume, and what only old programs write


class Part:
    """The content of one member of a stream. `failed`: whether the stream gave out or broke inside of it."""

    def __init__(self, source: Readable, size: int):
        self.failed = False
        self.size = size
        self._source = source
        self._left = size

    def read(self, count: int = -1, /) -> bytes:
        """So many bytes or all that is left; Unreadable where the archive ends before."""
        wanted = self._left if count < 0 else min(count, self._left)
        if not wanted:
            return b""
        try:
            content = self._source.read(wanted)
            if not content:
                raise Unreadable("truncated")
        except Unreadable:
            self.failed = True
            raise
        self._left -= len(content)
        return content

    def skip(self) -> None:
        """Passes what nobody has read."""
        while self.read(_PIECE):
            pass


@dataclass(frozen=True)
class Entry:
    """A member. `problem`: why it has no content; such members, and folders, have an empty one."""

    name: str
    content: Part
    problem: str = ""


def entries(source: Readable, options: Options) -> Iterator[Entry]:
    """The members of an archive that are no folders, in order; the content of one must be read before the next is taken, or is passed over.

    Raises Unreadable behind the last one where the archive is damaged or ends in the middle. A damaged header costs the member that it describes.
    """
    number = damaged = 0
    extended: dict[str, str] = {}
    common: dict[str, str] = {}
    while True:
        block = _exactly(source, _BLOCK)
        if len(block) < _BLOCK:
            raise Unreadable(f"truncated (after {number:,} members)")
        if not any(block):
            break
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            if header.size < 0:
                raise tarfile.ReadError("a size below zero")
        except (tarfile.TarError, ValueError):
            damaged += 1
            if damaged == 1 and number == 0:
                raise Unreadable("damaged (its first header)") from None
            continue  # block by block to the next header that is whole
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
            values = _pax(_header_content(source, header.size))
            (common if header.type == tarfile.XGLTYPE else extended).update(values)
            continue
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            text = _header_content(source, header.size).rstrip(b"\0").decode("utf-8", "replace")
            if header.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = text
            continue
        told = {**common, **extended}
        extended = {}
        number += 1
        if number > options.entries:
            raise Unreadable(f"too large (more than {options.entries:,} members)")
        entry = _entry(source, header, told)
        size = entry.content.size
        if header.type not in _FOLDERS + _REMARKS and not entry.name.endswith("/"):
            yield entry
        entry.content.skip()
        Part(source, -size % _BLOCK).skip()
    if damaged:
        raise Unreadable(f"damaged ({counted(damaged, 'block')} between its members passed over)")


def _entry(source: Readable, header: tarfile.TarInfo, told: dict[str, str]) -> Entry:
    """A member with what extended headers say of it. Links and devices have no content, whatever size their header names."""
    name = _readable(told.get("path", header.name))
    size = int(told["size"]) if told.get("size", "").isdecimal() and len(told["size"]) < 20 else header.size
    problem = _SPECIAL.get(header.type, "")
    if any(key.startswith("GNU.sparse.") for key in told):
        problem = _SPECIAL[tarfile.GNUTYPE_SPARSE]
    has_content = header.type not in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, *_FOLDERS)
    return Entry(name, Part(source, size if has_content else 0), problem)


def _readable(name: str) -> str:
    """Names in other charsets than UTF-8 are taken for Latin-1."""
    raw = name.encode("utf-8", "surrogateescape")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _header_content(source: Readable, size: int) -> bytes:
    if size > _HEADER_BYTES:
        raise Unreadable("damaged (a header of more than a megabyte)")
    content = _exactly(source, size)
    Part(source, -size % _BLOCK).skip()
    return content


def _exactly(source: Readable, count: int) -> bytes:
    """So many bytes; fewer at the end."""
    content = source.read(count)
    while content and len(content) < count:
        more = source.read(count - len(content))
        if not more:
            break
        content += more
    return content


def _pax(content: bytes) -> dict[str, str]:
    """The records "length key=value\\n" of an extended header, as far as they are whole."""
    values: dict[str, str] = {}
    place = 0
    while found := _PAX.match(content, place):
        end = place + int(found[1])
        if end <= found.end() or end > len(content):
            break
        values[found[2].decode("utf-8", "replace")] = content[found.end() : end - 1].decode("utf-8", "replace")
        place = end
    return values
