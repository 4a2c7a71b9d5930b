"""A tree of HTML elements as Markdown: headings, lists, definition lists, tables, code and quotes keep their structure, links become their text.

Nothing is escaped and emphasis is not marked, because the result is read by a language model and never turned back into HTML.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any


def names(text: str) -> frozenset[str]:
    """A set of names that are written in one string, with spaces between them."""
    return frozenset(text.split())


HEADINGS = {f"h{level}": level for level in range(1, 7)}
BLOCKS = names(
    "address article aside blockquote body caption center dd details dialog dir div dl dt fieldset figcaption figure footer form h1 h2 h3 "
    "h4 h5 h6 header hgroup hr html legend li main menu nav ol p pre section summary table tbody td tfoot th thead tr ul listing xmp "
    "plaintext"
)
_SILENT = names(
    "script style noscript template svg iframe object embed canvas audio video map button select option input textarea head link meta "
    "title rt rp base frame frameset noframes datalist progress meter"
)
_SILENT_CLASSES = names("headerlink anchor-link header-anchor hash-link anchorjs-link heading-anchor viewcode-link copybtn linenos linenodiv lineno")
_PREFORMATTED = frozenset(("pre", "listing", "xmp", "plaintext"))
_CODE = frozenset(("code", "tt", "kbd", "samp"))
_LANGUAGE = re.compile(r"(?:^|[\s_-])(?:language|lang|highlight(?:-source)?|brush|sourceCode)[-: ]+([\w+#.]+)|^sourceCode (\w+)$", re.IGNORECASE)
_NO_LANGUAGE = names("python3 none text plain plaintext default notranslate highlight output console-output nohighlight wrap block")
# "python3" is what Sphinx calls code whose author named no language.
_SPACE = re.compile(r"[ \t\n\r\f\u00a0\u200b\ufeff]+")
_BREAK = "\x0b"  # stands for <br>; XML and HTML cannot hold this character
_BREAKS = re.compile(f" ?{_BREAK} ?")
_MOST_COLUMNS = 256


def to_markdown(element: Any, silent: Callable[[Any], bool] | None = None) -> str:
    """The content of an lxml element as Markdown.

    silent: which elements are left out, besides scripts, controls, hidden elements and permalinks.
    """
    return "\n\n".join(_Writer(silent).blocks(element)).strip()


def is_hidden(element: Any) -> bool:
    """Whether a browser would not show the element, as far as its own attributes tell."""
    get = element.get
    style = get("style")
    return get("hidden") is not None or get("aria-hidden") == "true" or (style is not None and "display:none" in style.replace(" ", "").lower())


class _Writer:
    def __init__(self, silent: Callable[[Any], bool] | None) -> None:
        self._more_silent = silent

    def silent(self, element: Any) -> bool:
        tag = element.tag
        if not isinstance(tag, str) or tag in _SILENT or is_hidden(element):
            return True
        classes = element.get("class")
        if classes and not _SILENT_CLASSES.isdisjoint(classes.split()):
            return True
        return self._more_silent is not None and self._more_silent(element)

    def blocks(self, element: Any) -> list[str]:
        """Markdown blocks of an element's content, in order, without blank lines between them."""
        found: list[str] = []
        run = [element.text or ""]

        def end_run() -> None:
            if text := _squeezed("".join(run)):
                found.append(text)
            run.clear()

        for child in element:
            if not self.silent(child):
                tag = child.tag
                if tag == "br":
                    run.append(_BREAK)
                elif tag in BLOCKS or next(child.iter(*BLOCKS), None) is not None:
                    end_run()
                    found.extend(self._block(child))
                else:
                    run.append(self._inline(child))
            run.append(child.tail or "")
        end_run()
        return found

    def _block(self, element: Any) -> list[str]:
        tag = element.tag
        if tag in HEADINGS:
            text = " ".join(self._flat(element).split())
            return [f"{'#' * HEADINGS[tag]} {text}"] if text else []
        if tag in _PREFORMATTED:
            inner = list(element.iterchildren("pre"))  # which trafilatura writes around the code of a page
            return [block for code in inner or [element] for block in self._code(code)]
        if tag in ("ul", "ol", "menu", "dir"):
            return self._list(element)
        if tag == "dl":
            return self._definitions(element)
        if tag == "table":
            return self._table(element)
        if tag == "blockquote":
            quote = "\n\n".join(self.blocks(element))
            return ["\n".join(f"> {line}".rstrip() for line in quote.split("\n"))] if quote else []
        return self.blocks(element)

    def _inline(self, element: Any, mark_code: bool = True) -> str:
        """An element without blocks inside, as text on one line; spaces are not yet squeezed."""
        tag = element.tag
        if tag == "br":
            return _BREAK
        if tag == "img":
            return element.get("alt") or "" if "math" in (element.get("class") or "") else ""
        if tag == "math":
            return _formula(element)
        if tag in _CODE and mark_code:
            code = " ".join(self._pieces(element, False).split())
            return f"`{code}`" if code and "`" not in code else code
        text = self._pieces(element, mark_code)
        return f"^{text}" if tag == "sup" and text.strip().lstrip("+-\u2212").isdigit() and element.find(".//a") is None else text

    def _pieces(self, element: Any, mark_code: bool) -> str:
        pieces = [element.text or ""]
        for child in element:
            if not self.silent(child):
                pieces.append(self._inline(child, mark_code))
            pieces.append(child.tail or "")
        return "".join(pieces)

    def _flat(self, element: Any, mark_code: bool = True) -> str:
        """All text of an element on one line, with a space between its blocks."""
        pieces = [element.text or ""]
        for child in element:
            if not self.silent(child):
                if child.tag in BLOCKS or next(child.iter(*BLOCKS), None) is not None:
                    pieces.append(f" {self._flat(child, mark_code)} ")
                else:
                    pieces.append(self._inline(child, mark_code))
            pieces.append(child.tail or "")
        return _squeezed("".join(pieces)).replace("\n", " ")

    def _code(self, element: Any) -> list[str]:
        text = self._verbatim(element).expandtabs(8) if element.tag == "listing" else self._verbatim(element)
        lines = [line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")]
        while lines and not lines[0]:
            lines.pop(0)
        while lines and not lines[-1]:
            lines.pop()
        if not lines:
            return []
        longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
        fence = "`" * (longest + 1)
        return [f"{fence}{_language(element)}\n" + "\n".join(lines) + f"\n{fence}"]

    def _verbatim(self, element: Any) -> str:
        pieces = [element.text or ""]
        for child in element:
            if not self.silent(child):
                if child.tag == "br":
                    pieces.append("\n")
                else:
                    pieces.append(self._verbatim(child))
                    if child.tag in ("div", "p", "li") and not pieces[-1].endswith("\n"):
                        pieces.append("\n")
            pieces.append(child.tail or "")
        return "".join(pieces)

    def _list(self, element: Any) -> list[str]:
        number = _number(element.get("start"), 1) if element.tag == "ol" else None
        items: list[str] = []
        tight = True
        for child in self._parts(element, ("li",)):
            if child.tag in ("ul", "ol"):  # a nested list that stands beside the items, as old editors write it
                nested = "\n\n".join(self._list(child))
                if items:
                    items[-1] += "\n" + _indented(nested, 2)
                elif nested:
                    items.append(nested)
                continue
            blocks = self.blocks(child)
            marker = "- " if number is None else f"{number}. "
            if number is not None:
                number += 1
            if not blocks:
                continue
            text = blocks[0]
            for block in blocks[1:]:
                nested_list = block.startswith(("- ", "1. "))
                tight = tight and nested_list
                text += ("\n" if nested_list else "\n\n") + block
            items.append(marker + _indented(text, len(marker)).lstrip(" "))
        return [("\n" if tight else "\n\n").join(items)] if items else []

    def _definitions(self, element: Any) -> list[str]:
        entries: list[str] = []
        terms: list[str] = []
        for child in self._parts(element, ("dt", "dd")):
            if child.tag == "dt":
                if text := self._flat(child, mark_code=False):
                    terms.append(text)
            elif blocks := self.blocks(child):
                definition = ":   " + _indented("\n\n".join(blocks), 4).lstrip(" ")
                entries.append("\n".join([*terms, definition]))
                terms = []
        if terms:
            entries.append("\n".join(terms))
        return entries

    def _parts(self, element: Any, tags: tuple[str, ...]) -> Iterator[Any]:
        """The items of a list: its children of these tags, also through elements that only group them."""
        for child in element:
            if self.silent(child):
                continue
            if child.tag in tags or child.tag in ("ul", "ol"):
                yield child
            elif next(child.iter(*tags), None) is not None:
                yield from self._parts(child, tags)
            elif tags == ("li",):
                yield child

    def _table(self, element: Any) -> list[str]:
        rows = [row for row in element.iter("tr") if _owner(row) is element and not self.silent(row)]
        cells = [[cell for cell in row if cell.tag in ("td", "th") and not self.silent(cell)] for row in rows]
        caption = [self._flat(child) for child in element if child.tag == "caption"]
        before = [text for text in caption if text]
        if element.get("role") == "presentation" or max(map(len, cells), default=0) < 2 or self._is_layout(element, cells):
            return [*before, *(block for row in cells for cell in row for block in self.blocks(cell))]
        return [*before, *pipe_table([[text for cell in row for text in self._spread(cell)] for row in cells])]

    def _spread(self, cell: Any) -> list[str]:
        """A cell and the empty cells that it spans to its right."""
        width = min(_number(cell.get("colspan"), 1), _MOST_COLUMNS)
        return [self._flat(cell).replace("|", "\\|")] + [""] * (width - 1)

    def _is_layout(self, element: Any, cells: list[list[Any]]) -> bool:
        """A table that places things on the page instead of comparing values: other tables, code or headings stand in its cells."""
        if next(element.iterdescendants("table", "pre", "h1", "h2", "h3"), None) is not None:
            return True
        return len(cells) == 1 and not any(cell.tag == "th" for cell in cells[0])


def pipe_table(rows: list[list[str]]) -> list[str]:
    """Rows of cells as one Markdown table whose first row is the head; rows of nothing are left out. An empty list where nothing is left."""
    rows = [row[:_MOST_COLUMNS] for row in rows if any(row)]
    if not rows:
        return []
    width = max(len(row) for row in rows)
    lines = [f"| {' | '.join(row + [''] * (width - len(row)))} |" for row in rows]
    lines.insert(1, "|" + " --- |" * width)
    return ["\n".join(lines)]


def _owner(row: Any) -> Any:
    """The table that a row belongs to."""
    parent = row.getparent()
    while parent is not None and parent.tag != "table":
        parent = parent.getparent()
    return parent


def _squeezed(text: str) -> str:
    return _BREAKS.sub("\n", _SPACE.sub(" ", text)).strip()


def _indented(text: str, width: int) -> str:
    pad = " " * width
    return "\n".join(pad + line if line else line for line in text.split("\n"))


def _number(text: str | None, otherwise: int) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and 0 < int(text[:9]) < 10**6 else otherwise


def _language(element: Any) -> str:
    """The programming language that a block of code, its child or one of the boxes around it names in its class."""
    candidates = [element, *element.iterchildren("code")]
    parent = element.getparent()
    for _ in range(3):
        if parent is None or parent.tag == "body":
            break
        candidates.append(parent)
        parent = parent.getparent()
    for candidate in candidates:
        named = _LANGUAGE.search(candidate.get("class") or "")
        name = (named.group(1) or named.group(2) or "").lower() if named else (candidate.get("data-lang") or "").lower()
        if name and name not in _NO_LANGUAGE and re.fullmatch(r"[\w+#.-]{1,20}", name):
            return name
    return ""


def _formula(element: Any) -> str:
    for annotation in element.iter("annotation", "{*}annotation"):
        if "tex" in (annotation.get("encoding") or ""):
            return f"${(annotation.text or '').strip()}$"
    return element.get("alttext") or " ".join("".join(element.itertext()).split())
