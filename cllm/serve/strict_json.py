"""JSON from strangers: what RFC 8259 leaves open is refused, and a body cannot cost more than its bytes.

Python's reader takes NaN, lets the last of two equal keys win, makes infinity of 1e999, and gives halves of surrogate pairs that no tokenizer and no
UTF-8 can hold. A client that sends such a thing has made a mistake, which it should hear of.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

from cllm.serve.errors import Refused

MOST_DEPTH = 64  # objects and lists inside one another; a schema needs ten or twenty
_MOST_DIGITS = 40  # of a number; the largest whole number in use has nineteen
_LONG = re.compile(rf"[0-9]{{{_MOST_DIGITS + 1}}}")
_PART_OF_LONG = re.compile("[0-9]{2}")
_TEXT = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"(\s*:)?', re.DOTALL)  # a text, and whether it is a key
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_object(body: bytes) -> dict[str, Any]:
    """The object that a request's body holds. Raises Refused (400) for everything else, and says what is wrong."""
    value = parse(body)
    if not isinstance(value, dict):
        raise Refused(400, f'the body must be a JSON object such as {{"model": ...}}, got {_kind(value)}.', code="invalid_json")
    return value


def parse(body: bytes) -> Any:
    """Any JSON value. Raises Refused (400)."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(f"byte {error.start:,} is no UTF-8") from None
    if not text.strip():
        raise _wrong("it is empty")
    # Hooks for each object and number would take most of the time of a large body, so they are left out where there is nothing for them to find.
    value = _read(text, parse_int=_whole if _holds_long_number(text) else None)
    num_keys = _check(value, may_hold_surrogates=_SURROGATE.search(text) is not None)
    if num_keys < text.count(":") and num_keys < sum(map(bool, _TEXT.findall(text))):
        _read(text, object_pairs_hook=_object)
    return value


def _holds_long_number(text: str) -> bool:
    """Whether there may be a number of too many digits: of one, every twentieth character shows two digits beside each other."""
    return _PART_OF_LONG.search(text[:: _MOST_DIGITS // 2]) is not None and _LONG.search(text) is not None


def _read(text: str, **hooks: Any) -> Any:
    try:
        return json.loads(text, parse_constant=_constant, parse_float=_fraction, **hooks)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise _wrong(f"{error.msg[:1].lower()}{error.msg[1:]} at line {error.lineno:,}, column {error.colno:,}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise _wrong(f"the key {name[:80]!r} stands in one object twice")
    return found


def _constant(word: str) -> NoReturn:
    raise _wrong(f"{word} is no number of JSON")


def _fraction(word: str) -> float:
    value = float(word) if len(word) <= 400 else math.inf
    if not math.isfinite(value):
        raise _wrong(f"the number {word[:40]} is too large")
    return value


def _whole(word: str) -> int:
    if len(word) > _MOST_DIGITS:
        raise _wrong(f"a number of {len(word):,} digits is too large")
    return int(word)


def _check(value: Any, may_hold_surrogates: bool) -> int:
    """Depth and surrogates, level by level: no recursion of ours can overflow. The number of keys in all objects."""
    kinds = (dict, list, str) if may_hold_surrogates else (dict, list)
    level, num_keys = [value], 0
    for _ in range(MOST_DEPTH + 1):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                num_keys += len(each)
                below += [inner for inner in each.values() if isinstance(inner, kinds)]
                if may_hold_surrogates:
                    below += each
            elif isinstance(each, list):
                below += [inner for inner in each if isinstance(inner, kinds)]
            elif isinstance(each, str):
                _check_text(each)
        if not below:
            return num_keys
        level = below
    raise _too_deep()


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _wrong(f"a text holds half of a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character") from None


def _wrong(why: str) -> Refused:
    return Refused(400, f"the body is no valid JSON: {why}.", code="invalid_json")


def _too_deep() -> Refused:
    return Refused(400, f"the body nests objects and lists more than {MOST_DEPTH} deep.", code="invalid_json")


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
