"""One declared value: its type, default, limits and one sentence of help, how it is read from text, and what a wrong value is told.

A dataclass declares its settings as fields (`steps: int = setting(100, "Optimizer updates.", at_least=1)`), and `settings_of` gives them back.
Options of the command line, keys of a configuration file and their error messages are made from these declarations.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
import operator
import re
import tomllib
import types
import typing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from cllm.runtime.errors import UserError

_LARGEST = 2**63 - 1  # of whole numbers: what a tensor of them holds
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_LIMITS = {"above": (">", operator.gt), "at_least": (">=", operator.ge), "below": ("<", operator.lt), "at_most": ("<=", operator.le)}
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)


@dataclass(frozen=True)
class Setting:
    name: str
    """How messages call it."""
    types: tuple[type, ...]
    """The types that it takes, without None."""
    help: str
    optional: bool = False
    """Whether it may be None, which means open: derived from other values, or not used."""
    default: Any = None
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    choices: tuple[str, ...] | None = None
    example: Any = None
    """A usual value, which messages suggest."""
    result: bool = True
    """False for what cannot change the weights of a training (threads, logging): a resume may change it."""
    path: bool = False
    """Whether it may name a file or folder, which has to be on this machine."""
    unit: str | None = None
    """What its numbers count, where a form is to show it beside them."""
    flag: str | None = None
    """The name of its option where it is not the setting's own; `from` cannot be a field of Python's."""

    @property
    def option(self) -> str:
        """How it is given on the command line: learning_rate is --learning-rate."""
        return "--" + (self.flag or self.name).replace("_", "-")

    def parse(self, text: str, quotes: bool = False) -> Any:
        """What a text means, by the setting's type; a text that fits no type comes back as it is, for `checked` to refuse.

        Besides what TOML knows: True, yes, on and 1 for true; 1e6 and 1_000 for whole numbers; none for a value that is to stay open.
        With `quotes`, text may be written as TOML writes it.
        """
        word = text.strip()
        if self.optional and word.lower() in ("none", "null"):
            return None
        for kind in self.types:
            try:
                if kind is bool:
                    return _BOOLEANS[word.lower()]
                if kind is str:
                    return _unquoted(word) if quotes else text
                return _whole(word) if kind is int else float(word)
            except (ValueError, KeyError, ArithmeticError):
                continue
        return text

    def read(self, text: str, source: str = "") -> Any:
        """The value that was given as a text, checked. Raises UserError as `checked` does, and for an empty text (an unset variable of a shell)."""
        if not text and str in self.types:
            raise UserError(f"{self.name} is empty{origin(source)}. Give a value, or leave the option out.")
        return self.checked(self.parse(text), source)

    def checked(self, value: Any, source: str = "") -> Any:
        """The value in its declared type and inside its limits. Raises UserError that says what was expected, and from where the value is."""
        got = f"got {shortened(value)}{origin(source)}."
        advice = f" Use a value like {self.example}." if self.example is not None else ""
        if value is None and self.optional:
            return None
        if isinstance(value, Path) and str in self.types:
            value = str(value)
        if isinstance(value, numbers.Real) and not isinstance(value, bool):  # numpy's numbers too
            value = int(value) if isinstance(value, numbers.Integral) else float(value)
        if type(value) is int and float in self.types and int not in self.types and abs(value) <= _LARGEST:
            value = float(value)
        if type(value) is float and int in self.types and float not in self.types and value.is_integer():
            value = int(value)  # TOML's 1e6
        if not any(type(value) is kind for kind in self.types):
            raise UserError(f"{self.name} must be {' or '.join(_WORDS[kind] for kind in self.types)}, {got}{advice}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{self.name} must be a finite number, {got}{advice}")
        for limit, (sign, fits) in _LIMITS.items():
            if getattr(self, limit) is not None and not fits(value, getattr(self, limit)):
                raise UserError(f"{self.name} must be {sign} {getattr(self, limit)}, {got}{advice}")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise UserError(f"{self.name} must be at most {_LARGEST}, {got}{advice}")
        if self.path and isinstance(value, str) and _ADDRESS.match(value):
            raise UserError(f"{self.name} must be a file or folder on this machine, {got} CLLM does not use the network.")
        if self.choices and value not in self.choices:
            near = difflib.get_close_matches(str(value), self.choices, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{self.name} must be one of {', '.join(self.choices)}, {got}{hint}")
        return value


def setting(default: Any, help: str, **more: Any) -> Any:
    """A field of a dataclass that declares a setting; `more` are the fields of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": {"help": help, **more}})


def settings_of(schema: type) -> dict[str, Setting]:
    """The settings that a dataclass declares, by name, in their order. A field that is none (it has no text, as a mapping) is left out."""
    hints = typing.get_type_hints(schema)
    found = {}
    for each in dataclasses.fields(schema):
        if "setting" not in each.metadata:
            continue
        hint = hints[each.name]
        accepted = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        kinds = tuple(kind for kind in accepted if kind is not type(None))
        found[each.name] = Setting(each.name, kinds, optional=len(kinds) < len(accepted), default=each.default, **each.metadata["setting"])
    return found


def _whole(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        number = Decimal(word)
        if not number.is_finite() or number.adjusted() > 18 or number != int(number):
            raise
        return int(number)


def _unquoted(word: str) -> Any:
    """A list is no text either, and is not taken for one."""
    if word[:1] not in ('"', "'", "["):
        return word
    try:
        return tomllib.loads(f"value = {word}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return word


def shortened(value: Any) -> str:
    """A wrong value as a message quotes it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def origin(source: str) -> str:
    """ " (from SOURCE)" for the end of a message, and nothing where a value was not given by anyone."""
    return f" (from {source})" if source and source != "default" else ""
