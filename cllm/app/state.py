"""What all routes of the app share."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cllm.app import sources
from cllm.app.commands import Commands
from cllm.app.jobs import Jobs
from cllm.app.live import Live
from cllm.app.log import Log
from cllm.app.workspace import Workspace

T = TypeVar("T")


@dataclass
class App:
    """threads: of the kernels; None: all cores. closing: called when the app ends, the last one first. state_of_run: the word for what a run does."""

    workspace: Workspace
    commands: Commands
    log: Log
    jobs: Jobs
    live: Live
    threads: int | None = None
    closing: list[Callable[[], None]] = field(default_factory=list)
    state_of_run: Callable[[str], str | None] = lambda run: None

    @classmethod
    def begin(cls, workspace: Workspace, commands: Commands, threads: int | None = None) -> App:
        """Takes over what an earlier app has left running. Raises UserError where another one serves this workspace."""
        log = Log(workspace.state / "logs" / "app.log")
        jobs = Jobs(workspace.root, workspace.state, log)
        app = cls(workspace, commands, log, jobs, Live(log), threads)
        app.state_of_run = lambda run: (jobs.of_run(run) or {}).get("state")
        app.live.register("jobs", lambda name: sources.job_list(jobs))
        app.live.register("run", lambda name: sources.run_rows(name, workspace, lambda run: app.state_of_run(run)))
        app.live.register("log", lambda name: sources.job_log(name, jobs))
        return app

    def __post_init__(self) -> None:
        self._parts: dict[type, Any] = {}
        self._lock = threading.RLock()

    def part(self, kind: Callable[[App], T]) -> T:
        """The one object of a type that several routes share, made as `kind(app)` when it is asked for first."""
        assert isinstance(kind, type)
        with self._lock:
            if kind not in self._parts:
                self._parts[kind] = kind(self)
            return self._parts[kind]

    def close(self) -> None:
        """Lets go of everything. Jobs go on."""
        self.live.close()
        for each in reversed(self.closing):
            each()
        self.jobs.close()
