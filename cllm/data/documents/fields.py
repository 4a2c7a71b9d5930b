"""Which field of a file's records holds the text.

"text", or else "content", where there is one: what most data sets call it. Otherwise another usual name, or the longest field of words if no other
comes near it. A choice that is not certain is none: several candidates are named instead, and `data.text_field` says which.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from cllm.data.documents.chat_forms import fields as field_names
from cllm.runtime.printable import printable, quoted

PLAIN = ("text", "content")
_USUAL = ("body", "article", "document", "story", "passage", "contents", "raw_content", "page_content", "full_text", "fulltext", "transcript")
_DEPTH = 3  # of fields in fields that are looked into
CONVINCING_CHARS = 40  # on average, from which a field of no usual name is text


class Choice(NamedTuple):
    """`fields`: tried in this order in each record; empty where no field was chosen, and `reason` says why."""

    fields: tuple[str, ...]
    reason: str = ""


def text_at(record: Any, path: str) -> str | None:
    """The text of a field, a list of strings as lines; `path` is its name, or the names on the way to it joined by dots. A record that is a string
    is its own text."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        return None
    value = record.get(path)
    if value is None and "." in path:
        first, _, rest = path.partition(".")
        return text_at(record[first], rest) if isinstance(record.get(first), dict) else None
    return _joined(value)


def _joined(value: Any) -> str | None:
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return "\n".join(value)
    return value if isinstance(value, str) else None


def choose(sample: list[Any], wanted: str = "") -> Choice:
    """The field with the text of records like these; `wanted`: the one to take, whatever else there is."""
    records = [record for record in sample if isinstance(record, dict)]
    if wanted:
        return _given(sample, records, wanted)
    sizes: dict[str, int] = {}  # characters in each field of words
    for record in records:
        for path, text in _strings(record):
            if _is_words(text):
                sizes[path] = sizes.get(path, 0) + len(text)
    named = [path for path in _any_case(PLAIN, records) if any((text_at(record, path) or "").strip() for record in records)]
    if named:
        return Choice((*named, *(name for name in PLAIN if name not in named)))  # a record beyond the sample may have only the other one
    if any(isinstance(record, str) for record in sample) and not sizes:
        return Choice(PLAIN)
    if not sizes:
        return Choice((), f"no field holds text ({_found(records)})")
    ordered = sorted(sizes, key=lambda path: (-sizes[path], path))
    largest = sizes[ordered[0]]
    usual = [path for path in ordered if path.rpartition(".")[2].lower() in (*PLAIN, *_USUAL) and 4 * sizes[path] >= largest]
    if usual:
        return Choice((usual[0],))
    if len(ordered) > 1 and 2 * sizes[ordered[1]] > largest:
        several = ", ".join(printable(path) for path in ordered[:4] if 2 * sizes[path] > largest)
        return Choice((), f"several fields hold text ({several}); choose one with data.text_field")
    if largest < CONVINCING_CHARS * sum(text_at(record, ordered[0]) is not None for record in records):
        return Choice((), f"every field is short ({_found(records)}); choose one with data.text_field")
    return Choice((ordered[0],))


def _given(sample: list[Any], records: list[dict[str, Any]], wanted: str) -> Choice:
    for path in (wanted, *_any_case((wanted,), records)):
        if any(text_at(record, path) is not None for record in records):
            return Choice((path,))
    if any(isinstance(record, str) for record in sample) and not records:
        return Choice((wanted,))
    return Choice((), f"no field {quoted(wanted)} holds text ({_found(records)})")


def _any_case(names: Iterable[str], records: list[dict[str, Any]]) -> list[str]:
    """These names as the records write them: "Text" or "TEXT" are "text"."""
    found: dict[str, str] = {}
    for record in records:
        for key in record:
            found.setdefault(key.lower(), key)
    exact = {key for record in records for key in record}
    return [name if name in exact else found[name.lower()] for name in names if name.lower() in found]


def _found(records: list[dict[str, Any]]) -> str:
    keys: dict[str, None] = {}
    for record in records:
        keys.update(dict.fromkeys(record))
    return f"fields found: {field_names(dict(keys))}"


def _strings(record: dict[str, Any], prefix: str = "", depth: int = _DEPTH) -> Iterable[tuple[str, str]]:
    for key, value in record.items():
        text = _joined(value)
        if text is not None:
            yield prefix + key, text
        elif isinstance(value, dict) and depth > 1:
            yield from _strings(value, f"{prefix}{key}.", depth - 1)


def _is_words(text: str) -> bool:
    """Not an address, a number or a key: there are blanks in it, or letters of a script that writes none."""
    return any(c.isspace() for c in text.strip()) or sum("\u0e00" <= c <= "\u0eff" or "\u3040" <= c <= "\uffdc" for c in text) >= 4
