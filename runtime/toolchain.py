"""What Triton needs beside a GPU: a C compiler and Python's headers, with which it builds the functions that launch its kernels.

Neither comes with PyTorch or Triton, and without them the first kernel of a run ends it.
"""

import os
import shutil
import subprocess
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path

INSTALL = "Debian and Ubuntu: apt install gcc python3-dev; Fedora: dnf install gcc python3-devel; conda: conda install gcc"
_SOURCE = "#include <Python.h>\n#include <stdlib.h>\nint answer(void) { return PY_MAJOR_VERSION; }\n"
_SECONDS = 60.0  # a compiler that takes longer hangs


def compiler() -> str | None:
    """The C compiler that Triton would run: what CC names, else gcc, else clang; None where there is none."""
    named = os.environ.get("CC")
    return shutil.which(named) if named is not None else shutil.which("gcc") or shutil.which("clang")


def headers() -> Path:
    """The folder in which Triton expects Python.h."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"])


def obstacle() -> str:
    """Why Triton could not launch a kernel on this machine, and what to install; empty where it could."""
    return _obstacle(os.environ.get("CC"), os.environ.get("PATH"), str(headers()))


@lru_cache(maxsize=8)
def _obstacle(named: str | None, path: str | None, include: str) -> str:
    if os.name == "nt":  # Triton for Windows brings a compiler of its own
        return ""
    found = compiler()
    if found is None:
        what = "no C compiler (gcc or clang) is installed" if named is None else f"CC names {named!r}, which is no program that can be run"
        return f"{what}, and Triton builds the launchers of its kernels with one ({INSTALL})"
    if not (Path(include) / "Python.h").is_file():
        return f"Python.h is not in {include}, and Triton builds the launchers of its kernels with it ({INSTALL})"
    try:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "launcher.c").write_text(_SOURCE)
            command = [found, "launcher.c", "-shared", "-fPIC", f"-I{include}", "-o", "launcher.so"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the C compiler {found}, with which Triton builds the launchers of its kernels, cannot be run: {error}"
    if done.returncode == 0:
        return ""
    said = next((line for line in done.stderr.splitlines() if "error" in line.lower()), done.stderr.strip()[-200:] or f"status {done.returncode}")
    return f"the C compiler {found}, with which Triton builds the launchers of its kernels, does not work: {said.strip()} ({INSTALL})"
