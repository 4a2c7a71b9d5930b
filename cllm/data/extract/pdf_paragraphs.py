"""Lines of pages to paragraphs, headings, lists and code; running heads, feet and page numbers are left out."""

import re
from collections import Counter
from itertools import pairwise

from cllm.data.extract.pdf_lines import SOFT_HYPHEN, Line

_EDGE_LINES = 3  # at the top and at the bottom of a page that may be a running head
_REPEATED = 3  # pages that a running head stands on, at least
_SHARE, _OFTEN = 0.25, 8  # of all pages, at least; so many pages are enough in any case
_DIGITS = re.compile(r"\d+|\b[ivxlcdm]{1,7}\b", re.IGNORECASE)
_PAGE_NUMBER = re.compile(
    r"(?:page|seite|p\.)?[\s\-|\u2013\u2014\[(]*(?:\d{1,4}|[ivxlc]{1,7})(?:\s*(?:/|of|von|de|sur)\s*\d{1,4})?[\s\-|\u2013\u2014\])]*", re.IGNORECASE
)
_BULLET = re.compile(r"[\u2022\u25cf\u25cb\u25aa\u25a0\u25e6\u2023\u2043\u00b7\u25ba\u27a2\uf0b7\uf0a7\u2219*\u2013-][\s\u00a0]+(?=\S)")
_NUMBER = re.compile(r"(?:\(?(?:\d{1,3}|[a-z]|[ivx]{1,5})[.)]|\[\d{1,3}\])\s+(?=\S)")
_ENDS = re.compile(r"[.!?:;\u3002\uff01\uff1f]['\"\u201d\u2019)\]]*$")
_WIDE = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\u3000-\u30ff\uac00-\ud7af]")
_BIGGER = 1.12  # times the text's own size, from which a line is a heading
_LONGEST_HEADING = 200


def without_edges(pages: list[list[Line]]) -> list[list[Line]]:
    """Pages without the lines at their top and bottom that repeat from page to page but for numbers, and without page numbers."""
    places: Counter[tuple[str, str, int]] = Counter()
    for page in pages:
        places.update({key for _, key in _edges(page)})
    enough = max(_REPEATED, min(_OFTEN, int(_SHARE * sum(1 for page in pages if page))))
    kept = []
    for page in pages:
        dropped = {id(line) for line, key in _edges(page) if places[key] >= enough}
        lines = [line for line in page if id(line) not in dropped]
        outer = {id(line) for line in (min(lines, key=lambda line: line.base), max(lines, key=lambda line: line.base))} if len(lines) > 1 else set()
        kept.append([line for line in lines if not (id(line) in outer and len(pages) > 1 and _PAGE_NUMBER.fullmatch(line.text))])
    return kept


def _edges(page: list[Line]) -> list[tuple[Line, tuple[str, str, int]]]:
    """The outer lines of a page, each with what it would have in common with its like on other pages: words, edge and height."""
    ordered = sorted(page, key=lambda line: -line.base)
    found = [(line, (_DIGITS.sub("#", line.text), "top", round(line.base / 6))) for line in ordered[:_EDGE_LINES]]
    return found + [(line, (_DIGITS.sub("#", line.text), "bottom", round(line.base / 6))) for line in ordered[_EDGE_LINES:][-_EDGE_LINES:]]


def paragraphs(pages: list[list[Line]], recognised: dict[int, str]) -> list[str]:
    """Blocks of Markdown. recognised: the text of scanned pages by their number, which takes the place of their lines."""
    sizes: Counter[float] = Counter()
    words: set[str] = set()
    for page in pages:
        for line in page:
            if not line.fixed:
                sizes[round(line.size * 2) / 2] += len(line.text)
            words.update(re.findall(r"\w+(?:-\w+)*", line.text))
    body = max(sizes, key=lambda size: (sizes[size], -size)) if sizes else 0.0
    large = sorted({size for size in sizes if size >= _BIGGER * body}, reverse=True)[:4]
    writer = _Writer(body, {size: level for level, size in enumerate(large, 1)}, words)
    for number, page in enumerate(pages):
        if number in recognised:
            writer.end()
            writer.blocks += [recognised[number]] if recognised[number] else []
        else:
            writer.add(page)
    writer.end()
    return writer.blocks


class _Writer:
    def __init__(self, body: float, levels: dict[float, int], words: set[str]) -> None:
        self.blocks: list[str] = []
        self._body, self._levels, self._words = body, levels, words
        self._text = ""
        self._lines: list[Line] = []  # of the block that is open
        self._kind = ""  # of that block: "text", "code", "heading 2"

    def add(self, page: list[Line]) -> None:
        """The lines of one page; a paragraph may go on from the page before."""
        right = sorted(line.right for line in page)[int(0.9 * len(page))] if page else 0.0
        pitches = sorted(round(upper.base - lower.base, 1) for upper, lower in pairwise(page) if 0 < upper.base - lower.base < 3 * upper.size)
        pitch = pitches[len(pitches) // 2] if pitches else 0.0
        for number, line in enumerate(page):
            kind = self._kind_of(line)
            if self._lines and (kind != self._kind or self._begins(line, right, pitch, number == 0)):
                self.end()
            self._kind = kind
            if kind != "code":
                self._text = self._joined(self._text, line.text.replace("\t", " "))
            self._lines.append(line)

    def _kind_of(self, line: Line) -> str:
        if line.fixed:
            return "code"
        size = round(line.size * 2) / 2
        level = next((level for large, level in self._levels.items() if size >= large), 0)
        return f"heading {level}" if level and len(line.text) < _LONGEST_HEADING else "text"

    def _begins(self, line: Line, right: float, pitch: float, first_of_page: bool) -> bool:
        """Whether a line begins a block, although the one before is of the same kind."""
        before = self._lines[-1]
        gap = before.base - line.base
        if self._kind == "code":
            return not first_of_page and not -0.5 * line.size < gap < 3.5 * line.size
        if self._kind != "text":
            return first_of_page or not 0 < gap < 1.9 * line.size
        if _BULLET.match(line.text) or (_NUMBER.match(line.text) and (gap > 0 or first_of_page)):
            return True
        ended = bool(_ENDS.search(before.text))
        if first_of_page or gap <= 0:  # the paragraph may go on at the top of the next page or column
            return (ended and before.right < right - 3 * line.size) or (ended and line.text[:1].isupper() and before.right < right - line.size)
        if pitch and gap > 1.35 * pitch and gap > 1.2 * line.size:
            return True
        if abs(line.size - before.size) > 0.15 * before.size or (
            line.bold != before.bold and len(self._lines) == 1 and not before.text.endswith(SOFT_HYPHEN)
        ):
            return abs(line.size - before.size) > 0.15 * before.size or before.bold
        listed = bool(_BULLET.match(self._lines[0].text) or _NUMBER.match(self._lines[0].text))
        if not listed and line.left - before.left > 0.8 * line.size and (ended or before.right < right - 2 * line.size):
            return True
        short = before.right < right - max(6 * line.size, 0.12 * (right - before.left))
        return (short and (ended or line.text[:1].isupper() or "\t" in line.text)) or ("\t" in line.text and "\t" in before.text)

    def _joined(self, text: str, following: str) -> str:
        if not text:
            return following
        if text.endswith(SOFT_HYPHEN):
            return text.rstrip(SOFT_HYPHEN) + following
        if text.endswith(("-", "\u2010")) and text[-2:-1].isalpha() and following[:1].islower():
            head, tail = re.search(r"[\w-]*$", text[:-1]), re.match(r"\w+", following)
            together = f"{head.group()}-{tail.group()}" if head and tail else ""
            return text + following if together in self._words else text[:-1] + following
        if _WIDE.match(text[-1]) and _WIDE.match(following[:1]):
            return text + following  # scripts without spaces between words
        return f"{text} {following}"

    def end(self) -> None:
        """Writes the open block."""
        if not self._lines:
            return
        if self._kind == "code":
            self.blocks.append(_code(self._lines))
        elif text := " ".join(self._text.replace(SOFT_HYPHEN, "").split()):
            bullet = _BULLET.match(text)
            if self._kind != "text":
                text = f"{'#' * int(self._kind.rpartition(' ')[2])} {text}"
            elif bullet:
                text = "- " + text[bullet.end() :]
            if self.blocks and text.startswith("- ") and self.blocks[-1].startswith("- "):
                self.blocks[-1] += "\n" + text
            else:
                self.blocks.append(text)
        self._text, self._lines = "", []


def _code(lines: list[Line]) -> str:
    """Lines in a typewriter's font with their indentation, which the place of their first letter shows."""
    left = min(line.left for line in lines)
    widths = sorted((line.right - line.left) / len(line.text) for line in lines if line.text)
    width = max(widths[len(widths) // 2], 0.1)
    shown = [" " * min(200, round((line.left - left) / width)) + line.text.replace("\t", "    ").replace(SOFT_HYPHEN, "-") for line in lines]
    return "```\n" + "\n".join(shown) + "\n```"
