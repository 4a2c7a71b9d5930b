"""All text of a page without building a tree: for pages that no parser should be given. Time is linear in the page, whatever it holds."""

import html
import re

from cllm.data.extract.markdown import names

_SILENT = ("script", "style", "template", "svg", "select", "textarea", "noscript", "head")
_NAME = re.compile(r"/?([a-zA-Z][a-zA-Z0-9]*)")
_INLINE = names("a abbr b bdi bdo big cite code data del dfn em font i ins kbd mark q s samp small span strike strong sub sup time tt u var wbr nobr")
_CELLS = frozenset(("td", "th"))
_BLANK = re.compile(r"[ \t\r\f\v\u00a0]+")
_LINES = re.compile(r" ?\n[ \n]*")


def strip_tags(page: str) -> str:
    """The text between the tags of a page, one line for each block. Scripts and styles are left out; a tag that is never closed ends the page."""
    lowered = page.lower() if page.isascii() else re.sub("[A-Z]+", lambda letters: letters.group().lower(), page)
    pieces: list[str] = []
    position, unclosed = 0, set()
    while (start := page.find("<", position)) >= 0:
        pieces.append(page[position:start])
        if page.startswith("<!--", start):
            end = page.find("-->", start)
            position = end + 3 if end >= 0 else len(page)
            continue
        named = _NAME.match(page, start + 1)
        if named is None and page[start + 1 : start + 2] not in ("!", "?"):  # a sign of comparison
            pieces.append("<")
            position = start + 1
            continue
        end = page.find(">", start)
        position = end + 1 if end >= 0 else len(page)
        name = named.group(1).lower() if named else ""
        if name in _SILENT and page[start + 1] != "/" and name not in unclosed:
            closing = lowered.find(f"</{name}", position)
            if closing >= 0:
                position = closing
            else:
                unclosed.add(name)  # looked for once, so that many of them do not cost the page's length each
        pieces.append("" if name in _INLINE else " " if name in _CELLS else "\n")
    pieces.append(page[position:])
    text = _BLANK.sub(" ", html.unescape("".join(pieces)))
    return _LINES.sub("\n", text).strip()
