"""What `cllm train --plan` says of some options: a process that looks, and leaves nothing in the folders of the user.

The text that it has read and packed for a run that there is not yet stays in a folder of the app, so that the next plan for it is quick.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cllm.app import process
from cllm.app.commands import Commands
from cllm.app.process import Files
from cllm.app.workspace import Workspace
from cllm.serve.errors import Refused

_SECONDS = 300.0  # much text is read first
_KEPT = 3  # folders of packed text
_MOST_WAITING = 8


class Planner:
    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._turns = asyncio.Semaphore(1)  # they would measure each other's speed
        self._waiting = 0
        self._running: set[subprocess.Popen[bytes]] = set()
        self._files: Files | None = None  # of the plan that is being made

    async def plan(self, commands: Commands, options: Any, is_gone: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
        """{"text", "plan"}. is_gone: whether nobody waits any more. Raises Refused, also with what the command says is wrong."""
        words = await asyncio.to_thread(self._words, commands, options)
        if self._waiting >= _MOST_WAITING:
            raise Refused(429, "too many plans are being made. Wait for one.", code="rate_limit_exceeded", headers={"Retry-After": "5"})
        self._waiting += 1
        try:
            async with self._turns:
                return await self._run(words, is_gone)
        finally:
            self._waiting -= 1

    def progress(self) -> dict[str, Any] | None:
        """How far the plan is that is being made, as of a job; None where there is none."""
        files = self._files
        return None if files is None else process.figures_of(process.read_progress(files))

    def close(self) -> None:
        for each in list(self._running):
            _end(each)

    def _words(self, commands: Commands, options: Any) -> list[str]:
        """The arguments of the process. Raises Refused."""
        asked = commands.ask("train", options, self._workspace)
        out, data = asked.options.get("out"), asked.options.get("data")
        if out is None or data is None or (self._workspace.root / out).exists():
            return asked.words
        folder = self._workspace.state / "plans"
        folder.mkdir(mode=0o700, exist_ok=True)
        place = folder / hashlib.sha256(os.fsencode(data)).hexdigest()[:16]
        others = sorted((each for each in folder.iterdir() if each != place), key=lambda each: each.stat().st_mtime)
        for each in others[: max(0, len(others) + 1 - _KEPT)]:
            shutil.rmtree(each, ignore_errors=True)
        return commands.find("train").words(asked.options | {"out": place.relative_to(self._workspace.root).as_posix()})

    async def _run(self, words: list[str], is_gone: Callable[[], Awaitable[bool]]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=self._workspace.state / "jobs", prefix="plan-") as folder:
            files = Files(*(Path(folder) / name for name in ("log", "out", "progress")))
            child = await asyncio.to_thread(process.start, [words[0], "--plan", *words[1:]], self._workspace.root, files)
            self._running.add(child)
            self._files = files
            try:
                until = time.monotonic() + _SECONDS
                while child.poll() is None:
                    await asyncio.sleep(0.05)
                    if time.monotonic() > until:
                        raise Refused(504, f"the plan was not ready within {_SECONDS:.0f} seconds.", code="timeout")
                    if await is_gone():
                        raise Refused(408, "nobody waits for the plan any more.", code="client_left")
            finally:
                self._files = None
                _end(child)
                self._running.discard(child)
            found = process.read_result(files, 0)
            text = process.last_lines(files.log, lines=1_000, most=200_000)
        if child.returncode == 0 and found is not None:
            return {"text": text, "plan": found}
        message = str(found["error"]) if found is not None and "error" in found else text or "the plan could not be made."
        raise Refused(400, message, code="invalid_value")


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ends a process with all of its own, and waits for it: it changes nothing, so nothing is lost."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
