"""Zip archives, read from the disk or from memory as streams: no member is unpacked before it is asked for, and no more of it is held than a chunk.

Python's zipfile holds the whole directory in memory, refuses an archive whose end is missing, and believes that members do not overlap.
Here the directory is read as a stream; where it is missing, members are found one after the other from the beginning.
Format: PKWARE APPNOTE 6.3.10.
"""

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, Any

import numpy as np

from cllm.data.extract.compressed import Budget, Readable, Unpacked, decoded, zstd
from cllm.data.extract.document import Unreadable
from cllm.data.extract.options import MEGABYTE, Options
from cllm.data.extract.zip_cipher import deciphered
from cllm.runtime.quantities import size

_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sBBHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END_64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR_64 = struct.Struct("<4sIQI")
_BLOCK = 1 << 16
_ENCRYPTED, _STREAMED, _STRONG, _UTF8 = 0x1, 0x8, 0x40, 0x800  # flags
_MEMBER_SMALL = 16 * MEGABYTE  # to which any member may unpack, whatever its ratio
_AES = 99
_LINK = 0o120000


@dataclass(frozen=True)
class Entry:
    """A member as the directory describes it. `problem`: why it cannot be read, where that is known without reading it."""

    name: str
    method: int
    flags: int
    check: int
    packed_bytes: int
    unpacked_bytes: int
    offset: int
    time: int
    mode: int
    problem: str = ""

    @property
    def is_folder(self) -> bool:
        return self.name.endswith("/")

    @property
    def is_link(self) -> bool:
        return self.mode & 0o170000 == _LINK


class Zip:
    """An archive in a file that can seek. Iterating over it gives its entries, and raises Unreadable behind the last one that can be found."""

    def __init__(self, file: IO[bytes], budget: Budget, options: Options):
        self._file = file
        self._budget = budget
        self._options = options
        self._size = file.seek(0, 2)

    def __iter__(self) -> Iterator[Entry]:
        end = self._find_end()
        if end is None:
            yield from self._walk()
            return
        start, length, shift = end
        overlapping = self._overlapping(start, length, shift)
        for entry in self._directory(start, length, shift):
            yield replace(entry, problem="damaged (it overlaps another member)") if entry.offset in overlapping else entry

    def open(self, entry: Entry) -> Unpacked:
        """The content of a member. Raises Unreadable at once where it cannot be read at all."""
        if entry.problem:
            raise Unreadable(entry.problem)
        begin = self._begin(entry)
        packed = _slice(self._file, begin, entry.packed_bytes)
        if entry.flags & _ENCRYPTED:
            if entry.flags & _STRONG or entry.method == _AES:
                raise Unreadable("encrypted (by AES, which is not read; pack it again without a password)")
            check = entry.time >> 8 if entry.flags & _STREAMED else entry.check >> 24
            packed = deciphered(packed, check, self._options.passwords)
        if entry.method not in _METHODS:
            raise Unreadable(f"unknown type (compressed by method {entry.method} of zip; pack it again)")
        return Unpacked(self._checked(entry, _METHODS[entry.method](_Source(packed))), self._budget)

    def _checked(self, entry: Entry, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The chunks of a member, as long as they are not more than its ratio allows; at their end they must be what the directory says."""
        limit = max(self._options.ratio * entry.packed_bytes, _MEMBER_SMALL)
        done = check = 0
        for chunk in chunks:
            done += len(chunk)
            check = zlib.crc32(chunk, check)
            if done > limit:
                raise Unreadable(f"too large (a bomb: {size(entry.packed_bytes)} unpack to more than {size(limit)})")
            yield chunk
        if check != entry.check:
            raise Unreadable("encrypted by another password, or damaged" if entry.flags & _ENCRYPTED else "damaged (its checksum is wrong)")

    # -- the directory --------------------------------------------------------------------------------------------------------------

    def _find_end(self) -> tuple[int, int, int] | None:
        """(place of the directory, its length, what has to be added to every offset because something stands before the archive)."""
        tail_start = max(0, self._size - _END.size - (1 << 16))
        self._file.seek(tail_start)
        tail = self._file.read(self._size - tail_start)
        place = tail.rfind(b"PK\5\6")
        while place >= 0 and len(tail) - place < _END.size:
            place = tail.rfind(b"PK\5\6", 0, place)
        if place < 0:
            return None
        _, _, _, _, _, length, start, _ = _END.unpack_from(tail, place)
        end = tail_start + place
        if place >= _LOCATOR_64.size and tail[place - _LOCATOR_64.size :].startswith(b"PK\6\7"):
            found = self._end_64(_LOCATOR_64.unpack_from(tail, place - _LOCATOR_64.size)[2])
            if found is not None:
                return found
        shift = end - length - start
        if shift < 0 or not self._stands(start + shift, b"PK\1\2" if length else b"PK\5\6"):
            return None
        return start + shift, length, shift

    def _end_64(self, place: int) -> tuple[int, int, int] | None:
        if not 0 <= place <= self._size - _END_64.size:
            return None
        self._file.seek(place)
        fields = _END_64.unpack(self._file.read(_END_64.size))
        length, start = fields[8], fields[9]
        return (start, length, 0) if fields[0] == b"PK\6\6" and start + length <= place and self._stands(start, b"PK") else None

    def _stands(self, place: int, mark: bytes) -> bool:
        if not 0 <= place < self._size:
            return False
        self._file.seek(place)
        return self._file.read(len(mark)) == mark

    def _directory(self, start: int, length: int, shift: int) -> Iterator[Entry]:
        place, held, number = start, b"", 0
        end = start + length
        while place < end or held:
            if len(held) < _BLOCK * 4 and place < end:  # names and extra fields are at most three times 64 KiB
                self._file.seek(place)
                block = self._file.read(min(4 * _BLOCK, end - place))
                place = place + len(block) if block else end
                held += block
            if len(held) < _CENTRAL.size or not held.startswith(b"PK\1\2"):
                if held.startswith((b"PK\5\6", b"PK\6\6")) or not held:
                    return
                raise Unreadable(f"damaged (its directory ends after {number:,} members)")
            fields = _CENTRAL.unpack_from(held)
            name_size, extra_size, comment_size = fields[11:14]
            body = _CENTRAL.size + name_size
            if number >= self._options.entries:
                raise Unreadable(f"too large (more than {self._options.entries:,} members)")
            number += 1
            yield _entry(fields, held[_CENTRAL.size : body], held[body : body + extra_size], shift)
            held = held[body + extra_size + comment_size :]

    def _overlapping(self, start: int, length: int, shift: int) -> set[int]:
        """Offsets of members that reach into the next one, as in bombs that are made of one piece read many times (D. Fifield, WOOT 2019)."""
        places: list[tuple[int, int]] = []
        try:
            places.extend((entry.offset, entry.packed_bytes) for entry in self._directory(start, length, shift))
        except Unreadable:  # told when the entries are given
            pass
        table = np.array(places, dtype=np.uint64).reshape(-1, 2)
        table = table[np.argsort(table[:, 0], kind="stable")]
        ends = table[:, 0] + np.uint64(_LOCAL.size) + np.minimum(table[:, 1], np.uint64(1 << 60))
        return set(map(int, table[:-1, 0][ends[:-1] > table[1:, 0]]))

    # -- an archive without its end ---------------------------------------------------------------------------------------------------

    def _walk(self) -> Iterator[Entry]:
        """Members one after the other from the beginning, as long as they are whole."""
        place = number = 0
        if self._stands(0, b"PK00"):  # of an archive that was made to be split
            place = 4
        while True:
            self._file.seek(place)
            fields = self._file.read(_LOCAL.size)
            if len(fields) < _LOCAL.size or not fields.startswith(b"PK\3\4"):
                raise Unreadable(f"truncated (after {number:,} members)")
            _, _, flags, method, time, _, check, packed, unpacked, name_size, extra_size = _LOCAL.unpack(fields)
            name, extra = self._file.read(name_size), self._file.read(extra_size)
            packed, unpacked, _ = _sizes_64(extra, packed, unpacked, 0)
            entry = Entry(_decode_name(name, flags), method, flags, check, packed, unpacked, place, time, 0)
            begin = place + _LOCAL.size + name_size + extra_size
            if flags & _STREAMED:
                entry, begin = self._measured(entry, begin)
            else:
                begin += packed
            if begin > self._size:
                raise Unreadable(f"truncated (after {number:,} members)")
            number += 1
            yield entry
            place = begin

    def _measured(self, entry: Entry, begin: int) -> tuple[Entry, int]:
        """An entry whose sizes stand behind its content, which has to be unpacked to find its end; and the place of the next one."""
        if entry.method != zlib.DEFLATED or entry.flags & _ENCRYPTED:
            raise Unreadable("truncated (sizes of members are missing)")
        decoder = zlib.decompressobj(-15)
        self._file.seek(begin)
        place, check, held = begin, 0, b""
        while not decoder.eof:
            held = held or self._file.read(_BLOCK)
            if not held:
                raise Unreadable("truncated")
            chunk = decoder.decompress(held, 4 * _BLOCK)
            self._budget.spend(len(chunk))
            check = zlib.crc32(chunk, check)
            place += len(held) - len(decoder.unconsumed_tail) - len(decoder.unused_data)
            held = decoder.unconsumed_tail
        self._file.seek(place)
        after = self._file.read(24)
        marked = 4 if after.startswith(b"PK\7\x08") else 0
        wide = 8 if after[marked + 20 : marked + 22] == b"PK" else 0
        found = replace(entry, check=check, packed_bytes=place - begin, flags=entry.flags & ~_STREAMED)
        return found, place + marked + 12 + wide

    def _begin(self, entry: Entry) -> int:
        """Where the content of a member begins, behind its own header."""
        self._file.seek(entry.offset)
        header = self._file.read(_LOCAL.size)
        if len(header) < _LOCAL.size:
            raise Unreadable("truncated")
        if not header.startswith(b"PK\3\4"):
            raise Unreadable("damaged (it is not where the directory says)")
        *_, name_size, extra_size = _LOCAL.unpack(header)
        return entry.offset + _LOCAL.size + name_size + extra_size


def _entry(fields: tuple[Any, ...], name: bytes, extra: bytes, shift: int) -> Entry:
    flags, method, time, check = fields[4], fields[5], fields[6], fields[8]
    packed, unpacked, offset = _sizes_64(extra, fields[9], fields[10], fields[17])
    system, mode = fields[2], fields[16] >> 16
    return Entry(_decode_name(name, flags), method, flags, check, packed, unpacked, offset + shift, time, mode if system == 3 else 0)


def _sizes_64(extra: bytes, packed: int, unpacked: int, offset: int) -> tuple[int, int, int]:
    """The sizes and the offset that stand in an extra field where 32 bits are too few for them."""
    place = 0
    while place + 4 <= len(extra):
        number, length = struct.unpack_from("<HH", extra, place)
        if number == 1:
            values = [value for (value,) in struct.iter_unpack("<Q", extra[place + 4 : place + 4 + length // 8 * 8])]
            if unpacked == 0xFFFFFFFF and values:
                unpacked = values.pop(0)
            if packed == 0xFFFFFFFF and values:
                packed = values.pop(0)
            if offset == 0xFFFFFFFF and values:
                offset = values.pop(0)
        place += 4 + length
    return packed, unpacked, offset


def _decode_name(name: bytes, flags: int) -> str:
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        text = name.decode("utf-8", "replace") if flags & _UTF8 else name.decode("cp437")
    return text.replace("\\", "/")


# -- content ------------------------------------------------------------------------------------------------------------------------


class _Source:
    """Chunks as a stream, for decoders."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks = chunks

    def read(self, count: int, /) -> bytes:
        return next(self._chunks, b"")


def _slice(file: IO[bytes], begin: int, length: int) -> Iterator[bytes]:
    """A part of a file, which others may move in meanwhile."""
    end = begin + length
    while begin < end:
        file.seek(begin)
        block = file.read(min(_BLOCK, end - begin))
        if not block:
            raise Unreadable("truncated")
        begin += len(block)
        yield block


def _stored(source: Readable) -> Iterator[bytes]:
    return iter(lambda: source.read(_BLOCK), b"")


def _lzma(source: Readable) -> Iterator[bytes]:
    """A raw stream of LZMA behind a header of nine bytes."""
    head = source.read(_BLOCK)
    if len(head) < 9 or head[4] > 224:
        raise Unreadable("damaged (lzma)")
    powers, dictionary = head[4], struct.unpack_from("<I", head, 5)[0]
    settings = {"lc": powers % 9, "lp": powers // 9 % 5, "pb": powers // 45, "dict_size": max(4096, min(dictionary, 1 << 27))}
    filters = [{"id": lzma.FILTER_LZMA1, **settings}]
    rest = _Source(_then(head[9:], source))
    return decoded(rest, partial(lzma.LZMADecompressor, lzma.FORMAT_RAW, None, filters), is_single=True)


def _then(head: bytes, source: Readable) -> Iterator[bytes]:
    if head:
        yield head
    yield from _stored(source)


_METHODS: dict[int, Callable[[Readable], Iterator[bytes]]] = {
    0: _stored,
    8: partial(decoded, make=partial(zlib.decompressobj, -15), is_single=True),
    12: partial(decoded, make=bz2.BZ2Decompressor),
    14: _lzma,
    20: zstd,
    93: zstd,
    95: partial(decoded, make=partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, 1 << 28)),
}
