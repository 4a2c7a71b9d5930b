"""Settings as a TOML file, there and back."""

from __future__ import annotations

import codecs
import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cllm.config.schema import SECTIONS, SETTINGS, full_key
from cllm.files import read_named
from cllm.runtime.errors import UserError


def read_toml(path: str | Path) -> dict[str, Any]:
    """`section.key` -> value of a TOML file with sections, at most two levels deep.

    Raises UserError when the file cannot be read, is no TOML, or holds an unknown section or key.
    """
    try:
        tree = tomllib.loads(_decode(read_named(path)))
    except OSError as error:
        raise UserError(f"cannot read the configuration {str(path)!r}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{str(path)!r} is not valid TOML: byte {error.start} is not {error.encoding.upper()}. Save the file as UTF-8.") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{str(path)!r} is not valid TOML: {error}.") from error
    except RecursionError as error:
        raise UserError(f"{str(path)!r} is nested too deep: a configuration has sections and keys, nothing below.") from error
    values: dict[str, Any] = {}
    for section, content in tree.items():
        if section not in SECTIONS or not isinstance(content, dict):
            near = difflib.get_close_matches(section, SECTIONS, n=1)
            hint = f" Did you mean [{near[0]}]?" if near else f" Put it under one of [{'], ['.join(SECTIONS)}]."
            raise UserError(f"{str(path)!r}: unknown section {section!r}.{hint}")
        for key, value in content.items():
            if isinstance(value, dict):
                raise UserError(f"{str(path)!r}: [{section}.{key}] is too deep: a configuration has sections and keys, nothing below.")
            values[full_key(f"{section}.{key}", f"file {path}")] = value
    return values


def _decode(content: bytes) -> str:
    """TOML is UTF-8; editors on Windows put a byte order mark before it, and PowerShell's `>` writes UTF-16."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig")


def write_toml(values: Mapping[str, Any], sources: Mapping[str, str]) -> str:
    """`section.key` -> value as a TOML file, with the help and the source of each as its comment; an open value is a comment alone."""
    lines = []
    for name in SECTIONS:
        lines.append(f"[{name}]")
        for key, each in SETTINGS.items():
            if not key.startswith(name + "."):
                continue
            value = values[key]
            if value is None and name == "model":
                continue
            source = "" if sources[key] == "default" else f" [{sources[key]}]"
            comment = f"  # {each.help}{source}".replace("\n", " ")
            lines.append(f"{each.name} = {_toml_value(value)}{comment}" if value is not None else f"# {each.name} ={comment}")
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(c, c if ord(c) >= 32 and ord(c) != 127 else f"\\u{ord(c):04x}") for c in str(value)) + '"'
