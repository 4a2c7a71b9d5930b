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
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_fraction, parse_int=_whole)
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise _wrong(f"{error.msg[:1].lower()}{error.msg[1:]} at line {error.lineno:,}, column {error.colno:,}") from None
    _check(value, may_hold_surrogates=_SURROGATE.search(text) is not None)
    return value


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


def _check(value: Any, may_hold_surrogates: bool) -> None:
    """Depth and surrogates, level by level: no recursion of ours can overflow."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
                if may_hold_surrogates:
                    below += each
            elif isinstance(each, list):
                below += each
            elif may_hold_surrogates and isinstance(each, str):
                _check_text(each)
        if not below:
            return
        level = [each for each in below if isinstance(each, dict | list | str)]
    if level:
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
