"""The command as a user types it: a subprocess, its exit status, what it prints where."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Seconds after which a command counts as hanging. It guards against a test that never ends, not against a slow machine: beside other work a
# command can take twenty times as long as alone.
PATIENCE = 1500.0


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The object on the last line of stdout; stdout must hold nothing else."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        return json.loads(lines[0])


def wait_for(happened: Callable[[], object]) -> None:
    """Returns as soon as `happened()` is true; fails after PATIENCE."""
    until = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < until, f"nothing happened in {PATIENCE:.0f} s"
        time.sleep(0.02)


def wait_until(happened: Callable[[], object], process: subprocess.Popen) -> None:
    """Returns as soon as `happened()` is true. Fails when the process ends before, with what it printed, or after PATIENCE."""
    until = time.monotonic() + PATIENCE
    while not happened():
        if process.poll() is not None:
            assert happened(), process.communicate()
            return
        assert time.monotonic() < until, f"nothing happened in {PATIENCE:.0f} s"
        time.sleep(0.005)


def lines(path: Path) -> int:
    """Complete lines of a file; 0 while there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def cllm(*arguments: object, cwd: Path | None = None, stdin: str = "", timeout: float = PATIENCE, **variables: str) -> Ran:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # no user has that one
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # as in an activated environment
    environment |= variables
    done = subprocess.run(
        [sys.executable, "-m", "cllm", *map(str, arguments)], cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=timeout
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)


TINY = ("--embed-dim", 32, "--num-layers", 1, "--num-heads", 2, "--seq-len", 32, "--batch-size", 4, "--vocab-size", 320, "--threads", 2)
