"""Commands that a program starts, forked from a process that has imported the libraries: each costs what it does, not 2 s of imports.

Forked.asked = serve()      # in a program of `command_server.py`, before anything has started a thread
module.Popen = Forked       # in the module that starts `python ... -m cllm WORDS`
"""

import json
import os
import select
import signal
import socket
import subprocess
import time
from typing import Any

import command_server


def serve() -> socket.socket:
    """Where commands are asked for. They begin in a copy of this process, which ends with it."""
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
    """What is needed of subprocess.Popen. A command gets a session of its own."""

    asked: socket.socket

    def __init__(
        self,
        args: Any,
        *,
        env: dict[str, str],
        cwd: Any = ".",
        stdin: int | None = None,
        stdout: Any = None,
        stderr: Any = None,
        start_new_session: bool = True,
    ) -> None:
        changes = {name: env.get(name) for name in os.environ | env if os.environ.get(name) != env.get(name)}
        words = args[args.index("cllm") + 1 :]
        request = {"program": None, "arguments": words, "folder": os.path.abspath(cwd), "variables": changes}
        self._report, report = os.pipe()
        nothing = os.open(os.devnull, os.O_RDONLY)
        standard = [nothing, *(number if file is None else file.fileno() for number, file in ((1, stdout), (2, stderr)))]
        socket.send_fds(self.asked, [json.dumps(request).encode()], [*standard, report])
        os.close(nothing), os.close(report)
        self.returncode: int | None = None
        self.pid = int.from_bytes(os.read(self._report, 4), "little")

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], 0)[0]:
            self.returncode = int.from_bytes(os.read(self._report, 4), "little", signed=True)
            os.close(self._report)
        return self.returncode

    def wait(self, timeout: float = 1e9) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode
