"""Which charset a file is written in, decided from its bytes.

In this order: byte order mark; UTF-32 or UTF-16 without one; the escape sequences of ISO-2022 and HZ; strict UTF-8; a charset that the file itself
declares (PEP 263, HTML, XML); lines in UTF-8 among lines in another charset; UTF-8 with a few damaged places. These are certain, but for what that
other charset is. Everything else is weighed by its letters (see guess.py): charsets of two bytes a character with enough of them are certain as
well, all others are a guess, better made for all files of a folder together. What is no text at all is `Binary`.
"""

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, NamedTuple

import numpy as np

from cllm.data.documents.guess import DOUBLE_BYTE, WIDE, Evidence, weigh
from cllm.data.documents.languages import BREAK, CONTROL, DAMAGE, IDEOGRAPHIC, SPACE, characters, codes
from cllm.data.documents.mixed import mixed_with
from cllm.runtime.errors import UserError

AUTO = "auto"  # the name that asks for the charset to be decided
DAMAGED, GIVEN, MISFIT = "UTF-8 with damaged places", "data.encoding", "data.encoding, which does not fit"  # of Charset.how
SNIFF_BYTES = 1 << 16
_SAMPLE_BYTES = 1 << 16
_PIECE = 1 << 12  # bytes of a line that are looked at together
_BLOCK = 1 << 20

_MARKS = (  # the marks of UTF-32 begin like those of UTF-16, so they are tried first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (b"\x84\x31\x95\x33", "gb18030"),
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
# What declared names are taken for as well, as all browsers do (WHATWG, Encoding Standard, "names and labels").
_WIDER = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874", "gb2312": "gb18030",
    "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs",
}  # fmt: skip
# Terminals are sent ESC ( B as well; only a sequence that calls up a set of two bytes a character tells of ISO 2022.
_ISO_2022 = re.compile(rb"\x1b\$[()]?[@-Z]")
_C1 = re.compile(r"[\x80-\x9f]")  # controls that no text has
_HZ = re.compile(rb"~\{(?:[!-w][!-~])+~\}")
_ESCAPED = ("iso2022_jp", "iso2022_jp_2", "iso2022_jp_ext", "iso2022_jp_2004", "iso2022_kr")
_CONTROLS = bytes(b for b in range(1, 32) if b not in b"\t\n\r\f\b\v\x1a\x1b") + b"\x7f"
_MULTIBYTE_START = re.compile(rb"[\xc2-\xf4][\x80-\xbf]")
_FEW = 3  # zero bytes or control characters that a text of any length may hold
_WIDE_SAMPLE = 4096
_WIDE_LEAD = 6.0  # nats by which UTF-16 must be likelier than everything else


class Charset(NamedTuple):
    """How to decode a file: a Python codec, what to do with bytes that do not fit it, how it was found, and whether that was a guess."""

    codec: str
    errors: str
    how: str
    guess: bool = False


@dataclass(frozen=True)
class Binary:
    """Not text, and why."""

    reason: str


def detect(file: IO[bytes], encoding: str = AUTO) -> Charset | Binary:
    """The charset of an open file, which is read to its end in blocks, from its own bytes alone. `encoding`: see `examine`."""
    found = examine(blocks(file), encoding)
    return guessed(found.alone()) if isinstance(found, Evidence) else found


def examine(content: Iterable[bytes], encoding: str = AUTO) -> Charset | Binary | Evidence:
    """The charset of a file given in blocks, or the evidence for it where only the letters can tell, which `guess.pool` decides on.

    encoding: a codec for files that are not certainly Unicode (see `check_encoding`). A byte order mark and valid UTF-8 win over it.
    """
    look = _Look()
    for block in content:
        look.add(block)
    look.end()
    return _given(look, encoding) if encoding != AUTO else _decide(look)


def guessed(codec: str) -> Charset:
    return Charset(codec, "replace", "its letters", guess=True)


def decode(content: bytes, encoding: str = AUTO) -> tuple[str, Charset] | Binary:
    """A whole file as text, without its byte order mark, and how it was decoded."""
    charset = detect(io.BytesIO(content), encoding)
    return charset if isinstance(charset, Binary) else (content.decode(charset.codec, charset.errors).removeprefix("\ufeff"), charset)


def check_encoding(name: str) -> str:
    """The name of a codec as Python writes it, or "auto"; UserError for one that Python does not know."""
    if name.lower() == AUTO:
        return AUTO
    try:
        if not _is_text_codec(name):
            raise LookupError
        codecs.getincrementaldecoder(name)("replace").decode(b"text", final=True)  # some, as idna, cannot put anything in place of what is wrong
    except (LookupError, UnicodeError):
        raise UserError(
            f"data.encoding must be auto or the name of a charset that Python knows, got {name!r}. Use a value like cp1252, koi8_r or gb18030."
        ) from None
    return codecs.lookup(name).name


def labelled(name: str, content: bytes) -> str | None:
    """The codec of text whose sender declares a charset; None where Python does not know it, or where the text is plainly in another one."""
    try:
        codec = _taken_for(check_encoding(name), content)
    except UserError:
        return None
    text = _decoded(content, codec)
    damaged = text.count("\ufffd")
    others = sum(character > "\x7f" for character in text) - damaged if damaged else 0
    return codec if damaged * (1 if codec == "utf-8" else 8) <= others else None


def _taken_for(codec: str, content: bytes) -> str:
    """The declared codec, or the wider one that goes by its name where the text has characters that only that one has."""
    wider = _WIDER.get(codecs.lookup(codec).name)
    if wider and (not _decodes(content, codec) or _C1.search(_decoded(content, codec))) and _decodes(content, wider):
        return wider
    return codec


def blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def example(file: IO[bytes], charset: Charset, size: int = 60) -> str:
    """A piece of one line of a file, decoded, around its first word with a letter outside ASCII; empty when there is none."""
    look = _Look(sample_bytes=_PIECE)
    for block in blocks(file):
        look.add(block)
        if look.has_sample:
            break
    look.end()
    sample = look.sample
    if charset.guess:  # lines in UTF-8 among others are read as UTF-8 in records
        sample = b"".join(line for line in sample.splitlines(keepends=True) if not is_utf8(line)) or sample
    for line in sample.decode(charset.codec, "replace").splitlines():
        word = re.search(r"[^\W\d_]*[^\W\d_\x00-\x7f][^\W\d_]*", line)
        if word:
            middle = (word.start() + word.end()) // 2
            first, last = max(0, middle - size // 2), middle + size // 2
            piece = "".join(character if character.isprintable() else " " for character in line[first:last])
            return f"{'... ' if first else ''}{' '.join(piece.split())}{' ...' if last < len(line) else ''}"
    return ""


class _Look:
    """What one pass over a file shows, in bounded memory."""

    def __init__(self, sample_bytes: int = _SAMPLE_BYTES) -> None:
        self.head = b""
        self.size = self.controls = self.zeros = self.zero_runs = 0
        self.utf8 = True
        self.ascii = True
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._lines: list[bytes] = []  # that tell something about the charset
        self._sampled, self._sample_bytes = 0, sample_bytes
        self._rest = b""  # the begin of a line

    def add(self, block: bytes) -> None:
        if len(self.head) < SNIFF_BYTES:
            self.head += block[: SNIFF_BYTES - len(self.head)]
        self.size += len(block)
        self.controls += len(block) - len(block.translate(None, _CONTROLS))
        zeros = block.count(0)
        if zeros:
            self.zeros += zeros
            self.zero_runs += len(re.findall(rb"\0+", block))
        self.ascii = self.ascii and block.isascii()
        if self.utf8:
            try:
                self._utf8.decode(block)
            except UnicodeDecodeError:
                self.utf8 = False
        if not self.has_sample:
            self._take_lines(block)

    def end(self) -> None:
        if self.utf8:
            try:
                self._utf8.decode(b"", final=True)
            except UnicodeDecodeError:
                self.utf8 = False
        self._keep(self._rest)
        self._rest = b""

    @property
    def has_sample(self) -> bool:
        return self._sampled >= self._sample_bytes

    @property
    def sample(self) -> bytes:
        """The first lines with bytes above 127, or with the escape sequences of charsets of seven bits: only they tell charsets apart."""
        return b"".join(self._lines)

    def _take_lines(self, block: bytes) -> None:
        content = self._rest + block
        if not _tells(content):
            self._rest = content[content.rfind(b"\n") + 1 :][-_PIECE:]
            return
        lines = content.splitlines(keepends=True)
        self._rest = b"" if lines[-1].endswith(b"\n") or len(lines[-1]) >= _PIECE else lines.pop()
        for line in lines:
            self._keep(line)

    def _keep(self, line: bytes) -> None:
        for start in range(0, len(line), _PIECE):  # a file may be one line
            piece = line[start : start + _PIECE]
            if _tells(piece) and not self.has_sample:
                self._lines.append(piece)
                self._sampled += len(piece)


def _tells(line: bytes) -> bool:
    return not line.isascii() or b"\x1b$" in line or b"~{" in line


def _given(look: _Look, encoding: str) -> Charset | Binary:
    """The charset when the user has named one."""
    found = _marked(look) or _magic(look)
    if found:
        return found
    wide = encoding.startswith(("utf-16", "utf-32"))
    if look.utf8 and (not look.ascii or (wide and not look.zeros)):
        return Charset("utf-8", "strict", "valid UTF-8")
    if not _is_text(_decoded(look.head, encoding)):
        return Binary(f"binary (no text in {encoding})")
    return Charset(encoding, "replace", GIVEN if _decodes(look.sample, encoding) else MISFIT)


def _decide(look: _Look) -> Charset | Binary | Evidence:
    found = _marked(look) or _magic(look) or _escaped(look) or _wide(look) or _controls(look)
    if found:
        return found
    if look.utf8:
        return Charset("utf-8", "strict", "valid UTF-8")
    sample = look.sample
    found = _declared(look.head, sample)
    if found:
        return found
    found = _mixed(sample)
    if found:
        return found
    good = len(_MULTIBYTE_START.findall(sample))
    bad = sample.decode("utf-8", "replace").count("\ufffd")
    if good >= 8 * bad:
        return Charset("utf-8", "replace", DAMAGED)
    evidence = weigh(sample)
    if not evidence.is_text():
        return Binary("binary (no known charset)")
    certain = evidence.certain()
    return Charset(certain, "replace", "two bytes a character") if certain else evidence


def _marked(look: _Look) -> Charset | Binary | None:
    for mark, codec in _MARKS:
        if look.head.startswith(mark):
            is_text = _decodes(look.head, codec) or _is_text(_decoded(look.head, codec))
            return Charset(codec, "replace", "byte order mark") if is_text else Binary("binary (control characters)")
    return None


def _magic(look: _Look) -> Binary | None:
    kind = next((kind for magic, kind in _MAGIC if look.head.startswith(magic)), None)
    return Binary(f"binary ({kind})") if kind else None


def _escaped(look: _Look) -> Charset | None:
    """ISO 2022 and HZ: text of seven bits in which sequences of ASCII call up another set of characters."""
    if not look.ascii:
        return None
    sample = look.sample
    if _ISO_2022.search(sample):
        order = sorted(_ESCAPED, key=lambda codec: (codec == "iso2022_kr") != (b"\x1b$)C" in sample))
        codec = next((codec for codec in order if _decodes(look.head, codec) and _decodes(sample, codec)), None)
        return Charset(codec or "iso2022_jp_ext", "replace", "escape sequences")
    if _HZ.search(sample) and _decodes(sample, "hz"):
        return Charset("hz", "replace", "escape sequences")
    return None


def _wide(look: _Look) -> Charset | None:
    """UTF-32 or UTF-16 without a byte order mark, in either byte order."""
    if look.utf8 and not look.zeros and not look.controls:
        return None
    head = look.head[:_WIDE_SAMPLE]
    if len(head) >= 40 and _is_zero_separated(head):
        return None
    wide = weigh(head, [codec for codec in WIDE if codec.startswith("utf-16") or _decodes(head, codec)], plain_word=1.0)
    codec = wide.alone()
    if not _is_wide_text(_decoded(head, codec), -wide.best) or not _is_text(_decoded(look.head, codec)):
        return None
    narrow = weigh(head, plain_word=1.0)
    return Charset(codec, "replace", "several bytes a character") if wide.best - narrow.best > _WIDE_LEAD else None


def _is_wide_text(text: str, nats: float) -> bool:
    """Whether text in UTF-16 or UTF-32 is more than numbers that happen to be letters. Ideographs are rarer than letters and need no blanks."""
    kinds = characters().kind[codes(text)]
    if 2 * np.isin(kinds, IDEOGRAPHIC).sum() > len(text):
        return nats < 11 * len(text) + 3
    same_low_byte = sum(ord(character) & 0xFF == 0 for character in text)  # numbers below 256 in the other byte order
    blanks = int(np.isin(kinds, (SPACE, BREAK)).sum())
    spaced = len(text) < 16 or 50 * blanks >= len(text)
    return nats < (7 if spaced else 4.5) * len(text) + 3 and 5 * same_low_byte <= len(text)


def _is_zero_separated(head: bytes) -> bool:
    """Strings of ASCII with zero bytes between. UTF-16 of Latin letters has more zeros, of other scripts many bytes that are not printable."""
    printable, blank, zeros = (len(head) - len(head.translate(None, each)) for each in (bytes(range(32, 127)), b"\t\n\r", b"\0"))
    return printable + blank + zeros == len(head) and blank < 0.2 * len(head) and 0 < zeros < 0.4 * len(head)


def _controls(look: _Look) -> Binary | None:
    """A book with a stray zero byte is a book; a log that a crash has padded with zeros is a log; a table of numbers is no text."""
    if look.zero_runs > _FEW + look.size / 2000 or 2 * look.zeros > look.size:
        return Binary("binary (zero bytes)")
    if look.controls > _FEW + 0.03 * look.size or 2 * look.controls > look.size:
        return Binary("binary (control characters)")
    return None


def _declared(head: bytes, sample: bytes) -> Charset | None:
    for pattern in _DECLARED:
        found = pattern.search(head[:2048])
        if found:
            name = found.group(1).decode("ascii").lower()
            codec = _taken_for(name, sample) if _is_text_codec(name) else ""
            if codec and _decodes(sample, codec):
                return Charset(codec, "replace", "declared in the file")
    return None


def _mixed(sample: bytes) -> Charset | None:
    """Lines in UTF-8 among lines in a charset of one byte a character."""
    lines: dict[bool, list[bytes]] = {True: [], False: []}  # by whether they are UTF-8
    for line in sample.splitlines():
        lines[is_utf8(line)].append(line)
    others = b"\n".join(lines[False])
    in_utf8 = sum(len(line) - len(line.decode("utf-8")) for line in lines[True])
    not_utf8 = others.decode("utf-8", "replace").count("\ufffd")
    # Letters of another charset happen to be UTF-8 now and then, and what is in UTF-8 may be damaged.
    if in_utf8 < 4 or 20 * in_utf8 < not_utf8 or not_utf8 < 2 or 4 * len(_MULTIBYTE_START.findall(others)) > not_utf8:
        return None
    evidence = weigh(others)
    codec = evidence.alone()
    if codec in WIDE or codec in DOUBLE_BYTE or not evidence.is_text():
        return None
    return Charset(mixed_with(codec), "replace", "lines in two charsets", guess=True)


def is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decoded(head: bytes, codec: str) -> str:
    try:
        return codecs.getincrementaldecoder(codec)("replace").decode(head).removeprefix("\ufeff")
    except UnicodeError:  # some codecs cannot replace everything
        return "\ufffd" * len(head)


def _is_text(text: str) -> bool:
    """Whether characters that no text has (controls, code points without a character, damage) are few."""
    kinds = characters().kind[codes(text)]
    return int(((kinds == CONTROL) | (kinds == DAMAGE)).sum()) <= _FEW + 0.05 * len(text)


def _is_text_codec(name: str) -> bool:
    try:
        return bool(codecs.lookup(name)._is_text_encoding)  # not rot13, zip, hex, ...
    except (LookupError, ValueError):
        return False


def _decodes(sample: bytes, codec: str) -> bool:
    """Whether all bytes fit; a character at the end may be cut off."""
    try:
        codecs.getincrementaldecoder(codec)().decode(sample)
    except (UnicodeError, ValueError):
        return False
    return True
