"""Commands that are shown for a person to copy, quoted so that a shell reads them as they are meant."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from cllm.runtime.printable import printable


def command(*words: object) -> str:
    """A command of `cllm`, each word quoted where a shell needs it: command("report", Path("my run")) is "cllm report 'my run'"."""
    return " ".join((program(), *map(quoted, words)))


def program() -> str:
    """What starts this `cllm` again from the same shell: "cllm" where PATH leads to it, otherwise the program as it was started.

    Without an activated environment that is a path such as .venv/bin/cllm, or "python -m cllm". In a program that uses the library it is "cllm".
    """
    started, found = Path(sys.argv[0]), shutil.which("cllm")
    if (started.parent.name, started.name) == ("cllm", "__main__.py"):
        beside = found is not None and os.path.abspath(os.path.dirname(found)) == os.path.abspath(os.path.dirname(sys.executable))
        return "cllm" if beside else f"{quoted(sys.orig_argv[0])} -m cllm"
    if started.name != "cllm" or (found is not None and started.exists() and os.path.samefile(found, started)):
        return "cllm"
    return quoted(sys.argv[0])


def quoted(word: object) -> str:
    """One word of a command.

    A path that begins with a dash gets "./" in front, because it would be taken for an option. What a terminal cannot show as it is (control
    characters, bytes that are no text, characters that its encoding lacks) is written in the shell's own escapes, as in $'a\\x1b.txt'.
    """
    text = str(word)
    if isinstance(word, Path) and text.startswith("-"):
        text = f"./{text}"
    if printable(text) == text and _encodable(text):
        return shlex.quote(text)
    return "$'" + "".join(_escaped(byte) for byte in os.fsencode(text)) + "'"


def _encodable(text: str) -> bool:
    try:
        text.encode(getattr(sys.stderr, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _escaped(byte: int) -> str:
    character = chr(byte)
    return character if 32 <= byte < 127 and character not in "'\\" else f"\\x{byte:02x}"
