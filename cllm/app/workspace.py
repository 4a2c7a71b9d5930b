"""The folder that the app works in, and the only place that a path of a request can lead to."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cllm.runtime.errors import UserError
from cllm.runtime.printable import printable
from cllm.serve.errors import Refused

STATE = ".cllm"  # the app's own files, which no path of a request reaches
_LONGEST = 1_000  # characters of a path; Linux takes 4,096 bytes
_LONGEST_NAME = 255  # bytes of one name of it
_PARTS = ("jobs", "logs", "conversations", "trash", "uploads")


class Workspace:
    """root: the folder, resolved. state: the app's own folder in it, which only the user can read."""

    def __init__(self, root: Path) -> None:
        """Raises UserError where the folder cannot hold the app's files."""
        self.root = root.resolve()
        self.state = self.root / STATE
        try:
            self.state.mkdir(mode=0o700, exist_ok=True)
            if not stat.S_ISDIR(self.state.lstat().st_mode):
                raise UserError(f"{self.state} must be a folder of its own, and no link. Move it away.")
            self.state.chmod(0o700)
            for part in _PARTS:
                (self.state / part).mkdir(mode=0o700, exist_ok=True)
            (self.state / ".gitignore").write_text("*\n")
        except OSError as error:
            words = f"the app cannot keep its files in {self.state}: {error.strerror or error}. Start it in a folder that you can write to."
            raise UserError(words) from error

    @property
    def name(self) -> str:
        return self.root.name or str(self.root)

    def resolve(self, text: object, param: str = "path", *, exists: bool = False) -> Path:
        """The place that a relative path of a request names, without links on the way. "" and "." are the workspace itself.

        Raises Refused (400) for what lies outside (also behind a link), in the app's own folder, or is no path; with `exists` (404) for nothing.
        """
        if not isinstance(text, str):
            raise Refused(400, f"{param} must be a path inside the workspace, as a text.", param=param, code="invalid_path")
        if len(text) > _LONGEST or any(len(os.fsencode(part)) > _LONGEST_NAME for part in text.split("/") if encodable(text)):
            raise Refused(400, f"{param} is too long for a path.", param=param, code="invalid_path")
        if not encodable(text) or any(ord(each) < 32 or ord(each) == 127 for each in text):
            raise Refused(400, f"{param} holds characters that no path may have.", param=param, code="invalid_path")
        if text.startswith(("-", "~")):
            raise Refused(400, f"{param} may not begin with {text[0]}.", param=param, code="invalid_path")
        if text.startswith("/") or ".." in text.split("/"):
            raise _outside(text, param)
        try:
            found = Path(os.path.realpath(self.root / text))
        except (OSError, ValueError):
            raise _outside(text, param) from None
        if not found.is_relative_to(self.root):
            raise _outside(text, param)
        if any(part.casefold() == STATE for part in found.relative_to(self.root).parts):  # also that of a workspace inside this one
            raise Refused(400, f"{param}: {STATE} holds the app's own files. Choose another place.", param=param, code="invalid_path")
        if exists and not found.exists():
            raise Refused(404, f"there is nothing at {printable(text)[:200]}.", param=param, code="not_found")
        return found

    def relative(self, path: Path) -> str:
        """A place in the workspace as requests and replies name it."""
        return path.relative_to(self.root).as_posix()


def encodable(text: str) -> bool:
    """Whether a text is one that a file's name can hold: no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _outside(text: str, param: str) -> Refused:
    words = f"{param}: {printable(text)[:200]!r} leads out of the workspace. Give a path inside it, such as runs/demo."
    return Refused(400, words, param=param, code="invalid_path")
