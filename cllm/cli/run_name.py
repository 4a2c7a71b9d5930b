"""Which folder a run lives in when none was named: runs/NAME after the data, or a name of its own where that one belongs to other data.

The same command finds its run again, and two that only look alike (a/books and b/books, books/ and books.txt) never meet in one folder.
"""

import hashlib
import os
import re
import time
import unicodedata
from contextlib import ExitStack
from pathlib import Path

from cllm.config.toml import read_toml
from cllm.monitor.guards import RunLock
from cllm.runtime.errors import CheckpointError, CLLMError
from cllm.train.run_place import CONFIG, holds_run

RUNS = Path("runs")
_LONGEST = 80  # bytes of a name: room for a suffix, and for what tools append, within the 255 of a file system
_PATIENCE = 2.0  # seconds until a process that has just taken a folder has written whose it is


def default_run(data: str) -> Path:
    """The folder below runs/ for the run that learns from `data`: the one that it has already, or a free one."""
    named, own = RUNS / name_of(data), RUNS / f"{name_of(data)}-{_suffix(data)}"
    older = RUNS / (re.sub(r"[^A-Za-z0-9._-]+", "-", Path(os.path.abspath(data)).stem).strip("-.") or "run")  # of older versions
    for each in (own, named, older):
        if _belongs(each, data):
            return each
    return named if data_of(named) is None else own


def take_folder(out: Path | None, data: str, held: ExitStack) -> tuple[Path, RunLock]:
    """The folder of the run that learns from `data` (`out` where it was named) and its lock, which `held` lets go. Nothing is written yet.

    Raises CheckpointError where another process trains that run.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        run = default_run(data) if out is None else out
        lock = RunLock(run, sign=False)
        try:
            held.enter_context(lock)
        except CheckpointError:
            if out is not None or _belongs(run, data) or time.monotonic() > until:
                raise
        else:
            if out is not None or data_of(run) is None or _belongs(run, data):
                return run, lock
            held.pop_all().close()  # another command took the name between the look and the lock
            if time.monotonic() > until:
                raise CheckpointError(f"{run} is taken again and again by runs of other data. Name another folder with --out.")
        time.sleep(0.05)


def data_of(run: Path) -> str | None:
    """The place of the data that the run in a folder learns from; None where there is no run, or none that can be read."""
    if not holds_run(run):
        return None
    from cllm.train.run_folder import stored_run  # imports torch, which takes seconds

    try:
        stored = stored_run(run)
        if stored is not None:
            return stored.config.data.path
    except CLLMError:
        pass  # all its checkpoints are damaged: the settings tell
    try:
        path = read_toml(run / CONFIG).get("data.path")
        return path if isinstance(path, str) else None
    except CLLMError:
        return None


def same_place(one: str, other: str) -> bool:
    """Whether two paths name one place, however they are written."""
    return os.path.abspath(one) == os.path.abspath(other) or os.path.realpath(one) == os.path.realpath(other)


def _belongs(run: Path, data: str) -> bool:
    place = data_of(run)
    return place is not None and same_place(place, data)


def name_of(data: str) -> str:
    """A readable name of letters (of any script), digits and . _ - that is safe as a folder and after a command."""
    path = Path(os.path.abspath(data))
    plain = unicodedata.normalize("NFC", path.name if path.is_dir() else path.stem)
    # Marks belong to the letters before them in many scripts; everything else that is not a letter or digit would need quoting.
    kept = "".join(c if c.isalnum() or c in "._-" or unicodedata.category(c) in ("Mn", "Mc") else "-" for c in plain)
    name = re.sub(r"-{2,}", "-", kept).strip("-._").encode("utf-8")[:_LONGEST].decode("utf-8", "ignore")
    return name.rstrip("-._") or "run"


def _suffix(data: str) -> str:
    """A few characters that no other path is likely to share."""
    return hashlib.blake2b(os.fsencode(os.path.abspath(data)), digest_size=4).hexdigest()
