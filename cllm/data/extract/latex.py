r"""LaTeX sources as Markdown: headings, lists, tables, quotes and code; formulas stay as they are between dollars.

Commands that print nothing are left out with their arguments, those that only change how a text looks leave the text, and macros that a document
defines without conditions are put in. What \input and the like would bring in is another file, and is read as that.
"""

import re
import unicodedata

from cllm.data.extract.decoding import text_of
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.latex_commands import ACCENTS, DROPPED, HEADINGS, SECOND_IS_TEXT, SIGNS, STYLES
from cllm.data.extract.licences import licence_of
from cllm.data.extract.markup import fenced, table
from cllm.data.extract.options import Options

_MATH = frozenset(["equation", "align", "gather", "multline", "eqnarray", "displaymath", "alignat", "flalign", "math", "split", "dmath"])
_VERBATIM = frozenset(["verbatim", "lstlisting", "minted", "Verbatim", "alltt", "BVerbatim"])
_UNREAD = frozenset(["comment", "tikzpicture", "pgfpicture", "picture", "filecontents", "thebibliography", "CCSXML"])
_TABLES = frozenset(["tabular", "tabularx", "tabulary", "longtable", "array"])
_PRINTED: tuple[tuple[str, str], ...] = (("``", "\u201c"), ("''", "\u201d"), ("`", "\u2018"), ("---", "\u2014"), ("--", "\u2013"), ("~", " "))
_COMMENT = re.compile(r"(?<!\\)((?:\\\\)*)%[^\n]*(?:\n[ \t]*)?")
_TOKEN = re.compile(r"\\([a-zA-Z@]+)\*?[ \t]*\n?|\\(.)|(\$\$?)|([{}])|([^\\${}]+)", re.DOTALL)
_MACRO = re.compile(r"\\(?:re|provide)?newcommand\*?\s*\{?\s*\\([a-zA-Z]+)\s*\}?\s*(?:\[(\d)\])?\s*\{|\\def\s*\\([a-zA-Z]+)\s*\{")
_INCLUDED = re.compile(r"\\begin\{(verbatim|lstlisting|minted|Verbatim|alltt)\*?\}(?:\[[^\]]*\])?(?:\{([^}]*)\})?\n?(.*?)\\end\{\1\*?\}", re.DOTALL)
_ITEM = re.compile(r"\s*(?:- |\d+\. |\0)")
_DEPTH = 100
_GROWTH = 4  # times the size of the file to which its own macros may grow it


def read(data: bytes, name: str, options: Options) -> list[Document]:
    source, note = text_of(data, options)
    converter = _Converter(source)
    text = converter.convert()
    if not text.strip():
        raise Unreadable("empty (LaTeX that prints no text)")
    return [Document(text, title=converter.title, date=converter.date, licence=licence_of(source), note=note)]


class _Converter:
    """One document. `title` and `date` are what its preamble says."""

    def __init__(self, source: str):
        self._verbatim: list[str] = []
        source = _COMMENT.sub(r"\1", _INCLUDED.sub(self._set_aside, source))
        self.title = re.sub(r"[*`]", "", self._told(source, "title"))
        date = re.search(r"\d{4}(?:-\d\d){0,2}", self._told(source, "date"))
        self.date = date[0] if date else ""
        begin, end = source.find("\\begin{document}"), source.rfind("\\end{document}")
        body = source[begin + len("\\begin{document}") : end if end > begin else len(source)] if begin >= 0 else source
        self._source = _expanded(body, _macros(source))

    def convert(self) -> str:
        text = self._text(self._source, 0)
        text = re.sub(r"[ \t]+([.,;:!?)])", r"\1", text)
        blocks = [_tidy(block) for block in re.split(r"\n[ \t]*\n\s*", text)]
        whole = "\n\n".join(block for block in blocks if block.strip())
        if self.title and whole:
            whole = f"# {self.title}\n\n{whole}"
        whole = re.sub("\0(\\d+)\0", lambda found: self._verbatim[int(found[1])], whole)
        return f"{whole}\n" if whole.strip() else ""

    def _set_aside(self, found: re.Match[str]) -> str:
        self._verbatim.append(fenced(found[3].rstrip("\n"), found[2] if found[1] == "minted" else ""))
        return f"\n\n\0{len(self._verbatim) - 1}\0\n\n"

    def _told(self, source: str, command: str) -> str:
        found = re.search(rf"\\{command}\s*(?=[\[{{])", source)
        return " ".join(self._text(_argument(source, found.end())[0], 1).split()) if found else ""

    def _text(self, source: str, depth: int) -> str:
        """A piece of the source as Markdown."""
        if depth > _DEPTH:
            raise Unreadable("damaged (nested too deeply)")
        out: list[str] = []
        place = 0
        while place < len(source):
            found = _TOKEN.match(source, place)
            if found is None:
                place += 1
                continue
            place = found.end()
            word, symbol, dollars, _, plain = found.groups()
            if plain is not None:
                out.append(_typeset(plain))
            elif dollars is not None:
                end = source.find(dollars, place)
                if end >= 0:
                    out.append(f"{dollars}{source[place:end].strip()}{dollars}")
                    place = end + len(dollars)
            elif symbol is not None:
                place = self._symbol(symbol, source, place, out)
            elif word == "begin":
                place = self._begin(source, place, out, depth)
            elif word is not None and word != "end":
                place = self._command(word, source, place, out, depth)
        return "".join(out)

    def _symbol(self, symbol: str, source: str, place: int, out: list[str]) -> int:
        """A command of one sign. Returns where the source goes on."""
        if symbol in "([":
            closing, mark = ("\\)", "$") if symbol == "(" else ("\\]", "$$")
            end = source.find(closing, place)
            if end < 0:
                return place
            formula = _without_labels(source[place:end])
            out.append(f"${formula}$" if mark == "$" else f"\n\n$$\n{formula}\n$$\n\n")
            return end + 2
        if symbol == "\\":
            out.append("\n")
            return _past_option(source, place)
        if symbol in ACCENTS:
            return _accented(symbol, source, place, out)
        out.append(symbol if symbol in "%&#_{}$" else " " if symbol in ",;: \n\t" else "")
        return place

    def _command(self, word: str, source: str, place: int, out: list[str], depth: int) -> int:
        """A command with a name. Returns where the source goes on."""
        if word in HEADINGS:
            text, place = _argument(source, _past_option(source, place))
            out.append(f"\n\n{'#' * HEADINGS[word]} {' '.join(self._text(text, depth + 1).split())}\n\n")
        elif word in STYLES:
            text, place = _argument(source, place)
            inner = self._text(text, depth + 1).strip()
            out.append(f"{STYLES[word]}{inner}{STYLES[word]}" if inner else "")
        elif word in ("footnote", "footnotetext"):
            text, place = _argument(source, _past_option(source, place))
            out.append(f" ({self._text(text, depth + 1).strip()})")
        elif word == "caption":
            text, place = _argument(source, _past_option(source, place))
            out.append(f"\n\n{self._text(text, depth + 1).strip()}\n\n")
        elif word in ("url", "path", "nolinkurl"):
            text, place = _argument(source, place)
            out.append(text)
        elif word in ("newcommand", "renewcommand", "providecommand", "newenvironment", "def", "let", "DeclareRobustCommand"):
            place = _past_definition(word, source, place)
        elif word in SECOND_IS_TEXT or word in ("multicolumn", "multirow"):
            for _ in range(2 if word.startswith("multi") else 1):
                place = _argument(source, _past_option(source, place))[1]
            text, place = _argument(source, place)
            out.append(self._text(text, depth + 1))
        elif word in SIGNS:
            out.append(SIGNS[word])
        elif word in ACCENTS:
            place = _accented(word, source, place, out)
        elif word in DROPPED:
            place = _past_option(source, place)
            for _ in range(DROPPED[word]):
                place = _argument(source, _past_option(source, place))[1]
            out.append("\n\n" if word in ("par", "maketitle", "newpage", "clearpage") else "")
        else:
            place = _past_option(source, place)
        return place

    # -- environments ---------------------------------------------------------------------------------------------------------------

    def _begin(self, source: str, place: int, out: list[str], depth: int) -> int:
        name, place = _argument(source, place)
        content, end = _until_end(source, place, name)
        kind = name.strip().rstrip("*")
        out.append(f"\n\n{self._environment(kind, content, depth + 1)}\n\n")
        return end

    def _environment(self, kind: str, content: str, depth: int) -> str:
        if kind in _UNREAD:
            return ""
        if kind in _MATH:
            formula = _without_labels(content)
            return (
                f"$$\n{formula}\n$$"
                if kind in ("equation", "displaymath", "math", "dmath")
                else f"$$\n\\begin{{{kind}}}\n{formula}\n\\end{{{kind}}}\n$$"
            )
        if kind in ("itemize", "enumerate", "description", "compactitem", "compactenum"):
            return self._list(content, kind.endswith(("enumerate", "enum")), depth)
        if kind in _TABLES:
            start = _past_option(content, 0)
            for _ in range(2 if kind in ("tabularx", "tabulary") else 1):
                start = _argument(content, start)[1]
            return self._table(content[start:], depth)
        if kind in ("minipage", "multicols", "adjustbox", "wrapfigure", "subfigure", "thebibliography"):
            content = content[_argument(content, _past_option(content, 0))[1] :]
        text = self._text(content[_past_option(content, 0) :], depth).strip()
        if kind in ("quote", "quotation", "verse"):
            return "\n".join(f"> {line}".rstrip() for line in re.sub(r"\n\s*\n", "\n\n", text).split("\n"))
        return f"## Abstract\n\n{text}" if kind == "abstract" and text else text

    def _list(self, content: str, is_numbered: bool, depth: int) -> str:
        items: list[str] = []
        for piece in _split(content, r"\\item\b")[1:]:
            label = ""
            end = _past_option(piece, 0)
            if end:
                label = f"**{self._text(piece[:end].strip()[1:-1], depth).strip()}** "
            text = re.sub(r"\n\s*\n", "\n", self._text(piece[end:], depth).strip())
            mark = f"{len(items) + 1}. " if is_numbered else "- "
            lines = "\n".join(
                line if line.lstrip().startswith(("- ", "\0")) or re.match(r"\s*\d+\. ", line) else line.strip() for line in text.split("\n")
            )
            items.append(mark + label + lines.replace("\n", "\n" + " " * len(mark)))
        return "\n".join(items)

    def _table(self, content: str, depth: int) -> str:
        rows = []
        for line in _split(content, r"\\\\(?:\[[^\]]*\])?"):
            cells = [self._text(cell, depth) for cell in _split(line, r"(?<!\\)&")]
            if any(cell.strip() for cell in cells):
                rows.append(cells)
        return table(rows)


# -- the source -----------------------------------------------------------------------------------------------------------------------


def _argument(source: str, place: int) -> tuple[str, int]:
    """(what a command takes next: the content of a group or a single sign, where the source goes on)."""
    while place < len(source) and source[place].isspace():
        place += 1
    if source[place : place + 1] != "{":
        return source[place : place + 1], min(place + 1, len(source))
    level = 0
    for found in re.compile(r"\\.|[{}]", re.DOTALL).finditer(source, place):
        level += {"{": 1, "}": -1}.get(found[0], 0)
        if not level:
            return source[place + 1 : found.start()], found.end()
    return source[place + 1 :], len(source)


def _past_option(source: str, place: int) -> int:
    """Behind arguments in square brackets, where there are some."""
    while found := re.compile(r"[ \t]*\[[^\[\]]{0,1000}\]").match(source, place):
        place = found.end()
    return place


def _past_definition(word: str, source: str, place: int) -> int:
    if word in ("def", "let"):
        begin = source.find("{", place) if word == "def" else source.find("\n", place)
        return place if begin < 0 else _argument(source, begin)[1] if word == "def" else begin
    place = _argument(source, place)[1]
    if source[place - 1 : place] == "\\":  # \newcommand\name{...}
        place += len(re.match(r"[a-zA-Z@]*", source[place:])[0])  # type: ignore[index]
    place = _past_option(source, place)
    for _ in range(2 if word == "newenvironment" else 1):
        place = _argument(source, place)[1]
    return place


def _until_end(source: str, place: int, name: str) -> tuple[str, int]:
    """(content of an environment that begins here, where the source goes on behind its end)."""
    level = 1
    for found in re.compile(rf"\\(begin|end)\s*\{{{re.escape(name)}\}}").finditer(source, place):
        level += 1 if found[1] == "begin" else -1
        if not level:
            return source[place : found.start()], found.end()
    return source[place:], len(source)


def _split(source: str, separator: str) -> list[str]:
    """Cut at a separator, but not inside of an environment or a group."""
    pieces, level, start = [], 0, 0
    for found in re.compile(rf"(\\begin\b|(?<!\\)\{{)|(\\end\b|(?<!\\)\}})|({separator})").finditer(source):
        if found[1]:
            level += 1
        elif found[2]:
            level -= 1
        elif level <= 0:
            pieces.append(source[start : found.start()])
            start = found.end()
    return [*pieces, source[start:]]


def _macros(source: str) -> dict[str, tuple[int, str]]:
    """name -> (how many arguments, what stands for it) of what the document defines."""
    found = {}
    for macro in _MACRO.finditer(source):
        body = _argument(source, macro.end() - 1)[0]
        if "\\if" not in body and "@" not in body and len(body) < 1000:
            found[macro[1] or macro[3]] = int(macro[2] or 0), body
    return found


def _expanded(body: str, macros: dict[str, tuple[int, str]]) -> str:
    if not macros:
        return body
    names = "|".join(sorted(map(re.escape, macros), key=lambda name: (-len(name), name)))
    used = re.compile(rf"(?<!newcommand)(?<!newcommand\{{)(?<!command\*\{{)(?<!\\def)\\({names})(?![a-zA-Z@])[ \t]*")
    limit = _GROWTH * len(body) + 10_000
    for _ in range(4):
        pieces, place, size = [], 0, 0
        while (found := used.search(body, place)) and size < limit:
            count, text = macros[found[1]]
            pieces.append(body[place : found.start()])
            place = found.end()
            for number in range(1, count + 1):
                value, place = _argument(body, place)
                text = text.replace(f"#{number}", value)
            pieces.append(text)
            size += len(pieces[-1]) + len(pieces[-2])
        if not pieces or size >= limit:
            return body
        body = "".join([*pieces, body[place:]])
    return body


def _accented(accent: str, source: str, place: int, out: list[str]) -> int:
    base, place = _argument(source, place)
    base = {"\\i": "i", "\\j": "j"}.get(base.strip(), base) if base != "\\" else base
    if base == "\\" and source[place : place + 1] in ("i", "j"):
        base, place = source[place], place + 1
    out.append(unicodedata.normalize("NFC", base[:1] + ACCENTS[accent]) + base[1:] if base else "")
    return place


def _without_labels(formula: str) -> str:
    return re.sub(r"\\(?:label|nonumber|notag)(?:\{[^{}]*\}|(?![a-zA-Z]))", "", formula).strip()


def _typeset(text: str) -> str:
    for written, printed in _PRINTED:
        text = text.replace(written, printed)
    return text


def _tidy(block: str) -> str:
    """A block without the line breaks of its source where it is a paragraph."""
    if re.match(r"\s*(?:\$\$|\||>|- |\d+\. |#)", block) or "\n$$" in block:
        return block.strip("\n")
    return "\n".join(" ".join(line.split()) for line in block.strip().split("\n"))
