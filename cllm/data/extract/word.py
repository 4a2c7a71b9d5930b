"""Word documents (docx): paragraphs in order with headings, lists, code and tables, as Markdown. Deleted text of tracked changes is left out."""

import re
from collections.abc import Iterator
from typing import Any

from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.markdown import pipe_table
from cllm.data.extract.options import Options
from cllm.data.extract.package import Package, iso_date, language_code, local, properties

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_LEFT_OUT = frozenset(("del", "moveFrom", "Fallback", "instrText", "delText", "pPr", "rPr", "txbxContent", "commentRangeStart"))
_HEADING = re.compile(r"(?:heading|überschrift|titre|título|titolo|kop|rubrik|nagłówek|заголовок)\s*([1-9])", re.IGNORECASE)
_CODE = re.compile(r"code|listing|preformatted|source|verbatim|plain ?text", re.IGNORECASE)


def read(data: bytes, name: str, options: Options) -> list[Document]:
    """One document. Raises Unreadable."""
    package = Package(data)
    main = _main_part(package)
    body = next((element for element in package.xml(main) if local(element) == "body"), None)
    if body is None:
        raise Unreadable(f"damaged: its part {main} has no body")
    folder = main.rpartition("/")[0]
    writer = _Writer(_Styles(package.optional_xml(f"{folder}/styles.xml")), _numbering(package.optional_xml(f"{folder}/numbering.xml")))
    text = writer.text(body, package.optional_xml(f"{folder}/footnotes.xml"))
    if not text:
        raise Unreadable("empty: the document has no text; text in its pictures needs cllm[ocr]")
    core = properties(package.optional_xml("docProps/core.xml"))
    date = iso_date(core.get("modified") or core.get("created") or "")
    return [Document(text, title=core.get("title") or writer.title, date=date, language=language_code(core.get("language", "")))]


def _main_part(package: Package) -> str:
    relations = package.optional_xml("_rels/.rels")
    for relation in relations if relations is not None else ():
        if (relation.get("Type") or "").endswith("/officeDocument"):
            return (relation.get("Target") or "").lstrip("/")
    return "word/document.xml"


class _Styles:
    """Which level of heading, and whether code, a paragraph's style is."""

    def __init__(self, root: Any | None) -> None:
        self.level: dict[str, int] = {}
        self.code: set[str] = set()
        self.title: set[str] = set()
        self.numbering: dict[str, tuple[str, int]] = {}
        based: dict[str, str] = {}
        for style in root.iter(f"{_W}style") if root is not None else ():
            key = style.get(f"{_W}styleId") or ""
            label = _value(style.find(f"{_W}name"))
            heading = _HEADING.match(label)
            outline = style.find(f"{_W}pPr/{_W}outlineLvl")
            if heading:
                self.level[key] = int(heading.group(1))
            elif outline is not None and _value(outline).isdigit() and int(_value(outline)) < 9:
                self.level[key] = int(_value(outline)) + 1
            elif label.lower() == "title":
                self.title.add(key)
            elif _CODE.search(label):
                self.code.add(key)
            number = style.find(f"{_W}pPr/{_W}numPr")
            if number is not None:
                self.numbering[key] = (_value(number.find(f"{_W}numId")), _whole(_value(number.find(f"{_W}ilvl"))))
            based[key] = _value(style.find(f"{_W}basedOn"))
        for key in based:
            ancestor, steps = based[key], 0
            while ancestor and steps < 20:
                if ancestor in self.level:
                    self.level.setdefault(key, self.level[ancestor])
                if ancestor in self.numbering:
                    self.numbering.setdefault(key, self.numbering[ancestor])
                ancestor, steps = based.get(ancestor, ""), steps + 1


class _Writer:
    def __init__(self, styles: _Styles, bullets: dict[tuple[str, int], bool]) -> None:
        self._styles, self._bullets = styles, bullets
        self._counts: dict[tuple[str, int], int] = {}
        self.title = ""

    def text(self, body: Any, notes: Any | None) -> str:
        blocks = list(self._blocks(body))
        for note in notes if notes is not None else ():
            if note.get(f"{_W}type") in (None, "normal"):
                blocks.extend(("note", text) for _, text in self._blocks(note))
        lines: list[str] = []
        previous = ""
        for kind, text in blocks:
            if kind == "code":
                if previous == "code":
                    lines[-1] = text
                    lines.append("```")
                else:
                    lines += ["", "```", text, "```"]
            else:
                lines += [text] if kind == previous == "item" else ["", text]
            previous = kind
        return "\n".join(lines).strip()

    def _blocks(self, parent: Any) -> Iterator[tuple[str, str]]:
        for child in parent:
            tag = local(child)
            if tag == "p":
                yield from self._paragraph(child)
                for box in child.iter(f"{_W}txbxContent"):
                    if not any(local(above) in ("Fallback", "del") for above in box.iterancestors()):
                        yield from self._blocks(box)
            elif tag == "tbl":
                yield from (("table", table) for table in self._table(child))
            elif tag in ("sdt", "sdtContent", "ins", "moveTo", "customXml", "smartTag", "AlternateContent", "Choice"):
                yield from self._blocks(child)

    def _paragraph(self, paragraph: Any) -> Iterator[tuple[str, str]]:
        text = _runs(paragraph)
        if not text.strip():
            return
        style = _value(paragraph.find(f"{_W}pPr/{_W}pStyle"))
        if style in self._styles.code:
            yield "code", text.rstrip()
            return
        text = text.strip()
        if style in self._styles.title and not self.title:
            self.title = " ".join(text.split())
            yield "heading", f"# {self.title}"
        elif level := self._styles.level.get(style):
            yield "heading", f"{'#' * min(level, 6)} {' '.join(text.split())}"
        elif (place := self._place(paragraph, style)) is not None:
            number, depth = place
            marker = "- " if self._bullets.get((number, depth), True) else f"{self._next(number, depth)}. "
            yield "item", "  " * depth + marker + text.replace("\n", "\n" + "  " * (depth + 1))
        else:
            yield "text", text

    def _place(self, paragraph: Any, style: str) -> tuple[str, int] | None:
        """Which list a paragraph belongs to, and how deep in it; None for what is no item."""
        numbering = paragraph.find(f"{_W}pPr/{_W}numPr")
        number, depth = self._styles.numbering.get(style, ("", 0))
        if numbering is not None:
            number = _value(numbering.find(f"{_W}numId")) or number
            depth = _whole(_value(numbering.find(f"{_W}ilvl"))) or depth
        return (number, min(depth, 8)) if number not in ("", "0") else None

    def _next(self, number: str, depth: int) -> int:
        for key in [key for key in self._counts if key[0] == number and key[1] > depth]:
            del self._counts[key]
        self._counts[number, depth] = self._counts.get((number, depth), 0) + 1
        return self._counts[number, depth]

    def _table(self, table: Any) -> list[str]:
        rows = []
        for row in _children(table, "tr"):
            cells: list[str] = []
            for cell in _children(row, "tc"):
                text = " ".join(" ".join(block.replace("\n", " ") for _, block in self._blocks(cell)).split()).replace("|", "\\|")
                span = _whole(_value(cell.find(f"{_W}tcPr/{_W}gridSpan"))) or 1
                merged = cell.find(f"{_W}tcPr/{_W}vMerge")
                cells += ["" if merged is not None and _value(merged) != "restart" else text] + [""] * (min(span, 64) - 1)
            rows.append(cells)
        if rows and max(map(len, rows)) == 1:  # a frame around text
            return [row[0].replace("\\|", "|") for row in rows if row and row[0]]
        return pipe_table(rows)


def _children(element: Any, wanted: str) -> Iterator[Any]:
    """Rows or cells, also those inside content controls and insertions."""
    for child in element:
        if local(child) == wanted:
            yield child
        elif local(child) in ("sdt", "sdtContent", "ins", "customXml"):
            yield from _children(child, wanted)


def _runs(element: Any) -> str:
    pieces = []
    for child in element:
        tag = local(child)
        if tag == "t":
            pieces.append(child.text or "")
        elif tag == "tab":
            pieces.append("\t")
        elif tag in ("br", "cr"):
            pieces.append("\n")
        elif tag == "noBreakHyphen":
            pieces.append("-")
        elif tag not in _LEFT_OUT:
            pieces.append(_runs(child))
    return "".join(pieces)


def _numbering(root: Any | None) -> dict[tuple[str, int], bool]:
    """Whether a list's level has bullets, by the list's number and the level."""
    if root is None:
        return {}
    kinds: dict[str, dict[int, bool]] = {}
    for abstract in root.iter(f"{_W}abstractNum"):
        levels = {
            _whole(level.get(f"{_W}ilvl") or ""): _value(level.find(f"{_W}numFmt")) in ("bullet", "none", "") for level in abstract.iter(f"{_W}lvl")
        }
        kinds[abstract.get(f"{_W}abstractNumId") or ""] = levels
    found = {}
    for number in root.iter(f"{_W}num"):
        for level, bullet in kinds.get(_value(number.find(f"{_W}abstractNumId")), {}).items():
            found[number.get(f"{_W}numId") or "", level] = bullet
    return found


def _value(element: Any | None) -> str:
    return (element.get(f"{_W}val") or "") if element is not None else ""


def _whole(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
