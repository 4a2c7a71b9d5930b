"""The lines of a page of a PDF with their places, out of PDFium's characters."""

import ctypes
import re
from dataclasses import dataclass
from typing import Any

_FIXED = re.compile(r"mono|courier|consol|typewriter|cmtt|menlo|(?:^|[^a-z])code", re.IGNORECASE)
_BOLD = re.compile(r"bold|black|heavy|semibold|demi", re.IGNORECASE)
_MOST_CHARACTERS = 200_000  # of a page
_SOFT_HYPHENS = ("\u00ad", "\ufffe", "\x02")
SOFT_HYPHEN = "\u00ad"
_LIGATURES = {"\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl", "\ufb05": "st", "\ufb06": "st", "\u00a0": " "}
_GAP = 2.2  # widths of a letter, in sizes of the font, that separate columns


@dataclass
class Line:
    """A run of text on one baseline. Points from the lower left corner of the page; `size` is the height of its letters' boxes."""

    text: str
    left: float
    right: float
    base: float
    size: float
    fixed: bool = False
    bold: bool = False


def lines_of(page: Any) -> list[Line]:
    """The lines of a page in the order of the file; what stands far apart on one baseline is two. Raises PdfiumError."""
    import pypdfium2.raw as pdfium

    text_page = page.get_textpage()
    try:
        return _Reader(text_page.raw, pdfium).lines(min(text_page.count_chars(), _MOST_CHARACTERS))
    finally:
        text_page.close()


class _Reader:
    def __init__(self, raw: Any, pdfium: Any) -> None:
        self._raw, self._pdfium = raw, pdfium
        self._x, self._y = ctypes.c_double(), ctypes.c_double()
        self._box = pdfium.FS_RECTF()
        self._name = ctypes.create_string_buffer(128)
        self._flags = ctypes.c_int()

    def lines(self, count: int) -> list[Line]:
        unicode_of, origin_of = self._pdfium.FPDFText_GetUnicode, self._pdfium.FPDFText_GetCharOrigin
        raw, x, y = self._raw, self._x, self._y
        found: list[Line] = []
        pieces: list[str] = []
        first = last = -1  # the characters that are seen, of the line so far
        base = edge = size = 0.0

        def end_line() -> None:
            nonlocal first
            text = "".join(pieces).strip()
            pieces.clear()
            if text and first >= 0:
                found.append(self._line(text, first, last, base, size))
            first = -1

        for index in range(count):
            character = chr(unicode_of(raw, index) & 0x1FFFFF) if unicode_of(raw, index) <= 0x10FFFF else "\ufffd"
            if character in "\r\n":
                end_line()
                continue
            if character.isspace():
                pieces.append(" ")
                continue
            if character in _SOFT_HYPHENS:
                pieces.append(SOFT_HYPHEN)
                continue
            if ord(character) < 32 or 0xD800 <= ord(character) < 0xE000:
                continue
            origin_of(raw, index, x, y)
            if first >= 0 and (abs(y.value - base) > 0.6 * size or not -0.5 * size < x.value - edge < _GAP * size):
                end_line()
            if first < 0:
                first, base = index, y.value
                size = self._height(index)
                edge = x.value
            last = index
            # The width of a letter costs a call more; where the next one begins shows it as well, and a wide gap shows all the same.
            edge = x.value + 0.5 * size
            pieces.append(_LIGATURES.get(character, character))
        end_line()
        return found

    def _height(self, index: int) -> float:
        if not self._pdfium.FPDFText_GetLooseCharBox(self._raw, index, self._box):
            return 1.0
        return max(1.0, abs(self._box.top - self._box.bottom))

    def _line(self, text: str, first: int, last: int, base: float, size: float) -> Line:
        self._pdfium.FPDFText_GetLooseCharBox(self._raw, first, self._box)
        left = self._box.left
        self._pdfium.FPDFText_GetLooseCharBox(self._raw, last, self._box)
        right = max(left, self._box.right)
        fonts = [self._font(index) for index in sorted({first, (first + last) // 2, last})]
        fixed, bold = (all(pattern.search(font) for font in fonts) for pattern in (_FIXED, _BOLD))
        return Line(text, left, right, base, size, fixed, bold)

    def _font(self, index: int) -> str:
        length = self._pdfium.FPDFText_GetFontInfo(self._raw, index, self._name, len(self._name), self._flags)
        return self._name.raw[: max(0, min(length, len(self._name)) - 1)].decode("utf-8", "replace")
