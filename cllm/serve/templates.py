"""Chat templates of models from anywhere, rendered in a child process with limits on time, memory and output, and without network or files.

A template is a program. Jinja's sandbox keeps it from the rest of the process, but `{% for %}` in `{% for %}`, `"a" * 10**10` and filters such as
`center` take all the time or memory there is, inside of calls that nothing can interrupt. A process can be ended.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cllm.runtime.errors import DataError
from cllm.serve.template_limits import MOST_CHARACTERS, PATIENCE

# For models without a template: what a model that was trained on text alone has seen of conversations.
PLAIN = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] | trim }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_STOP = "\n\nUser:"  # where such a model goes on with the other's words


class TemplateProcess:
    """Renders templates for any threads, one conversation at a time; a child that took too much is replaced by a new one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._child: Connection | None = None

    def draw(self, template: str, variables: dict[str, Any]) -> str:
        """The text that a template makes of its variables, which JSON can hold. Raises DataError where it does not, or takes more than it may."""
        request = json.dumps({"template": template, "variables": variables}).encode("ascii")
        with self._lock:
            answer = self._ask(request)
        if "error" in answer:
            raise DataError(answer["error"])
        return answer["text"]

    def close(self) -> None:
        with self._lock:
            self._end()

    def _ask(self, request: bytes) -> dict[str, str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._start()
        assert self._child is not None
        try:
            self._child.send_bytes(request)
            if self._child.poll(PATIENCE):
                return json.loads(self._child.recv_bytes(12 * MOST_CHARACTERS))  # an escaped character takes at most 12 bytes
        except (OSError, EOFError):
            pass
        self._end()
        return {"error": "the chat template takes more time or memory than it may, so this conversation cannot be rendered."}

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        home = str(Path(__file__).parents[2])
        path = os.pathsep.join([home, *map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))])
        with theirs:
            # A session of its own, so that Ctrl-C reaches the parent alone; -P, so that no file of the user's folder passes for a module.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "cllm.serve.template_child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                cwd="/",
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
            )
        self._child = Connection(ours.detach())

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._child is not None:
            self._child.close()
        self._process = self._child = None
