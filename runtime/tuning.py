"""Measured values kept on disk between runs, under a key that names the machine and the versions they were measured with.

The folder is `CLLM_CACHE_DIR`, else `$XDG_CACHE_HOME/cllm`, else `~/.cache/cllm`, else (where none can be written) a temporary one. A damaged
file is measured again, never fatal; a write replaces the whole file at once, so that processes started together cannot tear it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any


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
    place = Path(tempfile.gettempdir()) / f"cllm-cache-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    return place


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
    try:
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=".tuning-")
        with os.fdopen(handle, "w") as file:
            json.dump(values, file, indent=1, sort_keys=True)
        os.replace(beside, path)
    except OSError:
        return


def remembered(key: str, measure: Callable[[], Any], valid: Callable[[Any], bool] = lambda value: value is not None) -> Any:
    """The stored value where it is valid, else a fresh measurement, which is then stored."""
    value = load(key)
    if not valid(value):
        value = measure()
        store(key, value)
    return value
