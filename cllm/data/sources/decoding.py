"""Takes off the compression of a body that a server has sent, in bounded memory: a few kilobytes can say "a hundred gigabytes of zeros"."""

from __future__ import annotations

import io
import zlib

ACCEPTED = "gzip, deflate, br, zstd"
_MAX_LAYERS = 2
_MAX_MEMBERS = 10_000  # of one gzip stream
_WINDOW = 8 << 20  # bytes a decoder of zstd has to keep at most (RFC 9659)
_STEP = 1 << 16


class Undecodable(Exception):
    """A body that gives no bytes: damaged, or in an encoding that was not asked for."""


class TooLarge(Exception):
    """A body that is larger than was allowed once it is unpacked."""


def decode(body: bytes, encoding: str, limit: int) -> bytes:
    """The content of a body with this Content-Encoding. Raises TooLarge above `limit` bytes, before more than that is held, and Undecodable.

    What follows the end of the compressed data is left out, as browsers do.
    """
    layers = [one.strip().lower() for one in encoding.split(",") if one.strip()]
    layers = [one for one in layers if one != "identity"]
    if len(layers) > _MAX_LAYERS:
        raise Undecodable(f"it is compressed {len(layers)} times over")
    for layer in reversed(layers):
        if not body:  # the answer to a request whose content is empty, or a server that forgot to leave the header out
            return b""
        body = _decoded(body, layer, limit)
    if len(body) > limit:
        raise TooLarge
    return body


def _decoded(body: bytes, layer: str, limit: int) -> bytes:
    try:
        if layer in ("gzip", "x-gzip"):
            return _gunzip(body, limit)
        if layer == "deflate":
            # Half of all servers leave out the wrapper of RFC 1950.
            wrapped = body[0] & 15 == 8 and len(body) > 1 and (body[0] << 8 | body[1]) % 31 == 0
            return _inflated(body, 0, zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS, limit)[0]
        if layer == "br":
            return _unbrotli(body, limit)
        if layer == "zstd":
            return _unzstd(body, limit)
    except zlib.error as error:
        raise Undecodable(f"its {layer} data is damaged") from error
    raise Undecodable("its Content-Encoding is not one that was asked for")


def _gunzip(body: bytes, limit: int) -> bytes:
    """All members of a gzip stream (RFC 1952), one after the other."""
    pieces: list[bytes] = []
    place = 0
    for _ in range(_MAX_MEMBERS):
        piece, place = _inflated(body, place, 16 + zlib.MAX_WBITS, limit)
        limit -= len(piece)
        pieces.append(piece)
        if body[place : place + 2] != b"\x1f\x8b":
            return b"".join(pieces)
    raise Undecodable(f"its gzip data has more than {_MAX_MEMBERS:,} members")


def _inflated(body: bytes, place: int, wbits: int, limit: int) -> tuple[bytes, int]:
    """One stream of zlib that begins at `place`, and where it ends."""
    inflater, pieces = zlib.decompressobj(wbits=wbits), []
    while not inflater.eof:
        step = body[place : place + _STEP]
        piece = inflater.decompress(step, limit + 1)
        used = len(step) - len(inflater.unconsumed_tail) - len(inflater.unused_data)
        if not piece and not used:
            raise Undecodable("its compressed data ends too early")
        place += used
        limit = _less(limit, piece)
        pieces.append(piece)
    return b"".join(pieces), place


def _unbrotli(body: bytes, limit: int) -> bytes:
    import brotli

    decoder, pieces, rest = brotli.Decompressor(), [], body
    try:
        while not decoder.is_finished():
            piece = decoder.process(rest, output_buffer_limit=min(limit + 1, _STEP))
            if not piece and not rest:
                raise Undecodable("its compressed data ends too early")
            rest = b""
            limit = _less(limit, piece)
            pieces.append(piece)
    except brotli.error as error:
        raise Undecodable("its br data is damaged") from error
    return b"".join(pieces)


def _unzstd(body: bytes, limit: int) -> bytes:
    import zstandard

    pieces = []
    try:
        with zstandard.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(io.BytesIO(body), read_across_frames=True) as reader:
            while piece := reader.read(_STEP):
                limit = _less(limit, piece)
                pieces.append(piece)
    except zstandard.ZstdError as error:
        raise Undecodable("its zstd data is damaged") from error
    return b"".join(pieces)


def _less(limit: int, piece: bytes) -> int:
    if len(piece) > limit:
        raise TooLarge
    return limit - len(piece)
