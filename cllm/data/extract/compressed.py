"""Compressed files as streams of bounded memory: gzip (also of many members), bzip2, xz and zstd."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from cllm.data.extract.document import Unreadable
from cllm.data.extract.options import Options
from cllm.runtime.quantities import size

_IN = 1 << 16  # compressed bytes that are read together
_ZSTD_IN = 1 << 10  # its decoder takes no limit of what comes out, and four bytes may become 128 KiB
_OUT = 1 << 18
_DICTIONARY = 1 << 27  # the most memory that a decoder may take for what it looks back at


class Readable(Protocol):
    """The one thing that is asked of a stream: the next bytes, so many or fewer, and none at its end."""

    def read(self, count: int, /) -> bytes: ...


class Budget:
    """How much one file of the disk may unpack to, at all depths together; the only defence that also holds against bombs of many small pieces."""

    def __init__(self, packed_bytes: int, options: Options):
        self._limit = min(max(options.ratio * packed_bytes, options.small_bytes), options.archive_bytes)
        self._spent = 0
        self._packed = packed_bytes

    def spend(self, num_bytes: int) -> None:
        """Raises Unreadable when that is too much; then nothing of this file is worth reading on."""
        self._spent += num_bytes
        if self._spent > self._limit:
            raise Exhausted(f"too large (a bomb: {size(self._packed)} unpack to more than {size(self._limit)})")


class Exhausted(Unreadable):
    """The budget of the whole file is spent."""


class Unpacked:
    """A stream of chunks as a file. Reading raises Unreadable("truncated") or ("damaged ...") behind the last byte that is whole.

    `failed`: whether it has.
    """

    def __init__(self, chunks: Iterator[bytes], budget: Budget):
        self.failed = False
        self._chunks = chunks
        self._budget = budget
        self._held = b""
        self._failure: Unreadable | None = None

    def read(self, count: int = -1) -> bytes:
        """So many bytes, or all; fewer only at the end, or before an error that the next call raises."""
        parts: list[bytes] = []
        size_read = 0
        while count < 0 or size_read < count:
            if not self._held and not self._advance():
                break
            part = self._held if count < 0 else self._held[: count - size_read]
            self._held = self._held[len(part) :]
            parts.append(part)
            size_read += len(part)
        if not parts and self._failure is not None and count != 0:
            self.failed = True
            raise self._failure
        return b"".join(parts)

    def _advance(self) -> bool:
        """Whether there is another chunk."""
        if self._failure is None:
            try:
                chunk = next(self._chunks, b"")
                self._budget.spend(len(chunk))
                self._held = chunk
            except Unreadable as error:
                self._failure = error
            except MemoryError:
                self._failure = Unreadable(f"out of memory (its decoder asks for more than {size(_DICTIONARY)})")
            except Exception as error:
                self._failure = Unreadable(f"damaged ({error})")
        return bool(self._held)


def unpacked(source: Readable, kind: str, budget: Budget) -> Unpacked:
    """The content of a stream that is compressed as `kind` says."""
    return Unpacked(_STREAMS[kind](source), budget)


def decoded(source: Readable, make: Callable[[], Any], is_single: bool = False) -> Iterator[bytes]:
    """What decoders make of a stream, with a bound on every chunk.

    Streams may follow each other, as in gzip, bzip2 and xz, and zero bytes may pad the end; `is_single`: only the first one is decoded.
    """
    held = source.read(_IN)
    while held:
        decoder = make()
        while not decoder.eof:
            if not held:
                held = source.read(_IN)
                if not held:
                    raise Unreadable("truncated")
            chunk = decoder.decompress(held, _OUT)
            # What a decoder of zlib has not taken it gives back; those of bz2 and lzma keep it.
            held = getattr(decoder, "unconsumed_tail", b"")
            if chunk:
                yield chunk
            while not decoder.eof and not held and not getattr(decoder, "needs_input", True):
                chunk = decoder.decompress(b"", _OUT)
                if chunk:
                    yield chunk
        if is_single:
            return
        held = (decoder.unused_data or source.read(_IN)).lstrip(b"\0")
        while held == b"" and (held := source.read(_IN)):
            held = held.lstrip(b"\0")


def _gz(source: Readable) -> Iterator[bytes]:
    return decoded(source, lambda: zlib.decompressobj(31))


def _bz2(source: Readable) -> Iterator[bytes]:
    return decoded(source, bz2.BZ2Decompressor)


def _xz(source: Readable) -> Iterator[bytes]:
    return decoded(source, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2 * _DICTIONARY))


def zstd(source: Readable) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise Unreadable("unknown type (zstd needs a library: pip install 'cllm[data]')") from None
    machine = zstandard.ZstdDecompressor(max_window_size=_DICTIONARY)
    held = source.read(_ZSTD_IN)
    while held:
        decoder = machine.decompressobj()
        while not decoder.eof:
            if not held:
                held = source.read(_ZSTD_IN)
                if not held:
                    raise Unreadable("truncated")
            chunk = decoder.decompress(held)
            held = b""
            for begin in range(0, len(chunk), _OUT):
                yield chunk[begin : begin + _OUT]
        held = decoder.unused_data or source.read(_ZSTD_IN)


_STREAMS: dict[str, Callable[[Readable], Iterator[bytes]]] = {"gz": _gz, "bz2": _bz2, "xz": _xz, "zst": zstd}
