"""What takes seconds to make and several processes of tests need is made by the first of them."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder of this process, to be changed as its tests like: a copy of what `make` has made in the first process that asked for this name.
    What it holds may name the folder that it was made in, which stays as it is."""
    here = factory.mktemp(name) / name
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each of several processes has a folder of its own in one of all
        shared = shared.parent
    made, mark = shared / f"made-{name}", shared / f"made-{name}.whole"
    with open(shared / f"made-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not mark.exists():
            shutil.rmtree(made, ignore_errors=True)  # of a process in which `make` failed
            made.mkdir()
            make(made)
            mark.touch()
    shutil.copytree(made, here, symlinks=True)
    return here
