"""What the core of the app tells its pages: the list of jobs, the rows of a run, the log of a job."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from cllm.app.jobs import Jobs
from cllm.app.live import Event, Source
from cllm.app.tail import Tail
from cllm.app.workspace import Workspace

METRICS = "metrics.jsonl"


def job_list(jobs: Jobs) -> Source:
    """The whole list whenever a job has changed."""
    last = [jobs.version]

    def look() -> list[Event]:
        version = jobs.version
        if version == last[0]:
            return []
        last[0] = version
        return [{"kind": "jobs", "jobs": jobs.listed()}]

    return look


def run_rows(name: str, workspace: Workspace, state_of: Callable[[str], str | None]) -> Source:
    """The new rows of a run's metrics as they are, and its state whenever that changes. Raises Refused for a place outside the workspace."""
    tail = Tail(workspace.resolve(name, "topics") / METRICS, lines=True)
    last = [state_of(name)]

    def look() -> list[Event]:
        found, state = tail.new(), state_of(name)
        if found is None:
            last[0] = state
            return [{"kind": "reset"}]
        rows = [row for row in map(_row, found.splitlines()) if row is not None]
        if not rows and state == last[0]:
            return []
        last[0] = state
        return [{"kind": "run", "run": name, "rows": rows, "state": state}]

    return look


def job_log(identity: str, jobs: Jobs) -> Source:
    """What a job prints for people. Raises Refused for an unknown one."""
    tail = Tail(jobs.log_of(identity), lines=False)

    def look() -> list[Event]:
        before = tail.place
        found = tail.new()
        if found is None:
            return [{"kind": "reset"}]
        text = found.decode("utf-8", "replace")
        return [{"kind": "log", "job": identity, "text": text, "from": before, "to": tail.place}] if text else []

    return look


def _row(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
