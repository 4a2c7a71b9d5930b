"""Calls of tools: how a model's own chat template writes one is how the model's answer is read.

The template is asked to write a call with known words. What stands around them tells the marks and the names of the fields, so that Hermes', Qwen's,
Llama's and Mistral's ways are read without being listed. A template that writes no JSON there has no calls that can be read.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cllm.runtime.errors import DataError

_KEY, _VALUE = "key_7f3", "value_7f3"
_FIRST, _SECOND = "name_of_tool_7f3", "name_of_tool_8f3"
_decoder = json.JSONDecoder()


@dataclass(frozen=True)
class CallForm:
    """before: the mark in front of calls, "" where the whole answer is one. between: what stands between two calls, None where there is one call at
    most. name, arguments: fields of a call's object. opening: what the template writes in front of the first call, blanks included."""

    before: str
    between: str | None
    name: str
    arguments: str
    opening: str = field(default="", compare=False)

    @property
    def after_opening(self) -> CallForm:
        """The form of an answer that goes on behind `opening` with one call."""
        return CallForm("", None, self.name, self.arguments)


def call_form(written: Callable[[Sequence[dict[str, Any]], bool], str]) -> CallForm | None:
    """The form in which a template writes calls; None where it writes none. written: see `chat_template`."""
    question = {"role": "user", "content": "a"}
    text = _written(written, question, _FIRST)
    found = None if text is None else _call_in(text, _FIRST, 0)
    if text is None or found is None:
        return None
    begin, end, name, arguments = found
    several = _written(written, question, _FIRST, _SECOND)
    second = None if several is None else _call_in(several, _SECOND, begin)
    between = several[end : second[0]].strip() if several is not None and second is not None else None
    return CallForm(text[:begin].strip(), between, name, arguments, text[:begin])


def _written(written: Callable[[Sequence[dict[str, Any]], bool], str], question: dict[str, Any], *names: str) -> str | None:
    """What a template writes for the assistant's calls of these tools; None where it refuses."""
    calls = [
        {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": {_KEY: _VALUE}}} for number, name in enumerate(names)
    ]
    try:
        before = written([question], True)
        text = written([question, {"role": "assistant", "content": "", "tool_calls": calls}], False)
    except DataError:
        return None
    return text[len(before) :] if text.startswith(before) else text


def _call_in(text: str, name: str, begin: int) -> tuple[int, int, str, str] | None:
    """(where the object of a call begins and ends, its fields of the name and the arguments); None where there is no such object."""
    place = text.find(name, begin)
    while place >= 0:
        place = text.rfind("{", 0, place)
        found = _object_at(text, place) if place >= 0 else None
        if found is None:
            continue
        value, end = found
        names = [key for key, each in value.items() if each == name]
        arguments = [key for key, each in value.items() if each in ({_KEY: _VALUE}, json.dumps({_KEY: _VALUE}))]
        if names and arguments:
            return place, end, names[0], arguments[0]
    return None


def read_calls(text: str, form: CallForm) -> tuple[str, list[dict[str, Any]]]:
    """(what the model says beside its calls, the calls in OpenAI's form). A call that is no JSON stays text."""
    begin = text.find(form.before) if form.before else 0
    if begin < 0:
        return text, []
    # A model's blanks are not always the template's.
    marks = [] if form.between is None else (form.between.replace(form.before, f" {form.before} ") if form.before else form.between).split()
    between = None if form.between is None else re.compile(r"\s*" + r"\s*".join(map(re.escape, marks)) + r"\s*")
    place, calls = begin + len(form.before), []
    place += len(text[place:]) - len(text[place:].lstrip())
    while (found := _object_at(text, place)) is not None and isinstance(found[0].get(form.name), str):
        value, place = found
        arguments = value.get(form.arguments, {})
        function = {"name": value[form.name], "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)}
        calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
        behind = None if between is None else between.match(text, place)
        if behind is None:
            break
        place = behind.end()
    return (text[:begin].rstrip(), calls) if calls else (text, [])


def call_schema(tools: Sequence[dict[str, Any]], form: CallForm) -> dict[str, Any]:
    """The JSON schema of the object that calls one of these tools."""
    calls, parameters = [], {}
    for number, function in enumerate(tool["function"] for tool in tools):
        place = f"tool{number}"
        schema = {"type": "object"} | {key: each for key, each in (function.get("parameters") or {}).items() if key != "$schema"}
        parameters[place] = _moved(schema, f"#/$defs/{place}")
        properties = {form.name: {"const": function["name"]}, form.arguments: {"$ref": f"#/$defs/{place}"}}
        calls.append({"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False})
    return {"anyOf": calls, "$defs": parameters}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to its own parts hold where it is a part of another."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + each[1:] if key == "$ref" and isinstance(each, str) and each.startswith("#") else _moved(each, place)
        for key, each in schema.items()
    }


def _object_at(text: str, place: int) -> tuple[dict[str, Any], int] | None:
    if not text.startswith("{", place):
        return None
    try:
        value, end = _decoder.raw_decode(text, place)
    except (ValueError, RecursionError):
        return None
    return value, end
