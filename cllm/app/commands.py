"""What a job may be: the declared options of the commands, and how an object of a request becomes the arguments of a process.

Nothing is handed on as it came. A name has to be declared; a value is read by the declaration of its setting, as on the command line; a path has to
lie in the workspace; no value may begin with a dash. What is left is written as `--name=value`, and arguments stand behind `--`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cllm.app.workspace import Workspace, encodable
from cllm.config.setting import Setting
from cllm.runtime.errors import UserError
from cllm.serve.errors import Refused
from cllm.shell import quoted

_MOST_TEXT = 4_000  # characters of one value
_MOST_ITEMS = 500  # of a list
_MOST_BYTES = 100_000  # of all arguments; a system takes about two million
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
PAUSABLE = frozenset({"train", "crawl"})  # what goes on where it was when the same command is given again
_WRITES_A_MODEL = frozenset({"export", "checkpoint average"})


@dataclass(frozen=True)
class Option:
    """One option or argument of a command. name: as on the command line, without dashes.

    flag: `--name`, or None for an argument, or for a setting that travels as `--set key=value`. no_flag: what says no, where a flag alone says yes.
    pattern: what a text has to look like, and that in words.
    """

    name: str
    declared: Setting
    kind: str
    flag: str | None = None
    no_flag: str | None = None
    key: str | None = None
    by_key: bool = False
    repeated: bool = False
    required: bool = False
    group: str = "Options"
    advanced: bool = False
    pattern: tuple[str, str] | None = None

    def describe(self) -> dict[str, Any]:
        """What a form needs to ask for it."""
        declared, (help, default_text) = self.declared, _split_default(self.declared.help)
        lowest = declared.at_least if declared.at_least is not None else declared.above
        highest = declared.at_most if declared.at_most is not None else declared.below
        default = declared.default
        return {
            "name": self.name,
            "key": self.key,
            "help": help,
            "type": "list" if self.repeated else self.kind,
            "of": self.kind if self.repeated else None,
            "default": default if isinstance(default, int | float | bool | str) and default != "" else None,
            "default_text": default_text,
            "unit": declared.unit,
            "choices": list(declared.choices or ()),
            "min": lowest,
            "max": highest,
            "exclusive_min": declared.at_least is None and declared.above is not None,
            "exclusive_max": declared.at_most is None and declared.below is not None,
            "example": declared.example,
            "optional": not self.required,
            "group": self.group,
            "advanced": self.advanced,
        }

    def read(self, value: Any, workspace: Workspace) -> Any:
        """The value of a request in its declared type, paths as they lie in the workspace; None: not given. Raises Refused."""
        if value is None or value == []:
            return None
        if not self.repeated:
            return self._read_one(value, workspace)
        if not isinstance(value, list):
            value = [value]
        if len(value) > _MOST_ITEMS:
            raise self._wrong(f"has more than {_MOST_ITEMS} entries")
        return [self._read_one(each, workspace) for each in value]

    def words(self, value: Any) -> list[str]:
        """What stands on the command line for a value that was read."""
        if self.repeated:
            return [word for each in value for word in self._word(each)]
        return self._word(value)

    def _word(self, value: Any) -> list[str]:
        if self.by_key:
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else _text(value)
            return [f"--set={self.key}={text}"]
        if isinstance(value, bool):
            word = self.flag if value else self.no_flag
            return [word] if word else []
        return [_text(value) if self.flag is None else f"{self.flag}={_text(value)}"]

    def _read_one(self, value: Any, workspace: Workspace) -> Any:
        if isinstance(value, str):
            self._check_text(value)
        elif not isinstance(value, bool | int | float):
            raise self._wrong("must be a single value, and no list or object" if not self.repeated else "must be a list of values")
        if self.kind == "boolean" and not isinstance(value, bool) and value not in ("true", "false"):
            raise self._wrong("must be true or false")
        try:
            found = self.declared.read(value) if isinstance(value, str) else self.declared.checked(value)
        except UserError as error:
            raise Refused(400, str(error), param=self.name, code="invalid_value") from None
        if isinstance(found, int | float) and not isinstance(found, bool) and found < 0:
            raise self._wrong("may not be below zero")
        if isinstance(found, str) and self.kind == "path":
            workspace.resolve(found, self.name)
            return os.path.normpath(found)
        return found

    def _check_text(self, text: str) -> None:
        if len(text) > _MOST_TEXT:
            raise self._wrong(f"has more than {_MOST_TEXT:,} characters")
        if _CONTROLS.search(text) or not encodable(text):
            raise self._wrong("holds characters that no command takes")
        if text.lstrip().startswith("-"):
            raise self._wrong("may not begin with a dash")
        if self.pattern is not None and not re.fullmatch(self.pattern[0], text):
            raise self._wrong(f"must be {self.pattern[1]}")

    def _wrong(self, why: str) -> Refused:
        return Refused(400, f"{self.name} {why}.", param=self.name, code="invalid_value")


@dataclass(frozen=True)
class Asked:
    """A command that may run. words: its arguments after the program. line: the same for people. run: the folder of a training.
    out: where its result comes to lie. device: that it trains on; None for a command that does not train."""

    command: str
    options: dict[str, Any]
    words: list[str]
    line: str
    title: str
    run: str | None
    out: str | None
    device: str | None


@dataclass(frozen=True)
class Command:
    """name: as it is typed after `cllm`. left_out: names of options that it has and jobs may not give, with the reason."""

    name: str
    help: str
    arguments: tuple[Option, ...]
    options: tuple[Option, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        return {
            "help": self.help,
            "arguments": [each.describe() for each in self.arguments],
            "options": [each.describe() for each in self.options],
            "pausable": self.name in PAUSABLE,
        }

    def read(self, given: Any, workspace: Workspace) -> dict[str, Any]:
        """The options of a request, checked, by their declared names. Raises Refused (400) with `param`."""
        if not isinstance(given, dict):
            raise Refused(400, 'options must be an object such as {"data": "books"}.', param="options", code="invalid_value")
        known = {each.name: each for each in (*self.arguments, *self.options)}
        found: dict[str, Any] = {}
        for name, value in given.items():
            option = known.get(name.replace("_", "-"))
            if option is None:
                raise Refused(400, self._unknown(name, known), param=name[:100], code="unknown_option")
            if option.name in found:
                raise Refused(400, f"{option.name} is given twice.", param=option.name, code="invalid_value")
            found[option.name] = option.read(value, workspace)
        found = {name: value for name, value in found.items() if value is not None}
        for each in known.values():
            if each.required and each.name not in found:
                raise Refused(400, f"{each.name} is missing: {each.declared.help}", param=each.name, code="missing_required_parameter")
        return found

    def words(self, options: Mapping[str, Any]) -> list[str]:
        """The arguments of the process for options that were read."""
        found = self.name.split()
        for each in self.options:
            if each.name in options:
                found += each.words(options[each.name])
        found.append("--json")
        arguments = [word for each in self.arguments if each.name in options for word in each.words(options[each.name])]
        found += ["--", *arguments] if arguments else []
        if sum(len(os.fsencode(word)) + 1 for word in found) > _MOST_BYTES:
            raise Refused(400, "these options are too long for one command.", param="options", code="invalid_value")
        return found

    def _unknown(self, name: str, known: Mapping[str, Option]) -> str:
        from difflib import get_close_matches

        shown = name[:100]
        if (reason := self.left_out.get(name.replace("_", "-"))) is not None:
            return f"{shown} cannot be given here: {reason}."
        near = get_close_matches(name[:100].replace("_", "-"), list(known), n=1)
        return f"{self.name} has no option {shown!r}.{f' Did you mean {near[0]}?' if near else ''}"


class Commands:
    """All that jobs may run. run_of: the folder of the run that learns from some data, where none was named.
    device_of: the device that a setting means: "auto" is a GPU where there is one."""

    def __init__(self, commands: Sequence[Command], run_of: Callable[[str], str], device_of: Callable[[str], str]) -> None:
        self._commands = {each.name: each for each in commands}
        self._run_of, self._device_of = run_of, device_of

    def describe(self) -> dict[str, Any]:
        return {name: each.describe() for name, each in self._commands.items()}

    def find(self, name: Any) -> Command:
        """Raises Refused (400)."""
        found = self._commands.get(name) if isinstance(name, str) else None
        if found is None:
            words = f"command must be one of {', '.join(self._commands)}."
            raise Refused(400, words, param="command", code="unknown_command")
        return found

    def ask(self, name: Any, given: Any, workspace: Workspace) -> Asked:
        """A command of a request, checked. Raises Refused. May take a moment where a run has to be found, so call it in a thread."""
        command = self.find(name)
        options = command.read(given, workspace)
        run = device = None
        if command.name == "train" and not options.get("find-lr"):
            if "out" not in options:
                if "data" not in options:
                    raise Refused(400, "data is missing: the folder or file to learn from.", param="data", code="missing_required_parameter")
                options["out"] = self._run_of(options["data"])
                workspace.resolve(options["out"], "out")
            run = options["out"]
        if "out" in options and workspace.resolve(options["out"], "out") == workspace.root:
            raise Refused(400, "out must be a folder of its own inside the workspace, such as runs/demo.", param="out", code="invalid_path")
        if command.name == "train":
            device = self._device_of(options.get("device", "auto"))
        if command.name in _WRITES_A_MODEL:
            _check_free(options["out"], workspace)
        words = command.words(options)
        shown = [word for word in words if word not in ("--json", "--")]
        line = " ".join(["cllm", *map(quoted, shown)])
        return Asked(command.name, options, words, line, _title(command, options), run, options.get("out"), device)


def _check_free(out: str, workspace: Workspace) -> None:
    """Raises Refused (400) where a model would be written over something: whoever fills in a form does not see what lies there."""
    place = workspace.resolve(out, "out")
    if place.exists() and (place.is_file() or any(place.iterdir())):
        raise Refused(400, f"{out} exists already. Choose another name, or delete what is there on the Models tab first.", param="out", code="exists")


def _title(command: Command, options: Mapping[str, Any]) -> str:
    """ "train books": the command, and what it is about."""
    names = [each.name for each in command.arguments if each.name in options] or ["out"]
    first = options.get(names[0], "")
    about = ", ".join(map(str, first[:3])) + (", ..." if len(first) > 3 else "") if isinstance(first, list) else str(first)
    return f"{command.name} {about}".strip()[:200]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value) if isinstance(value, float) else str(value)


def _split_default(help: str) -> tuple[str, str | None]:
    """The sentence of a declaration, and what it says of a default that is derived: "[default: ...]" or "Default: ..." at its end."""
    match = re.fullmatch(r"(.*?)\s*(?:\[default: (.*)\]|Default: (.*?)\.?)", help, re.DOTALL)
    return (match[1], match[2] or match[3]) if match is not None and match[1] else (help, None)
