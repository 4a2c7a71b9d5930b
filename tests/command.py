"""The command as a user types it: a subprocess, its exit status, what it prints where."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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


def cllm(*arguments: object, cwd: Path | None = None, stdin: str = "", timeout: float = 240) -> Ran:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # no user has it
    done = subprocess.run(
        [sys.executable, "-m", "cllm", *map(str, arguments)], cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=timeout
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Ran(done.returncode, done.stdout, done.stderr)


TINY = ("--embed-dim", 32, "--num-layers", 1, "--num-heads", 2, "--seq-len", 32, "--batch-size", 4, "--vocab-size", 320, "--threads", 2)
