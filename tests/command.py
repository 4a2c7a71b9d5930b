"""The command as a user types it, in a process of its own: its exit status, what it prints where."""

import codecs
import functools
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
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


def wait_until(happened: Callable[[], object], process: "subprocess.Popen | Started") -> None:
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
    """Runs the command to its end, with these variables in its environment."""
    if any(name.startswith(READ_AT_THE_START) for name in _changes(variables)):
        command = [sys.executable, "-m", "cllm", *map(str, arguments)]
        environment = _environment() | variables
        done = subprocess.run(command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=timeout)
        ran = Ran(done.returncode, done.stdout, done.stderr)
    else:
        started = Started(*arguments, cwd=cwd, stdin=stdin, **variables)
        ran = Ran(started.wait(timeout), *started.communicate())
    assert "Traceback" not in ran.err, ran.err
    return ran


def python(*words: object, cwd: Path | None = None, **variables: str) -> Ran:
    """`python SCRIPT ...` or `python -c CODE ...`, run to its end in a process with the libraries imported."""
    started = start_python(*words, cwd=cwd, **variables)
    return Ran(started.wait(), *started.communicate())


def start_python(*words: object, cwd: Path | None = None, **variables: str) -> "Started":
    if words[0] == "-c":
        return Started(*words[2:], program=str(words[1]), cwd=cwd, **variables)
    return Started(*words, program=_SCRIPT, cwd=cwd, **variables)


_SCRIPT = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# What Python and the libraries read before a command begins: where a test sets it, the command gets a process that is started for it alone.
READ_AT_THE_START = ("PYTHON", "LD_", "OMP_", "MKL_", "OPENBLAS_", "NUMBA_", "TRITON_", "TORCH", "LANG", "LC_")


# No user has these: the tests set them, and torch and CLLM for what they compile in a process of tests.
OURS = ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR",
        *(f"NUMBA_{name}" for name in ("CACHE_DIR", "CPU_FEATURES", "CPU_NAME", "THREADING_LAYER_PRIORITY")))  # fmt: skip


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # as in an activated environment
    return environment


def _changes(variables: dict[str, str]) -> dict[str, str | None]:
    """How the environment of a command differs from that of the server; None for a variable that is not there."""
    before, after = _server().environment, _environment() | variables
    return {name: after.get(name) for name in before | after if before.get(name) != after.get(name)}


def readable(file: int, timeout: float) -> bool:
    poll = select.poll()  # `select.select` takes no descriptor beyond 1,023
    poll.register(file, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


class Started:
    """`cllm`, or a Python program, in a process forked from one with the libraries imported. What it prints goes to `out` and `err` as it comes.

    program: Python code to run instead of the command, with the arguments in `sys.argv`. is_command: it runs the command in the end, and may find
    imported what that begins by importing. variables: what is set in its environment.
    """

    def __init__(
        self,
        *arguments: object,
        program: str | None = None,
        is_command: bool = False,
        cwd: Path | str | None = None,
        stdin: str = "",
        **variables: str,
    ) -> None:
        request = {"program": program, "arguments": [*map(str, arguments)], "folder": str(cwd or Path.cwd()), "variables": _changes(variables)}
        self.out = self.err = ""
        self.returncode: int | None = None
        ours, theirs = [], []
        for ours_reads in (False, True, True, True):  # standard input, output and error; what the server reports: the process, then its exit status
            reading, writing = os.pipe()
            ours.append(reading if ours_reads else writing)
            theirs.append(writing if ours_reads else reading)
        _server().send(request, theirs, is_command or program is None)
        for file in theirs:
            os.close(file)
        self._report = ours[3]
        work = ((_write, ours[0], stdin), (self._read, "out", ours[1]), (self._read, "err", ours[2]))
        self._threads = [threading.Thread(target=function, args=arguments, daemon=True) for function, *arguments in work]
        for thread in self._threads:
            thread.start()
        self.pid = int.from_bytes(os.read(self._report, 4), "little")

    def _read(self, name: str, file: int) -> None:
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")("replace"), translate=True)
        while piece := os.read(file, 1 << 16):
            setattr(self, name, getattr(self, name) + decoder.decode(piece))
        setattr(self, name, getattr(self, name) + decoder.decode(b"", final=True))
        os.close(file)

    def poll(self) -> int | None:
        """Its exit status, minus the number of the signal that ended it; None while it runs."""
        return self._status(0.0)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit status once it has ended; it is killed when it runs for longer."""
        try:
            status = self._status(timeout)
        except BaseException:
            self.kill()
            raise
        if status is None:
            self.kill()
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout, self.out, self.err)
        return status

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """All that it printed, once it has ended: standard output and standard error."""
        self.wait(timeout)
        for thread in self._threads:
            thread.join()
        return self.out, self.err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def read_until(self, words: str, name: str = "err") -> None:
        """Returns once standard error (or `out`) holds these words; fails where it ends before."""
        wait_until(lambda: words in getattr(self, name), self)

    def _status(self, timeout: float) -> int | None:
        if self.returncode is None and readable(self._report, timeout):
            self.returncode = int.from_bytes(os.read(self._report, 4), "little", signed=True)
            os.close(self._report)
        return self.returncode


_LASTING = """
import hashlib, importlib, os, sys, time
module, _, name = sys.argv[1].rpartition(":")
call, stays_in_c = int(sys.argv[2]), sys.argv[3] == "C"
if module:
    owner, _, kind = module.partition("/")
    owner = importlib.import_module(owner)
    owner = getattr(owner, kind) if kind else owner
    original, calls = getattr(owner, name), 0
    def lasting(*args, **kwargs):
        global calls
        calls += 1
        if calls == call:
            os.write(2, b"REACHED\\n")
            while stays_in_c:
                hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # minutes, without the interpreter's lock
            while True:
                time.sleep(0.001)
        return original(*args, **kwargs)
    setattr(owner, name, lasting)
sys.argv[1:] = sys.argv[4:]
from cllm.cli import main
main()
"""


class Lasting(Started):
    """`cllm` in which one function lasts at its call number `call`: it says REACHED on standard error, and then stays where the real one would be.

    stage: MODULE:FUNCTION or MODULE/CLASS:FUNCTION. where: "Python", or "C" for a call that no handler of Python's can interrupt. before: Python code
    that runs first.
    """

    def __init__(self, stage: str, call: int, where: str, *arguments: object, before: str = "") -> None:
        super().__init__(stage, call, where, *arguments, program=before + _LASTING)


class _Server:
    """A running `command_server.py`, and the environment that it was started with."""

    def __init__(self) -> None:
        self.environment = _environment()
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        self._programs, self._commands = (ours for ours, _ in pairs)
        files = [theirs.fileno() for _, theirs in pairs]
        script = Path(__file__).with_name("command_server.py")
        subprocess.Popen([sys.executable, script, *map(str, files)], env=self.environment, pass_fds=files)
        for _, theirs in pairs:
            theirs.close()

    def send(self, request: dict[str, Any], files: list[int], is_command: bool) -> None:
        socket.send_fds(self._commands if is_command else self._programs, [json.dumps(request).encode()], files)


def _write(file: int, text: str) -> None:
    with suppress(BrokenPipeError), open(file, "w") as stream:
        stream.write(text)


@functools.cache
def _server() -> _Server:
    """One for each process of tests."""
    return _Server()


TINY = ("--embed-dim", 32, "--num-layers", 1, "--num-heads", 2, "--seq-len", 32, "--batch-size", 4, "--vocab-size", 320, "--threads", 2)
