"""Measured values kept on disk between runs, under a key that names the machine and the versions they were measured with.

The folder is `CLLM_CACHE_DIR`, else `$XDG_CACHE_HOME/cllm`, else `~/.cache/cllm`, else (where none can be written) a temporary one. A damaged
file is measured again, never fatal; a write replaces the whole file at once, so that processes started together cannot tear it.
"""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from cllm.runtime import files, progress


@lru_cache(maxsize=8)
def _usable(choice: str | None, home: str | None) -> Path:
    places = [Path(choice)] if choice else [Path(home)] if home else []
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
        except OSError:
            continue
    place = _temporary()
    wanted = places[0] if places else "the home folder"
    progress.say(f"warning: {wanted} cannot be written; compiled kernels are kept in {place}. Set CLLM_CACHE_DIR to a folder of yours.")
    return place


def _temporary() -> Path:
    """A folder in the temporary one that is ours alone: compiled kernels are code, and others can write beside us there."""
    user = os.getuid() if hasattr(os, "getuid") else None
    place = Path(tempfile.gettempdir()) / f"cllm-cache-{'user' if user is None else user}"
    try:
        place.mkdir(exist_ok=True, mode=0o700)
        about = place.lstat()
        if stat.S_ISDIR(about.st_mode) and (user is None or (about.st_uid == user and not about.st_mode & 0o022)):
            return place
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="cllm-cache-"))


def cache_dir() -> Path:
    """The folder for compiled kernels and measured values; it exists and can be written."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        home = str(Path(base) / "cllm") if base else str(Path.home() / ".cache" / "cllm")
    except RuntimeError:  # no home folder at all
        home = None
    return _usable(os.environ.get("CLLM_CACHE_DIR"), home)


def digest(*parts: object) -> str:
    """A short stable name for what a value depends on."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _file() -> Path:
    return cache_dir() / "tuning.json"


def load(key: str) -> Any:
    """The stored value of `key`, or None (also when the file is missing or damaged)."""
    try:
        values = json.loads(_file().read_text())
    except (OSError, ValueError):
        return None
    return values.get(key) if isinstance(values, dict) else None


def store(key: str, value: Any) -> None:
    """Keep a JSON-able value; a cache that cannot be written costs only the next measurement."""
    path = _file()
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        values = {}
    if not isinstance(values, dict):
        values = {}
    values[key] = value
    text = json.dumps(values, indent=1, sort_keys=True)
    with suppress(OSError):
        files.write_file(path, text.encode())


def remembered(key: str, measure: Callable[[], Any], valid: Callable[[Any], bool] = lambda value: value is not None) -> Any:
    """The stored value where it is valid, else a fresh measurement, which is then stored."""
    value = load(key)
    if not valid(value):
        value = measure()
        store(key, value)
    return value
