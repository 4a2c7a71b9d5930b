"""The text of a file of records. One that was put together from several sources may hold lines in several charsets.

A file is decoded as a whole where it is UTF-8, UTF-16 or UTF-32; otherwise each line by itself, as UTF-8 where it is valid UTF-8 and in the charset
of the others where it is not.
"""

import io
from collections.abc import Iterator
from typing import IO

from cllm.data.documents.charset import AUTO, Binary, Charset, detect, is_utf8

_BLOCK = 1 << 20
_UNCUT = 1 << 24  # bytes of a line without a place where it may be cut
_SAMPLE = 1 << 18  # bytes of the lines that are not UTF-8
_MIXED = "lines that are not UTF-8"  # Charset.how of a file with lines of both kinds
_DOUBLE_BYTE = frozenset({"gb18030", "gbk", "gb2312", "big5", "cp932", "shift_jis", "euc_jp", "cp949", "euc_kr"})


def charset_of(file: IO[bytes], encoding: str = AUTO) -> Charset | Binary:
    """How to decode an open file of records, line by line where it is not in one charset. `encoding`: see `charset.examine`."""
    found = detect(file, encoding)
    file.seek(0)
    if isinstance(found, Binary):
        head = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")
        # One zero byte among the lines damages one record. What else looks like a file of another format is one.
        return Charset("utf-8", "replace", "JSON with damaged places") if head[:1] in (b"{", b"[") else found
    if found.errors == "strict" or found.codec.startswith(("utf-8-", "utf-16", "utf-32")):
        return found
    return _line_charset(file, found, encoding)


def is_plain_utf8(charset: Charset) -> bool:
    """Whether all of a file is read as UTF-8, so that what stands behind a line end means the same without what stands before it."""
    return charset.codec in ("utf-8", "utf-8-sig") and charset.how != _MIXED


def _line_charset(file: IO[bytes], whole: Charset, encoding: str) -> Charset:
    """The charset of the lines that are not UTF-8, and whether there are others that are."""
    sample: list[bytes] = []
    size, some_utf8 = 0, False
    while size < _SAMPLE and (line := file.readline(1 << 16)):
        if line.isascii():
            continue
        if is_utf8(line):
            some_utf8 = some_utf8 or len(line) - len(line.decode("utf-8")) >= 8  # a few bytes of another charset may pass for UTF-8
        else:
            sample.append(line)
            size += len(line)
    if not some_utf8 and whole.codec != "utf-8":
        return whole
    found = detect(io.BytesIO(b"".join(sample)), encoding)
    return Charset("utf-8", "replace", _MIXED) if isinstance(found, Binary) else Charset(found.codec, "replace", _MIXED, found.guess)


def text_of(file: IO[bytes], charset: Charset) -> Iterator[str]:
    """The text of an open file of records in chunks, its line ends as newlines."""
    if charset.codec.startswith("utf"):
        errors = "replace" if charset.errors == "strict" else charset.errors
        if charset.how != _MIXED:
            text = io.TextIOWrapper(file, encoding=charset.codec, errors=errors, newline=None)
            while chunk := text.read(_BLOCK):
                yield chunk
            return
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    for block in _cut_blocks(file):
        yield newlines.decode(_decoded(block, charset))
    yield newlines.decode("", final=True)


def _cut_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """Blocks that end with a line, or where a line is long behind a byte that is no part of a character in any charset."""
    rest = b""
    while block := file.read(_BLOCK):
        rest += block
        cut = rest.rfind(b"\n") + 1 or max(map(rest.rfind, (b'"', b",", b" "))) + 1
        if cut or len(rest) >= _UNCUT:
            yield rest[: cut or len(rest)]
            rest = rest[cut or len(rest) :]
    if rest:
        yield rest


def _decoded(block: bytes, charset: Charset) -> str:
    if block.isascii():
        return block.decode("ascii")
    return "".join(_decoded_line(line, charset) for line in block.splitlines(keepends=True))


def _decoded_line(line: bytes, charset: Charset) -> str:
    if not is_utf8(line):
        return line.decode(charset.codec, "replace")
    if charset.how != _MIXED and charset.codec in _DOUBLE_BYTE and not line.isascii():
        try:
            return line.decode(charset.codec)  # two or three Chinese characters may happen to be valid UTF-8
        except UnicodeDecodeError:
            pass
    return line.decode("utf-8")
