"""The command as a user types it: a subprocess, its exit status, what it prints where."""

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
    """Runs the command to its end. In a process forked from one with the libraries imported, or in one of its own where the test sets variables."""
    server = _server()
    environment = _environment() | variables
    if server is None or environment != server.environment:
        command = [sys.executable, "-m", "cllm", *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=timeout)
        ran = Ran(done.returncode, done.stdout, done.stderr)
    else:
        ran = server.run([*map(str, arguments)], cwd or Path.cwd(), stdin, timeout)
    assert "Traceback" not in ran.err, ran.err
    return ran


def _environment() -> dict[str, str]:
    ours = ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")  # no user has these
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # as in an activated environment
    return environment


class _Server:
    """A running `command_server.py`, for commands with the environment that it was started with."""

    def __init__(self) -> None:
        self.environment = _environment()
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = Path(__file__).with_name("command_server.py")
        with theirs:
            subprocess.Popen([sys.executable, script, str(theirs.fileno())], env=self.environment, pass_fds=[theirs.fileno()])

    def run(self, arguments: list[str], folder: Path, stdin: str, timeout: float) -> Ran:
        typed = json.dumps({"arguments": arguments, "folder": str(folder)}).encode()
        pipes = [os.pipe() for _ in range(4)]  # standard input, output and error; what the server reports: the process, then its exit status
        (their_in, our_in), (our_out, their_out), (our_err, their_err), (report, their_report) = pipes
        socket.send_fds(self._requests, [typed], [their_in, their_out, their_err, their_report])
        for file in (their_in, their_out, their_err, their_report):
            os.close(file)
        with ThreadPoolExecutor(3) as threads:
            threads.submit(_write, our_in, stdin)
            out, err = (threads.submit(_read, file) for file in (our_out, our_err))
            process = int.from_bytes(os.read(report, 4), "little")
            try:
                if not select.select([report], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(["cllm", *arguments], timeout)
                status = int.from_bytes(os.read(report, 4), "little", signed=True)
            except BaseException:
                os.kill(process, signal.SIGKILL)
                raise
            finally:
                os.close(report)
            return Ran(status, out.result(), err.result())


def _write(file: int, text: str) -> None:
    with suppress(BrokenPipeError), open(file, "w") as stream:
        stream.write(text)


def _read(file: int) -> str:
    with open(file) as stream:
        return stream.read()


@functools.cache
def _server() -> _Server | None:
    """One for each process of tests; None where processes cannot be forked or files not be sent to another process."""
    return _Server() if hasattr(os, "fork") and hasattr(socket, "send_fds") else None


TINY = ("--embed-dim", 32, "--num-layers", 1, "--num-heads", 2, "--seq-len", 32, "--batch-size", 4, "--vocab-size", 320, "--threads", 2)
