"""Records as JSON objects, there and back: a dataclass whose fields are numbers, words, truth values, sequences, mappings and other records.

A field that is None is left out. NaN and infinities, which JSON does not have, are written as their names. A file may come from another version or
be damaged, so fields that a type does not know are ignored, an optional field that cannot be read counts as left out, and a record that lacks
a required field is a ValueError.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

_NUMBER_NAMES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class Record:
    """A record that becomes a JSON object and is read back from one."""

    def values(self) -> dict[str, Any]:
        """Every field that is not None, the required ones first."""
        required, optional = _fields_of(type(self))
        return {name: value for name in (*required, *optional) if (value := getattr(self, name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        return plain(self.values())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The record that `to_dict` gave. Raises ValueError where a required field is missing or is not of its type."""
        found, (required, optional) = {}, _fields_of(cls)
        for name, read in required.items():
            if name not in values:
                raise ValueError(f"a {cls.__name__} without {name}")
            found[name] = read(values[name])
        for name, read in optional.items():
            if name in values:
                try:
                    found[name] = read(values[name])
                except ValueError:
                    continue
        return cls(**found)


def plain(value: Any) -> Any:
    """A value for JSON: records and mappings become objects, sequences lists, NaN and infinities their names."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def number(value: Any) -> float | None:
    """A number from JSON, where nan and inf may stand as their names; None for anything else."""
    if isinstance(value, str):
        return _NUMBER_NAMES.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


_Reader = Callable[[Any], Any]


_known: dict[type[Record], tuple[dict[str, _Reader], dict[str, _Reader]]] = {}


def _fields_of(record: type[Record]) -> tuple[dict[str, _Reader], dict[str, _Reader]]:
    """The required and the optional fields of a type, each with what reads its value from JSON."""
    if record not in _known:
        hints = typing.get_type_hints(record)
        required: dict[str, _Reader] = {}
        optional: dict[str, _Reader] = {}
        for each in dataclasses.fields(record):
            has_default = each.default is not dataclasses.MISSING or each.default_factory is not dataclasses.MISSING
            (optional if has_default else required)[each.name] = _reader(hints[each.name])
        _known[record] = required, optional
    return _known[record]


def _reader(hint: Any) -> _Reader:
    """A function from a value of JSON to one of the type `hint`. It raises ValueError for a value of another type."""
    origin, inner = typing.get_origin(hint), [_reader(each) for each in typing.get_args(hint) if each not in (Ellipsis, type(None))]

    def read(value: Any) -> Any:
        if origin in (types.UnionType, typing.Union):
            return None if value is None else inner[0](value)
        if hint is float and (known := number(value)) is not None:
            return known
        if origin is tuple and isinstance(value, list):
            return tuple(inner[0](each) for each in value)
        if origin is dict and isinstance(value, dict):
            return {key: inner[1](each) for key, each in value.items()}
        if isinstance(hint, type) and issubclass(hint, Record) and isinstance(value, dict):
            return hint.from_dict(value)
        if type(value) is hint and not (hint is int and abs(value) >= 2**63):
            return value
        raise ValueError(f"{str(value)[:40]!r} where {hint} was expected")

    return read
