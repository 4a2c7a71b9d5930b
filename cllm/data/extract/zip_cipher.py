"""The old cipher of zip (PKWARE, APPNOTE 6.1), which most archives with a password use. It is weak, and slow in Python: about 2 MB a second."""

import zlib
from collections.abc import Iterator, Sequence

from cllm.data.extract.document import Unreadable

_HEADER = 12  # random bytes before the content, of which the last one is known


def deciphered(chunks: Iterator[bytes], check: int, passwords: Sequence[str]) -> Iterator[bytes]:
    """The content behind the cipher. check: what the last byte of its header must be. Raises Unreadable where no password fits."""
    if not passwords:
        raise Unreadable("encrypted (give its password)")
    held = b""
    while len(held) < _HEADER:
        piece = next(chunks, b"")
        if not piece:
            raise Unreadable("truncated")
        held += piece
    for password in passwords:
        for encoding in dict.fromkeys(("utf-8", "cp437")):
            try:
                keys = _Keys(password.encode(encoding))
            except UnicodeEncodeError:
                continue
            if keys.decipher(held[:_HEADER])[-1] == check:
                return _rest(keys, held[_HEADER:], chunks)
    raise Unreadable("encrypted (none of the given passwords opens it)")


def _rest(keys: "_Keys", held: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    if held:
        yield keys.decipher(held)
    for chunk in chunks:
        yield keys.decipher(chunk)


_TABLE = [zlib.crc32(bytes([byte]), 0xFFFFFFFF) ^ 0xFFFFFFFF for byte in range(256)]  # of CRC-32, a byte at a time


class _Keys:
    def __init__(self, password: bytes):
        self._keys = 0x12345678, 0x23456789, 0x34567890
        for byte in password:
            self._keys = _next_keys(*self._keys, byte)

    def decipher(self, content: bytes) -> bytes:
        key0, key1, key2 = self._keys
        plain = bytearray()
        for byte in content:
            mask = key2 | 2
            byte ^= (mask * (mask ^ 1) >> 8) & 0xFF
            key0, key1, key2 = _next_keys(key0, key1, key2, byte)
            plain.append(byte)
        self._keys = key0, key1, key2
        return bytes(plain)


def _next_keys(key0: int, key1: int, key2: int, byte: int) -> tuple[int, int, int]:
    key0 = (key0 >> 8) ^ _TABLE[(key0 ^ byte) & 0xFF]
    key1 = ((key1 + (key0 & 0xFF)) * 134775813 + 1) & 0xFFFFFFFF
    return key0, key1, (key2 >> 8) ^ _TABLE[(key2 ^ key1 >> 24) & 0xFF]
