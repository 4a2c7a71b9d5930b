"""Where a large file is cut, so that several tasks read it: a function of its bytes and of the size of a part, and of nothing else.

A line is in the part in which it begins, so each is in one, whole, however long it is. What is added to a file changes the last part and none before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.data.extract.kinds import HEAD_BYTES, kind_of
from cllm.data.extract.parts import Part

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Cut:
    """Whole lines of a file: bytes `begin` to `end`, of which the first line has the number `line`."""

    begin: int
    end: int
    line: int
    digest: str
    has_quotes: bool
    """Double quotes: in a table a field between them may hold a line end."""


def form_of(path: Path, name: str) -> str:
    """What a file is cut by, as its beginning looks: "lines", "groups" of rows of Parquet; empty where it is none that is cut."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return ""
    if kind_of(name, head) != "records":
        return ""
    return "groups" if head.startswith(b"PAR") else "lines"


def cut(path: Path, part_bytes: int, read: Callable[[int], None] = lambda num_bytes: None) -> list[Cut]:
    """The parts of a file, in order: each begins with the first line that begins behind a multiple of `part_bytes`. None where the file cannot be
    read. Line ends are those of Python's universal newlines, as lines are counted where they are read; it is cut behind a newline alone. read: is
    told of bytes as they are read."""
    found: list[Cut] = []
    place = begin = lines = first = 0  # bytes before this block, and before this part; line ends before both
    digest, quotes, after_return = _digest(), False, False

    def end(at: int) -> None:
        nonlocal begin, first, digest, quotes
        found.append(Cut(begin, at, first + 1, digest.hexdigest(), quotes))
        begin, first, digest, quotes = at, lines, _digest(), False

    def take(content: bytes) -> None:
        nonlocal lines, quotes, after_return
        digest.update(content)
        quotes = quotes or b'"' in content
        lines += content.count(b"\n")
        if after_return or b"\r" in content:
            lines += content.count(b"\r") - content.count(b"\r\n") - (after_return and content.startswith(b"\n"))
        after_return = content.endswith(b"\r")

    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                read(len(block))
                taken = 0
                while (limit := (begin // part_bytes + 1) * part_bytes) < place + len(block) + 1:
                    newline = block.find(b"\n", max(taken, limit - 1 - place))
                    if newline < 0:
                        break
                    take(block[taken : newline + 1])
                    taken = newline + 1
                    end(place + taken)
                if taken < len(block):
                    take(block[taken:])
                place += len(block)
    except OSError:
        return []
    if begin < place:
        end(place)
    return found


def _digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def parts_of_lines(how: dict[str, Any], cuts: Sequence[Cut]) -> list[Part]:
    """What each task reads of a file of lines; nothing where one task has to read the whole. how: what `records.divide` says of it."""
    is_quoted = bool(how) and how["dialect"] is not None and how["dialect"]["quoted"]
    if not how or (is_quoted and any(each.has_quotes for each in cuts)):
        return []
    return [Part(how, each.begin, each.end, each.line) for each in cuts]


def parts_of_groups(how: dict[str, Any], part_bytes: int) -> list[tuple[Part, int]]:
    """The same of Parquet, each part with its bytes."""
    found, begin, held = [], 0, 0
    groups = how.get("groups", [])
    for number, size in enumerate(groups, 1):
        held += size
        if held >= part_bytes or number == len(groups):
            found.append((Part({**how, "groups": []}, begin, number), held))
            begin, held = number, 0
    return found if len(found) > 1 else []
