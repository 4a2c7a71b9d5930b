"""`cllm app` whose jobs are forked from a process that has imported the libraries: a job costs what it does, not 2 s of imports.

Run by `app_browser.py` as a program of `command_server.py`, before anything has started a thread. A job's command line does not show its words, and
nothing of the folder takes the place of a module; `tests/cllm/app/test_app_command.py` starts the app as it is and looks at both.
"""

import json
import os
import select
import signal
import socket
import time
import types
from typing import Any

import command_server


def serve_jobs() -> socket.socket:
    """Where jobs are asked for. They begin in a copy of this process, which ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork():
        theirs.close()
        return ours
    ours.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = command_server.serve(theirs)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    command_server.run(request)
    raise SystemExit


class Forked:
    """What the app needs of subprocess.Popen."""

    jobs: socket.socket

    def __init__(self, command: list[str], *, cwd: Any, env: dict[str, str], stdin: int, stdout: Any, stderr: Any, start_new_session: bool) -> None:
        changes = {name: env.get(name) for name in os.environ | env if os.environ.get(name) != env.get(name)}
        request = {"program": None, "arguments": command[4:], "folder": str(cwd), "variables": changes}
        self._report, report = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        socket.send_fds(self.jobs, [json.dumps(request).encode()], [nothing, stdout.fileno(), stderr.fileno(), report])
        os.close(nothing), os.close(report)
        self.returncode: int | None = None
        self.pid = int.from_bytes(os.read(self._report, 4), "little")

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], 0)[0]:
            self.returncode = int.from_bytes(os.read(self._report, 4), "little", signed=True)
            os.close(self._report)
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


def main() -> None:
    Forked.jobs = serve_jobs()
    from cllm.app import process
    from cllm.cli import main as cllm

    process.subprocess = types.SimpleNamespace(Popen=Forked, DEVNULL=-3)
    cllm()
