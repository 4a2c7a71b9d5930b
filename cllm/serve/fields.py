"""The fields of a request, read one by one: type, limits, and an error that names the field.

    fields = Fields(body)
    stream = fields.flag("stream")
    fields.leave({"user": str})              # has no effect here
    fields.finish()                          # what nobody has read is refused

A limit is checked before anything is made of a value, so no client's number decides how much memory is taken.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from cllm.config.setting import Setting, shortened
from cllm.runtime.errors import UserError
from cllm.serve.errors import Refused


class Fields:
    """An object of a request. A field that is null counts as absent, as clients send both."""

    def __init__(self, values: dict[str, Any], where: str = "") -> None:
        self._left = {name: value for name, value in values.items() if value is not None}
        self._known: set[str] = set()
        self._where = where

    def take(self, name: str) -> Any:
        """The value as it came, None where there is none."""
        self._known.add(name)
        return self._left.pop(name, None)

    def refuse(self, name: str, words: str, code: str | None = None) -> Refused:
        """The error that says what is wrong with a field."""
        param = f"{self._where}{name}"
        return Refused(400, f"{param} {words}", param=param, code=code or "invalid_value")

    def text(self, name: str, most: int, default: str | None = None) -> str | None:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.refuse(name, f"must be a text, got {shortened(value)}.", "invalid_type")
        if len(value) > most:
            raise self.refuse(name, f"has {len(value):,} characters, at most {most:,} are taken.")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, f"must be true or false, got {shortened(value)}.", "invalid_type")
        return value

    def whole(self, name: str, least: int, most: int, default: int | None = None) -> int | None:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(name, f"must be a whole number, got {shortened(value)}.", "invalid_type")
        if not least <= value <= most:
            raise self.refuse(name, f"must be a whole number from {least:,} to {most:,}, got {shortened(value)}.")
        return value

    def number(self, name: str, least: float, most: float, default: float | None = None) -> float | None:
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(name, f"must be a number, got {shortened(value)}.", "invalid_type")
        if not least <= value <= most:
            raise self.refuse(name, f"must be a number from {least:g} to {most:g}, got {shortened(value)}.")
        return float(value)

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        value = self.take(name)
        if value is None:
            return default
        if value not in choices:
            raise self.refuse(name, f"must be one of {', '.join(choices)}, got {shortened(value)}.")
        return str(value)

    def objects(self, name: str, most: int) -> list[dict[str, Any]]:
        """A list of objects; empty where there is none."""
        value = self.take(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.refuse(name, f"must be a list of objects, got {shortened(value)}.", "invalid_type")
        if len(value) > most:
            raise self.refuse(name, f"has {len(value):,} entries, at most {most:,} are taken.")
        return value

    def object(self, name: str) -> dict[str, Any] | None:
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(name, f"must be an object, got {shortened(value)}.", "invalid_type")
        return value

    def setting(self, declared: Setting) -> Any:
        """A value with the type and limits of a setting; its default where it is absent."""
        value = self.take(declared.name)
        if value is None:
            return declared.default
        try:
            return declared.checked(value)
        except UserError as error:
            raise Refused(400, str(error), param=declared.name, code="invalid_value") from None

    def leave(self, kinds: Mapping[str, type]) -> None:
        """Takes fields that change nothing here; their values must still be of the type that they should have, by name."""
        for name, kind in kinds.items():
            value = self.take(name)
            if value is not None and not isinstance(value, kind):
                word = {bool: "true or false", str: "a text", dict: "an object"}[kind]
                raise self.refuse(name, f"must be {word}, got {shortened(value)}.", "invalid_type")

    def finish(self) -> None:
        """Raises Refused for a field that nobody has read: a misspelt option must not be silently without effect."""
        for name in self._left:
            near = difflib.get_close_matches(name, self._known, n=1)
            hint = f" Did you mean {near[0]}?" if near else " Leave it out."
            raise Refused(400, f"there is no field {shortened(self._where + name)}.{hint}", param=(self._where + name)[:80], code="unknown_parameter")
