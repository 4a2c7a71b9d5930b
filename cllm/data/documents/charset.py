"""Which charset a file is written in, decided from its bytes alone.

In this order: byte order mark; UTF-16 or UTF-32 without one (seen by where the zero bytes are); strict UTF-8; a charset that the file itself
declares (PEP 263, HTML, XML); UTF-8 with a few damaged places; charset-normalizer; Windows-1252. What is no text at all is `Binary`.
"""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

SNIFF_BYTES = 1 << 16
_SAMPLE_BYTES = 1 << 18
_BLOCK = 1 << 20

_MARKS = (  # the marks of UTF-32 begin like those of UTF-16, so they are tried first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MAGIC = (  # formats whose first bytes may hold no zero byte
    (b"%PDF-", "PDF"), (b"PK\x03\x04", "zip archive"), (b"\x1f\x8b", "gzip archive"), (b"BZh", "bzip2 archive"), (b"\xfd7zXZ", "xz archive"),
    (b"\x28\xb5\x2f\xfd", "zstd archive"), (b"7z\xbc\xaf", "7z archive"), (b"Rar!", "rar archive"), (b"\x89PNG", "image"), (b"\xff\xd8\xff", "image"),
    (b"GIF8", "image"), (b"\x7fELF", "program"), (b"{\\rtf", "RTF document"), (b"\xd0\xcf\x11\xe0", "Office document"), (b"SQLite", "database"),
    (b"%!PS", "PostScript"), (b"OggS", "audio"), (b"ID3", "audio"), (b"wOF2", "font"),
)  # fmt: skip
_DECLARED = (
    re.compile(rb"\A(?:#![^\n]*\n)?(?:[ \t\f]*#[^\n]*\n)?[ \t\f]*#[^\n]*?coding[:=][ \t]*([-\w.]+)"),  # PEP 263: one of the first two lines
    re.compile(rb"\A\s*<\?xml[^>]{0,200}encoding=[\"']([-\w.]+)"),
    re.compile(rb"<meta[^>]{0,200}charset=[\"']?([-\w.]+)", re.IGNORECASE),
)
# What old text is really written in, the likelier first among equals. The two with a penalty win too often on a few lines of another language.
_CANDIDATES = (
    "cp1252", "cp1250", "cp1251", "koi8_r", "cp866", "cp1253", "cp1254", "cp1255", "cp1256", "cp932", "euc_jp", "iso2022_jp", "gb18030", "big5",
    "cp949", "iso8859_2", "cp850", "cp852", "cp437", "mac_roman", "cp874", "cp1258", "cp1257",
)  # fmt: skip
_PENALTY = {"cp1257": 0.06, "cp949": 0.03}
_CONTROLS = bytes(b for b in range(32) if b not in b"\t\n\r\f\b\v\x1a\x1b") + b"\x7f"
_MULTIBYTE_START = re.compile(rb"[\xc2-\xf4][\x80-\xbf]")


class Charset(NamedTuple):
    """How to decode a file: a Python codec, what to do with bytes that do not fit it, and how it was found."""

    codec: str
    errors: str
    how: str


@dataclass(frozen=True)
class Binary:
    """Not text, and why."""

    reason: str


def detect(file: IO[bytes]) -> Charset | Binary:
    """The charset of an open file, read as a stream in blocks; the file is left at an unspecified place."""
    head = file.read(SNIFF_BYTES)
    for mark, codec in _MARKS:
        if head.startswith(mark):
            return Charset(codec, "replace", "byte order mark")
    kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), None)
    if kind:
        return Binary(f"binary ({kind})")
    if b"\0" in head:
        wide = _wide_codec(head)
        return Charset(wide, "replace", "zero bytes") if wide else Binary("binary (zero bytes)")
    if len(head.translate(None, _CONTROLS)) < 0.97 * len(head):
        return Binary("binary (control characters)")

    file.seek(0)
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for block in _blocks(file):
            if b"\0" in block:
                return Binary("binary (zero bytes)")
            decoder.decode(block)
        decoder.decode(b"", final=True)
        return Charset("utf-8", "strict", "valid UTF-8")
    except UnicodeDecodeError:
        pass
    return _legacy(file, head)


def _legacy(file: IO[bytes], head: bytes) -> Charset | Binary:
    """A text that is not valid UTF-8."""
    sample = _dense_sample(file)
    if b"\0" in sample:
        return Binary("binary (zero bytes)")
    for pattern in _DECLARED:
        found = pattern.search(head[:2048])
        if found:
            codec = found.group(1).decode("ascii")
            if _is_text_codec(codec) and _decodes(sample, codec):
                return Charset(codec.lower(), "replace", "declared in the file")
    good = len(_MULTIBYTE_START.findall(sample))
    bad = sample.decode("utf-8", "replace").count("\ufffd")
    if good >= 8 * bad:
        return Charset("utf-8", "replace", "UTF-8 with damaged places")

    codec = _likeliest(sample)
    if codec:
        return Charset(codec, "replace", "charset-normalizer")
    if len(sample.translate(None, _CONTROLS)) < len(sample):
        return Binary("binary (no known charset)")
    return Charset("cp1252", "replace", "assumed")


def _likeliest(sample: bytes) -> str | None:
    from charset_normalizer import from_bytes

    matches = from_bytes(sample, steps=8, chunk_size=1024, threshold=0.3, cp_isolation=list(_CANDIDATES))
    ranked = sorted(
        (round(match.chaos - 0.2 * match.coherence + _PENALTY.get(match.encoding, 0.0), 3), _CANDIDATES.index(match.encoding), match.encoding)
        for match in matches
        if match.encoding in _CANDIDATES
    )
    return ranked[0][2] if ranked else None


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _dense_sample(file: IO[bytes]) -> bytes:
    """The first lines that hold bytes above 127: only they tell charsets apart."""
    file.seek(0)
    lines: list[bytes] = []
    size = 0
    while size < _SAMPLE_BYTES and (line := file.readline(1 << 14)):
        if not line.isascii():
            lines.append(line)
            size += len(line)
    return b"".join(lines)


def _wide_codec(head: bytes) -> str | None:
    """utf-16 or utf-32, either byte order, when the bytes mean printable text with blanks in it and are not ASCII strings between zeros."""
    if sum(32 <= b < 127 for b in head) + head.count(0) > 0.95 * len(head):  # Latin text then: a zero in at least every other place
        if head.count(0) < 0.4 * len(head):
            return None
    for codec, width in (("utf-32-le", 4), ("utf-32-be", 4), ("utf-16-le", 2), ("utf-16-be", 2)):
        whole = head[: len(head) // width * width]
        try:
            text = codecs.getincrementaldecoder(codec)().decode(whole)
        except UnicodeDecodeError:
            continue
        printable = sum(c.isprintable() or c in "\t\n\r\f" for c in text)
        blank = sum(c in " \n\t\r\u3000" for c in text)
        if len(text) >= 4 and printable >= 0.99 * len(text) and blank >= 0.002 * len(text):
            return codec
    return None


def _is_text_codec(name: str) -> bool:
    try:
        return bool(codecs.lookup(name)._is_text_encoding)  # not rot13, zip, hex, ...
    except LookupError:
        return False


def _decodes(sample: bytes, codec: str) -> bool:
    try:
        sample.decode(codec)
    except (UnicodeError, ValueError):
        return False
    return True
