"""Pages of the reference that are written from the code itself, so that they cannot differ from it.

Before Sphinx reads its sources, `reference/generated/*.md` is written: settings, commands, rows of metrics.jsonl, environment variables.
Docstrings, which read as Markdown, become reStructuredText on their way into the pages of the Python interface.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from cllm.cli.app import parser
from cllm.config import schema
from cllm.config.setting import Setting, settings_of
from cllm.monitor import records
from cllm.runtime import variables


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write_pages)
    app.connect("autodoc-process-docstring", to_restructured_text)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_pages(app: Sphinx) -> None:
    folder = Path(app.srcdir) / "reference" / "generated"
    folder.mkdir(exist_ok=True)
    pages = {"settings": settings_page(), "commands": commands_page(), "metrics": metrics_page(), "environment": environment_page()}
    for name, text in pages.items():
        page = folder / f"{name}.md"
        if not page.exists() or page.read_text("utf-8") != text:  # an unchanged page is not built again
            page.write_text(text, "utf-8")


def cell(text: object) -> str:
    """Text that may stand in a cell of a table: a bar would end the cell, and angle brackets would be read as HTML."""
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def type_name(hint: Any) -> str:
    """A type as a reader of a file sees it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(type_name, typing.get_args(hint)))
    if hint is type(None):
        return "absent"
    return str(hint) if typing.get_args(hint) else getattr(hint, "__name__", str(hint))


# -- settings ------------------------------------------------------------------------------------------------------------------


def settings_page() -> str:
    lines = [
        "# Settings",
        "",
        "Every setting of `cllm train`, by section. Write it into a TOML file for `--config`, or on the command line as `--set section.key=value`;",
        "those that have a flag can be given by it. `open` means: derived by a rule that `cllm train --plan` prints.",
        "",
    ]
    for name, section in schema.SECTIONS.items():
        lines += [f"## [{name}]", "", "| setting | type | default | meaning |", "|---|---|---|---|"]
        for each in settings_of(section).values():
            key = f"{name}.{each.name}"
            default = schema.MODEL_DEFAULTS.get(key, each.default) if each.default is None else each.default
            shown = "open" if default is None else '""' if default == "" else default
            kind = " or ".join(kind.__name__ for kind in each.types)
            lines.append(f"| `{key}` | {cell(kind)} | {cell(shown)} | {cell(each.help)}{limits(each)} |")
        lines.append("")
    return "\n".join(lines)


def limits(setting: Setting) -> str:
    words = {"above": "> {}", "at_least": "≥ {}", "below": "< {}", "at_most": "≤ {}"}
    found = [form.format(getattr(setting, name)) for name, form in words.items() if getattr(setting, name) is not None]
    if setting.choices:
        found.append("one of " + ", ".join(f"`{choice}`" for choice in setting.choices))
    return f" ({cell(', '.join(found))})" if found else ""


# -- commands ------------------------------------------------------------------------------------------------------------------


def commands_page() -> str:
    root = parser()
    lines = ["# Commands", "", "Exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted with everything saved.", ""]
    for name, command in root.commands.items():
        lines += command_section(f"cllm {name}", command, 2)
    return "\n".join(lines)


def command_section(name: str, command: Any, level: int) -> list[str]:
    lines = [f"{'#' * level} {name}", "", cell((command.help or "").strip()), ""]
    if hasattr(command, "commands"):
        for part, sub in command.commands.items():
            lines += command_section(f"{name} {part}", sub, level + 1)
        return lines
    rows = []
    for parameter in command.params:
        record = getattr(parameter, "help", None) or ""
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        names = ", ".join(f"`{each}`" for each in (*parameter.opts, *parameter.secondary_opts)) or f"`{parameter.name}`"
        if parameter.param_type_name == "argument":
            names = f"`{(parameter.metavar or parameter.name or '').upper()}`"
        default = parameter.default if isinstance(parameter.default, (int, float, str)) and not isinstance(parameter.default, bool) else ""
        rows.append(f"| {names} | {cell(default)} | {cell(record)} |")
    if rows:
        lines += ["| option | default | meaning |", "|---|---|---|", *rows, ""]
    if command.epilog:
        examples = [line.strip() for line in command.epilog.splitlines() if line.strip().startswith("cllm ")]
        if examples:
            lines += ["```sh", *examples, "```", ""]
    return lines


# -- rows of metrics.jsonl -----------------------------------------------------------------------------------------------------


def metrics_page() -> str:
    lines = [
        "# Rows of metrics.jsonl",
        "",
        "One JSON object on each line. `kind` says which of the following it is; a reader must pass over kinds and keys that it does not know.",
        "",
    ]
    for kind, record in (*records.ROWS.items(), ("rounds.jsonl", records.RoundRow)):
        helps = schema.field_docs(record)
        hints = typing.get_type_hints(record)
        lines += [f"## {kind}", "", cell((record.__doc__ or "").strip()), "", "| key | type | meaning |", "|---|---|---|"]
        for each in dataclasses.fields(record):
            lines.append(f"| `{each.name}` | {cell(type_name(hints[each.name]))} | {cell(helps.get(each.name, ''))} |")
        lines.append("")
    return "\n".join(lines)


# -- environment variables -----------------------------------------------------------------------------------------------------


def environment_page() -> str:
    rows = [f"| `{name}` | {cell(meaning)} |" for name, meaning in variables.VARIABLES.items()]
    return "\n".join(["# Environment variables", "", "| variable | meaning |", "|---|---|", *rows, ""])


# -- docstrings ----------------------------------------------------------------------------------------------------------------


def to_restructured_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """An indented block after an empty line is code, as in Markdown; a paragraph of "name: meaning" lines stays one paragraph."""
    found: list[str] = []
    in_code = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not in_code and (not found or not found[-1].strip()):
            found += [".. code-block:: python", ""]
            in_code = True
        elif line.strip() and not indented:
            in_code = False
        found.append(line if in_code else re.sub(r"(?<!`)([*|])(?=[A-Za-z_])", r"\\\1", line))
    lines[:] = found
