"""Pieces of Markdown that several readers write."""

import re

_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


def fenced(code: str, language: str = "") -> str:
    """A block of code between fences longer than any in it."""
    longest = max((len(found) for found in re.findall(r"^ *(`{3,})", code, re.MULTILINE)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def table(rows: list[list[str]]) -> str:
    """Rows of cells as a table, whose first row is its head. Short rows are filled up."""
    width = max(map(len, rows), default=0)
    lines = ["| " + " | ".join(_cell(row[i]) if i < len(row) else "" for i in range(width)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * width, *lines[1:]]) if lines and width else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def title_of(markdown: str) -> str:
    """The text of the first heading; empty where there is none."""
    found = _HEADING.search(markdown)
    return found[1].strip() if found else ""
