"""JSON in every layout that programs write, as a stream of records. Which layout a file has is told by its first megabyte:

    lines    a record on each line (JSON Lines), or several
    values   records one after the other, over several lines or without any line end between them
    array    [record, record, ...] at the top, or as the longest list of an object that wraps it: {"version": 1, "data": [record, ...]}
    whole    the file is one record: a list of messages

Only the record that is being read is held in memory. What cannot be read is reported to `malformed(reason, place)` and passed over.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cllm.data.documents import tables
from cllm.data.documents.chat_forms import is_conversation, is_message

_BLOCK = 1 << 20  # characters that are taken in together
RECORD_CHARS = 1 << 27  # a longer record is taken to be one whose end is missing

# Separators between records. Commas, because lists are put together by hand; byte order marks, because files are joined; and RFC 7464's mark.
_BETWEEN = re.compile(r"[\s,\ufeff\x1e]*")
_KEY = re.compile(r'\{\s*("(?:[^"\\\n]|\\.){1,200}")\s*:')
_TEXT_KEYS = ("text", "content")  # an object with one of these is a record, whatever lists it holds
_HALF_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of half a surrogate pair; two of them may be a whole character
_STRICT = json.JSONDecoder()
_LENIENT = json.JSONDecoder(strict=False)  # takes tabs and other control characters inside strings

Malformed = Callable[[str, str], None]


@dataclass(frozen=True)
class Layout:
    """How the records of a file lie in it. `start`: characters before the first one."""

    kind: str
    start: int = 0


def read(chunks: Iterator[str], layout: Layout, malformed: Malformed, line: int = 1) -> Iterator[tuple[str, Any]]:
    """(place, value) of each record in a stream of text, in order. line: the number of the first one, in the layout of lines."""
    return _read_lines(chunks, malformed, line) if layout.kind == "lines" else _read_values(_Window(chunks), layout, malformed)


def clean(text: str) -> str:
    """The text with the halves of surrogate pairs, which JSON can express and no encoding can, joined where two meet and else as U+FFFD."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [_cleaned(each) for each in value]
    return {clean(key): _cleaned(each) for key, each in value.items()} if isinstance(value, dict) else value


# -- layout -------------------------------------------------------------------------------------------------------------------------


def layout_of(head: str, complete: bool) -> Layout:
    """The layout of a file that begins with this text. complete: whether that is all of it."""
    first = _after_gap(head, 0)
    lines = [line for line in head.split("\n")[: None if complete else -1] if line.strip("\ufeff \t\r,")][:100]
    alone = [_values_on(line) for line in lines]
    if head[first : first + 1] == "[":
        is_whole_line = bool(alone) and alone[0] is not None and len(alone[0]) == 1
        if not (is_whole_line and len(lines) > 1 and alone[1] is not None):
            return _array_layout(head, first)
        return Layout("lines")
    if alone and 2 * sum(values is not None for values in alone) >= len(alone) and not (len(alone) == 1 and _wrapped(head, first)):
        return Layout("lines")
    inside = _wrapped(head, first)
    return Layout("values") if inside is None else Layout("array", inside)


def _after_gap(text: str, start: int) -> int:
    found = _BETWEEN.match(text, start)
    assert found is not None
    return found.end()


def _values_on(line: str) -> list[Any] | None:
    """The objects and lists that make up a line; None where something else stands in it."""
    values = []
    end = _after_gap(line, 0)
    while end < len(line):
        try:
            value, end = _LENIENT.raw_decode(line, end)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict | list):
            return None
        values.append(value)
        end = _after_gap(line, end)
    return values


def _array_layout(head: str, first: int) -> Layout:
    """An array of records, or one record: a list of messages."""
    try:
        element, _ = _STRICT.raw_decode(head, _after_gap(head, first + 1))
    except (ValueError, RecursionError):
        element = None
    return Layout("whole") if is_message(element) else Layout("array")


def _wrapped(head: str, first: int) -> int | None:
    """Where the records begin in an object that is the whole file and holds them as its longest list; None for any other file."""
    if head[first : first + 1] != "{":
        return None
    longest = (0, 0)  # length and beginning of a list of objects
    place = _after_gap(head, first + 1)
    try:
        while head[place : place + 1] == '"':
            key, place = _STRICT.raw_decode(head, place)
            place = _after_gap(head, place)
            if head[place : place + 1] != ":":
                return None
            begin = _after_gap(head, place + 1)
            if _holds_records(head, begin):
                longest = max(longest, (len(head) - begin, begin + 1))  # as long as that if its end is not found
            value, place = _STRICT.raw_decode(head, begin)
            if key in _TEXT_KEYS and isinstance(value, str):
                return None
            if longest[1] == begin + 1:
                longest = place - begin, begin + 1
            place = _after_gap(head, place)
    except (ValueError, RecursionError):
        place = len(head)
    if place >= len(head):  # the object goes on beyond the head, or is broken
        return longest[1] if 2 * longest[0] > len(head) else None
    if head[place] != "}" or _after_gap(head, place + 1) < len(head) or is_conversation(_STRICT.raw_decode(head, first)[0]):
        return None
    return longest[1] or None


def _holds_records(text: str, begin: int) -> bool:
    if text[begin : begin + 1] != "[":
        return False
    try:
        element, _ = _STRICT.raw_decode(text, _after_gap(text, begin + 1))
    except json.JSONDecodeError as error:
        return _unfinished(error, text) and text[_after_gap(text, begin + 1) :][:1] == "{"
    except (ValueError, RecursionError):
        return False
    if isinstance(element, list):
        return bool(element) and is_message(element[0])
    return isinstance(element, dict) and not is_message(element)


# -- records ------------------------------------------------------------------------------------------------------------------------


def _read_lines(chunks: Iterable[str], malformed: Malformed, first: int) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(tables.lines_of(chunks), first):
        if tables.is_cut(line):
            malformed(f"record of more than {tables.LINE_CHARS >> 20} million characters", str(number))
            continue
        end, count = _after_gap(line, 0), 0
        while end < len(line):
            try:
                value, end = _LENIENT.raw_decode(line, end)
                if _HALF_ESCAPE.search(line):
                    value = _cleaned(value)
            except RecursionError:
                malformed("record nested too deeply", str(number))
                break
            except ValueError:
                malformed("record that is not valid JSON", str(number))
                break
            for each in _records_in(value):
                count += 1
                yield (str(number) if count == 1 else f"{number}#{count}"), each
            end = _after_gap(line, end)


def _records_in(value: Any) -> Iterable[Any]:
    """A list of objects that are no messages is a batch of records; everything else is a record itself."""
    if isinstance(value, list) and value and isinstance(value[0], dict | list) and not is_message(value[0]):
        return (each for inner in value for each in _records_in(inner)) if isinstance(value[0], list) else value
    return (value,)


class _Window:
    """The part of a stream of text that is held, the place in it where the next record is looked for, and the number of the line there."""

    def __init__(self, chunks: Iterator[str]):
        self._chunks = chunks
        self.text = ""
        self.place = 0
        self.line = 1

    def move(self, place: int) -> None:
        self.line += self.text.count("\n", self.place, place)
        self.place = place

    def more(self) -> bool:
        """Takes in as much again as is held and still needed; False at the end of the stream."""
        parts = [self.text[self.place :]]
        wanted = max(_BLOCK, len(parts[0]))
        size = 0
        for chunk in self._chunks:
            parts.append(chunk)
            size += len(chunk)
            if size >= wanted:
                break
        self.text, self.place = "".join(parts), 0
        return size > 0

    def skip_gap(self) -> str:
        """Moves to the next character that is part of a record, or to the end; returns what was passed."""
        gap = ""
        while True:
            end = _after_gap(self.text, self.place)
            gap = (gap + self.text[self.place : end])[-256:]
            self.move(end)
            if end < len(self.text) or not self.more():
                return gap


def _read_values(window: _Window, layout: Layout, malformed: Malformed) -> Iterator[tuple[str, Any]]:
    while window.place + len(window.text) < layout.start and window.more():
        pass
    window.move(min(layout.start, len(window.text)))
    in_array = layout.start > 0
    key: str | None = None  # the first key of the last record, with which others are likely to begin as well
    last_line = count = 0
    at_line_start = True
    while True:
        gap = window.skip_gap()
        if window.place >= len(window.text):
            return
        indent = gap.rpartition("\n")[2] if "\n" in gap or at_line_start else None
        at_line_start = False
        character = window.text[window.place]
        if layout.kind == "array" and character == ("]" if in_array else "["):
            window.move(window.place + 1)
            if in_array and layout.start:
                return  # the rest of the object around the records
            in_array, at_line_start = not in_array, not in_array
            continue
        line = window.line
        count = count + 1 if line == last_line else 1
        last_line = line
        place = str(line) if count == 1 else f"{line}#{count}"
        value, problem = _value_at(window)
        if problem:
            malformed(problem, place)
            found = _KEY.match(window.text, window.place)
            if not _find_next(window, indent, key or (found and found[1])):
                return
            at_line_start = True
            continue
        if isinstance(value, dict) and value:
            key = json.dumps(next(iter(value)), ensure_ascii=False)
        for number, each in enumerate([value] if layout.kind == "whole" else _records_in(value)):
            count += number > 0
            yield (place if not number else f"{line}#{count}"), each


def _value_at(window: _Window) -> tuple[Any, str]:
    """The value at the window's place, which moves behind it, and ""; or why there is none, and the window stays."""
    while True:
        try:
            value, end = _STRICT.raw_decode(window.text, window.place)
            if end == len(window.text) and not isinstance(value, dict | list | str) and window.more():
                continue  # more digits may follow
            if _HALF_ESCAPE.search(window.text, window.place, end):
                value = _cleaned(value)
            window.move(end)
            return value, ""
        except RecursionError:
            return None, "record nested too deeply"
        except json.JSONDecodeError as error:
            if not _unfinished(error, window.text):
                return None, "record that is not valid JSON"
            if len(window.text) - window.place > RECORD_CHARS:
                return None, f"record of more than {RECORD_CHARS >> 20} million characters"
            if not window.more():
                return None, "record that is not valid JSON"
        except ValueError:  # a number of thousands of digits
            return None, "record that is not valid JSON"


def _unfinished(error: json.JSONDecodeError, text: str) -> bool:
    """Whether a value is wrong only because the text ends; names such as -Infinity may be cut as well."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - 12


def _find_next(window: _Window, indent: str | None, key: str | None) -> bool:
    """Moves behind a broken record, to where the next one seems to begin: an opening bracket as far indented as the broken one, or one before the
    same first key. False at the end of the file."""
    pattern = rf"\n{re.escape(indent or '')}(?=[{{\[])"
    if key:
        pattern += rf"|\{{(?=\s*{re.escape(key)}\s*:)"
    begins = re.compile(pattern)
    start = window.place + 1
    while True:
        found = begins.search(window.text, start)
        if found:
            window.move(found.start() if window.text[found.start()] == "{" else found.end())
            return True
        window.move(max(start, len(window.text) - 512))
        if not window.more():
            window.move(len(window.text))
            return False
        start = 0
