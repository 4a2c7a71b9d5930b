"""Files that hold no text that can be read: says what they are, and what would help."""

import re

from cllm.data.documents.charset import Binary, decode
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.kinds import extension_of
from cllm.data.extract.options import Options

_OFFICE = {".doc": "Word", ".dot": "Word", ".xls": "Excel", ".ppt": "PowerPoint", ".pps": "PowerPoint"}
_FORMATS = (
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "7z archive; unpack it first"),
    (re.compile(rb"Rar!\x1a\x07"), "rar archive; unpack it first"),
    (re.compile(rb"MSCF\0\0\0\0"), "cabinet archive; unpack it first"),
    (re.compile(rb"\x04\x22\x4d\x18"), "lz4 file; unpack it first"),
    (re.compile(rb"!<arch>\n"), "ar archive or Debian package; unpack it first"),
    (re.compile(rb"\x7fELF|MZ|\xfe\xed\xfa[\xce\xcf]|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe|\0asm"), "program"),
    (re.compile(rb"SQLite format 3"), "database"),
    (re.compile(rb"OggS|ID3|fLaC|\xff[\xfb\xf3\xf2]|RIFF....WAVE|FORM....AIFF", re.DOTALL), "sound"),
    (re.compile(rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI |\0\0\x01[\xba\xb3]|FLV\x01", re.DOTALL), "film"),
    (re.compile(rb"wOF[F2]|\0\x01\0\0\0|OTTO|ttcf"), "font"),
    (re.compile(rb"BM....\0\0\0\0|8BPS|\0\0[\x01\x02]\0..|AT&TFORM", re.DOTALL), "image in a format that is not read; save it as PNG"),
    (re.compile(rb"%!PS"), "PostScript; convert it to PDF, as with ps2pdf"),
    (re.compile(rb"\x80[\x02-\x05]"), "pickled Python objects, which are never loaded"),
    (re.compile(rb"\x93NUMPY|\x89HDF|GGUF"), "numbers"),
)


def read(data: bytes, name: str, options: Options) -> list[Document]:
    """Always raises Unreadable."""
    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise Unreadable(_ole(data, name))
    for pattern, what in _FORMATS:
        if pattern.match(data):
            raise Unreadable(f"unknown type ({what})")
    if not data.strip(b"\0"):
        raise Unreadable("empty (nothing but zero bytes)" if data else "empty")
    found = decode(data[: 1 << 16])
    raise Unreadable(f"unknown type ({found.reason if isinstance(found, Binary) else 'binary'})")


def _ole(data: bytes, name: str) -> str:
    """Office documents before 2007, and newer ones that a password locks, which are in the same container."""
    if "EncryptedPackage".encode("utf-16-le") in data:
        return "encrypted (an Office document with a password; save it without one)"
    program = _OFFICE.get(extension_of(name))
    if program:
        return f"unknown type (a {program} document from before 2007; save it in the format of today, {extension_of(name)}x)"
    return "unknown type (a document of an old Office program)"
