"""HTML and SVG by construction: text becomes part of a page only through `element`, which escapes it."""

import html
from collections.abc import Iterable
from typing import Any

# Control characters and halves of surrogate pairs are not allowed in HTML, and logs and samples may hold them.
_FORBIDDEN = {code: "\ufffd" for code in (*range(0x00, 0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF) if chr(code) not in "\t\n"}
VOID = frozenset({"meta", "br"})


class Html(str):
    """Markup made by `element`. Every other string is text."""


def text(value: Any) -> Html:
    """A value as escaped text."""
    return Html(html.escape(str(value).translate(_FORBIDDEN), quote=True))


def join(parts: Iterable[Any]) -> Html:
    """Markup and text, which is escaped, one after the other."""
    return Html("".join(part if isinstance(part, Html) else text(part) for part in parts if part is not None))


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
    """<name attributes>children</name>. Children and attributes that are None are left out; `class_` becomes class, and _ in a name becomes -."""
    names = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    opened = "<" + name + "".join(f' {key}="{text(value)}"' for key, value in names) + ">"
    return Html(opened) if name in VOID else Html(f"{opened}{join(children)}</{name}>")


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], caption: str | None = None, numbers: Iterable[int] = ()) -> Html:
    """A table that scrolls sideways on a narrow screen. The first cell of each row is its heading. Columns in `numbers` are aligned right."""
    right = set(numbers)

    def cell(place: int, value: Any) -> Html:
        kind = "number" if place in right else None
        return element("th", value, scope="row") if place == 0 else element("td", value, class_=kind)

    heads = [element("th", value, scope="col", class_="number" if place in right else None) for place, value in enumerate(head)]
    body = [element("tr", *(cell(place, value) for place, value in enumerate(row))) for row in rows]
    parts = [element("caption", caption) if caption else None, element("thead", element("tr", *heads)), element("tbody", *body)]
    return element("div", element("table", *parts), class_="scroll", tabindex="0", role="region", aria_label=caption or "table")
