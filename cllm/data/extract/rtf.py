"""Rich Text Format (Microsoft, specification 1.9.1): text, headings, lists and tables, in whatever charset each font is."""

import re
from dataclasses import dataclass, replace

from cllm.data.extract.decoding import plain
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.markup import table
from cllm.data.extract.options import Options

# A control word with its number and the blank that belongs to it, a byte in hexadecimal, another control symbol, a brace, or text.
_TOKEN = re.compile(rb"\\([a-zA-Z]{1,32})(-?\d{1,10})? ?|\\'([0-9a-fA-F]{2})|\\([^a-zA-Z])|([{}])|([^\\{}\r\n]+)|[\r\n]+|\\$", re.DOTALL)
_PLACES = {b"fonttbl": "fonts", b"stylesheet": "styles", b"info": "info", b"title": "title", b"footnote": "note"}
_ITEM = re.compile(r"- |\w+[.)] ")
_HIDDEN = frozenset(
    b"colortbl pict object header headerl headerr headerf footer footerl footerr footerf fldinst filetbl revtbl listtable"
    b" listoverridetable rsidtbl generator xmlnstbl themedata colorschememapping datastore latentstyles pgdsctbl private template bkmkstart bkmkend"
    b" annotation atnid atnauthor atntime atnicn atnref atndate nonshppict objdata datafield mmathPr userprops ftnsep ftnsepc aftnsep tc xe".split()
)
_WORDS = {
    b"par": "\n\n", b"sect": "\n\n", b"page": "\n\n", b"line": "\n", b"tab": "\t", b"emdash": "\u2014", b"endash": "\u2013", b"lquote": "\u2018",
    b"rquote": "\u2019", b"ldblquote": "\u201c", b"rdblquote": "\u201d", b"bullet": "\u2022", b"emspace": " ", b"enspace": " ",
}  # fmt: skip
_SYMBOLS = {b"~": "\u00a0", b"_": "-", b"-": "", b"\\": "\\", b"{": "{", b"}": "}", b"\n": "\n\n", b"\r": "\n\n"}
# Charsets of fonts, by their number in \fcharset.
_FONT_CHARSETS = {
    0: "cp1252", 77: "mac_roman", 128: "cp932", 129: "cp949", 130: "johab", 134: "gbk", 136: "cp950", 161: "cp1253", 162: "cp1254", 163: "cp1258",
    177: "cp1255", 178: "cp1256", 186: "cp1257", 204: "cp1251", 222: "cp874", 238: "cp1250", 255: "cp437",
}  # fmt: skip
_HEADING_STYLE = re.compile(r"(?:heading|\u00fcberschrift|titre|t\u00edtulo|titolo|kop)\s*([1-6])\b", re.IGNORECASE)
_GROUPS = 1000  # inside each other, from which it is no document
_PN_BULLETS = "\u2022\u00b7\u25e6\u25aa\u2013-o\uf0b7\u00a7"


def read(data: bytes, name: str, options: Options) -> list[Document]:
    parser = _Parser(data)
    is_whole = parser.run()
    text = "\n\n".join(parser.blocks)
    if not text.strip():
        raise Unreadable("empty" if is_whole else "truncated")
    return [Document(plain(text) + "\n", title=" ".join(parser.title.split()), date=parser.date, note="" if is_whole else "truncated")]


@dataclass(frozen=True)
class _State:
    """What a group inherits from the one around it."""

    place: str = "text"
    """Where text goes: "text", "marker" (the sign of a list item), "note", "title", "fonts", "styles", or "" where it is none."""
    codec: str = ""
    skip: int = 1
    """Characters that stand for one of Unicode in programs that do not know it."""
    font: int = -1
    style: int = -1


class _Parser:
    """One pass over a document. `blocks`: its paragraphs and tables as Markdown."""

    def __init__(self, data: bytes):
        self.blocks: list[str] = []
        self.title = ""
        self.date = ""
        self._data = data
        self._codec = "cp1252"  # of the document
        self._fonts: dict[int, str] = {}
        self._levels: dict[int, int] = {}  # of the styles that are headings
        self._state = _State()
        self._around: list[_State] = []
        self._bytes = bytearray()  # of text that is not decoded yet
        self._to_skip = 0
        self._text: list[str] = []  # of the paragraph
        self._marker: list[str] = []
        self._note: list[str] = []
        self._level = 0
        self._in_table = False
        self._cells: list[str] = []
        self._rows: list[list[str]] = []
        self._style_name: list[str] = []

    def run(self) -> bool:
        """Whether the document is whole."""
        place = 0
        is_destination = False  # behind a backslash and a star
        while place < len(self._data):
            found = _TOKEN.match(self._data, place)
            if found is None:
                place += 1
                continue
            place = found.end()
            word, number, code, symbol, brace, text = found.groups()
            if text is not None:
                self._take(text)
            elif code is not None:
                self._take(bytes([int(code, 16)]))
            elif brace == b"{":
                self._flush()
                if len(self._around) > _GROUPS:
                    raise Unreadable("damaged (nested too deeply)")
                self._around.append(self._state)
            elif brace == b"}":
                self._close()
                if not self._around:
                    break
            elif symbol == b"*":
                is_destination = True
                continue
            elif symbol is not None:
                self._add(_SYMBOLS.get(symbol, ""))
            elif word == b"bin":
                place += max(0, int(number or 0))
            elif word is not None:
                self._flush()
                if is_destination and word not in (b"shppict", b"pgdsc"):
                    self._state = replace(self._state, place="")
                else:
                    self._control(word, int(number) if number is not None else None)
            is_destination = False
        self._flush()
        self._end_paragraph()
        self._end_table()
        return not self._around

    def _control(self, word: bytes, number: int | None) -> None:
        value = number if number is not None else 0
        state = self._state
        if word in _WORDS:
            self._break(_WORDS[word])
        elif word == b"u":
            self._add(chr(value % 0x10000))
            self._to_skip = state.skip
        elif word == b"uc":
            self._state = replace(state, skip=max(0, min(value, 100)))
        elif word == b"f" and number is not None:
            self._state = replace(state, font=value, codec=self._fonts.get(value, ""))
        elif word == b"fcharset" and state.place == "fonts":
            self._fonts[state.font] = _FONT_CHARSETS.get(value, "")
        elif word == b"ansicpg":
            self._codec = f"cp{value}" if _is_codec(f"cp{value}") else self._codec
        elif word in (b"mac", b"pc", b"pca"):
            self._codec = {b"mac": "mac_roman", b"pc": "cp437", b"pca": "cp850"}[word]
        elif word == b"s" and number is not None:
            self._state = replace(state, style=value)
            if state.place == "text":
                self._level = self._levels.get(value, 0)
        elif word == b"outlinelevel" and state.place == "text":
            self._level = value + 1 if value < 6 else 0
        elif word == b"pard":
            self._level, self._in_table = 0, False
        elif word == b"intbl":
            self._in_table = True
        elif word in (b"cell", b"nestcell"):
            self._end_cell()
        elif word in (b"row", b"nestrow"):
            self._rows.append(self._cells)
            self._cells = []
        elif word in (b"pntext", b"listtext"):
            self._state = replace(state, place="marker")
        elif word in _PLACES and state.place != "":
            self._state = replace(state, place=_PLACES[word])
        elif (word in (b"v", b"deleted") and number != 0 and state.place == "text") or word in _HIDDEN:
            self._state = replace(state, place="")
        elif word == b"creatim":
            self._state = replace(state, place="date")
        elif state.place == "date" and word in (b"yr", b"mo", b"dy") and 0 < value < 10_000:
            self.date = f"{value:04d}" if word == b"yr" else f"{self.date}-{value:02d}"[:10]

    def _take(self, text: bytes) -> None:
        """Text as bytes, of which some may only stand for a character that was told before."""
        skipped = min(self._to_skip, len(text))
        self._to_skip -= skipped
        self._bytes += text[skipped:]

    def _flush(self) -> None:
        if self._bytes:
            content, self._bytes = bytes(self._bytes), bytearray()
            self._add(content.decode(self._state.codec or self._codec, "replace"))

    def _add(self, text: str) -> None:
        self._flush()
        place = self._state.place
        if place == "text":
            self._text.append(text)
        elif place == "marker":
            self._marker.append(text)
        elif place == "note":
            self._note.append(text)
        elif place == "title":
            self.title += text
        elif place == "styles":
            self._style_name.append(text)

    def _close(self) -> None:
        self._flush()
        if self._state.place == "styles":
            named = _HEADING_STYLE.search("".join(self._style_name))
            if named and self._state.style >= 0:
                self._levels[self._state.style] = int(named[1])
            self._style_name = []
        note = "".join(self._note).strip() if self._state.place == "note" else ""
        if self._around:
            self._state = self._around.pop()
        if note and self._state.place != "note":
            self._note = []
            self._add(f" ({note})")
        self._to_skip = 0

    def _break(self, text: str) -> None:
        if text != "\n\n":
            self._add(text)
        elif self._state.place == "note" or self._in_table:
            self._add(" ")
        elif self._state.place == "text":
            self._end_paragraph()

    def _end_paragraph(self) -> None:
        text = "".join(self._text).strip(" \n")
        marker = "".join(self._marker).strip()
        self._text, self._marker = [], []
        if not text:
            return
        self._end_table()
        if self._level:
            text = f"{'#' * self._level} {' '.join(text.split())}"
        elif marker:
            text = f"- {text}" if marker[0] in _PN_BULLETS or not marker[0].isalnum() else f"{marker} {text}"
            if self.blocks and _ITEM.match(self.blocks[-1]):
                self.blocks[-1] += f"\n{text}"
                return
        self.blocks.append(text)

    def _end_cell(self) -> None:
        self._cells.append("".join(self._text).strip())
        self._text, self._marker = [], []

    def _end_table(self) -> None:
        rows = [row for row in self._rows if any(row)]
        self._rows = []
        if rows:
            self.blocks.append(table(rows))


def _is_codec(name: str) -> bool:
    try:
        b"a".decode(name)
    except LookupError:
        return False
    return True
