"""The declarations of the commands that a job of the app may run, taken from the commands themselves: nothing is written twice."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cllm.app.commands import Command, Commands, Option
from cllm.cli.bench import BENCHMARKS
from cllm.cli.run_name import default_run
from cllm.config.presets import PRESETS
from cllm.config.schema import SETTINGS
from cllm.config.setting import Setting

NAMES = (
    "train", "prepare", "crawl", "evaluate", "export", "tokenizer train", "checkpoint verify", "checkpoint average", "doctor", "bench", "report",
)  # fmt: skip
_SECTIONS = {
    "data": "Data", "model": "Model", "train": "Training", "optim": "Optimizer", "log": "Log", "finetune": "Fine-tuning", "follow": "Go on learning",
}  # fmt: skip
_LEFT_OUT = {
    "train": {
        "config": "a file of settings may name places outside the workspace; give the settings themselves",
        "set": "every setting has an option of its own here",
        "plan": "ask for it with POST /api/plan",
    },
    "prepare": {"runner": "jobs of the app run on this machine"},
    "evaluate": {"tasks": "tasks of lm-evaluation-harness may bring code", "task-path": "tasks of lm-evaluation-harness may bring code"},
}
# What a declaration of the command line alone does not say.
_ARGUMENTS: dict[tuple[str, str], Setting] = {
    ("train", "data"): SETTINGS["data.path"],
    ("train", "preset"): replace(SETTINGS["model.preset"], choices=tuple(PRESETS)),
    ("bench", "benchmark"): Setting("benchmark", (str,), "What to measure.", choices=BENCHMARKS),
    ("crawl", "urls"): Setting("urls", (str,), "Addresses where the crawl begins; none to go on with the one in the folder."),
}
_PATTERNS = {("crawl", "urls"): (r"https?://\S+", "an address that begins with http:// or https://")}
_GROUPS = {"data": "Data", "out": "Output", "resume": "Output", "find-lr": "Training", "follow": "Go on learning", "once": "Go on learning"}


def declared_commands(root: Any) -> Commands:
    """root: the command `cllm` with all its subcommands."""
    return Commands([_command(name, _find(root, name)) for name in NAMES], lambda data: default_run(data).as_posix(), device_of)


def device_of(setting: str) -> str:
    """ "cpu" or "cuda": what a setting of a device means on this machine. PyTorch is asked only where there is a driver."""
    from cllm.runtime.nvml import has_gpu

    return ("cuda" if has_gpu() else "cpu") if setting == "auto" else setting


def _find(root: Any, name: str) -> Any:
    for word in name.split():
        root = root.commands[word]
    return root


def _command(name: str, command: Any) -> Command:
    parameters = inspect.signature(command.callback, eval_str=True).parameters
    settings: Mapping[str, Setting] = getattr(command.callback, "settings", {})
    keys = {each.name: key for key, each in settings.items()}  # some settings of other commands have names alone, and no section
    left_out = _LEFT_OUT.get(name, {})
    arguments: list[Option] = []
    options: list[Option] = []
    for each in command.params:
        flag = next((word for word in each.opts if word.startswith("--")), None)
        if flag in ("--json", "--help") or (flag or "").removeprefix("--") in left_out:
            continue
        key = keys.get(each.name)
        declared = _ARGUMENTS.get((name, each.name)) or (settings[key] if key is not None else _setting(parameters[each.name], each))
        found = _option(name, each, flag, key if key is not None and "." in key else None, declared)
        (arguments if flag is None else options).append(found)
    if name == "train":
        options += _settings_without_a_flag({each.key for each in (*arguments, *options)})
    return Command(name, " ".join((command.help or "").split()), tuple(arguments), tuple(options), left_out)


def _option(command: str, parameter: Any, flag: str | None, key: str | None, declared: Setting) -> Option:
    name = (flag or parameter.name).removeprefix("--").replace("_", "-")
    path = declared.path or declared.flag == "from"
    kind = (
        "path" if path
        else "choice" if declared.choices
        else {bool: "boolean", int: "integer", float: "number"}.get(declared.types[0], "text")
    )  # fmt: skip
    if declared is SETTINGS["data.path"]:
        key = "data.path"
    section = (key or "").partition(".")[0]
    return Option(
        name,
        declared,
        kind,
        flag=flag,
        no_flag=next((word for word in parameter.secondary_opts if word.startswith("--")), None),
        key=key,
        repeated=parameter.nargs == -1 or parameter.multiple,
        required=parameter.required,
        group=_GROUPS.get(name) or _SECTIONS.get(section, "Options") if command == "train" else "Output" if name == "out" else "Options",
        advanced=section == "follow",
        pattern=_PATTERNS.get((command, parameter.name)),
    )


def _settings_without_a_flag(have: set[str | None]) -> list[Option]:
    """The settings of a training that `--set` alone reaches."""
    found = []
    for key, each in SETTINGS.items():
        if key in have:
            continue
        kind = "choice" if each.choices else {bool: "boolean", int: "integer", float: "number"}.get(each.types[0], "text")
        name = each.option.removeprefix("--")
        group = _SECTIONS[key.partition(".")[0]]
        found.append(Option(name, each, "path" if each.path else kind, key=key, by_key=True, group=group, advanced=True))
    return found


def _setting(parameter: inspect.Parameter, option: Any) -> Setting:
    """The setting that an option was declared with (`cllm.cli.options`), with its default; made from its type where it is a plain flag or text."""
    info = next(iter(getattr(parameter.annotation, "__metadata__", ())), None)
    declared = getattr(getattr(info, "parser", None), "declared", None)
    default = None if parameter.default is inspect.Parameter.empty else parameter.default
    default = str(default) if default is not None and not isinstance(default, bool | int | float) else default
    if declared is None:
        declared = Setting(parameter.name, (bool if option.is_flag else str,) if hasattr(option, "is_flag") else (str,), "")
    return replace(declared, help=option.help or declared.help, default=default)
