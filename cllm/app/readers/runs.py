"""The runs of the workspace in a list: of each its state and newest figures. What has not changed since the last look is not read again."""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm.app.readers.inside import problem, read_bytes, read_object, tree_bytes
from cllm.app.readers.inventory import FOLLOWED, RUN, Found, Inventory
from cllm.app.readers.newest import Newest, newest, step_of
from cllm.checkpoint.place import CHECKPOINTS, MANIFEST, step_folder, steps_in
from cllm.monitor.guards import trained_by
from cllm.monitor.records import RoundRow
from cllm.monitor.rounds import ROWS, read_rounds
from cllm.monitor.typed_json import number
from cllm.runtime.errors import CLLMError

METRICS, CONFIG = "metrics.jsonl", "config.toml"
_OF_JOBS = {"pausing": "training", "stopping": "training", "paused": "paused", "failed": "failed", "lost": "failed"}  # what a job says of its run
_ROUND = re.compile(r"(?:^|/)([^/]+)/rounds/0*(\d+)/run$")

Job = Mapping[str, Any]
_Mark = tuple[int, int, int, int]  # device, number, size and time of change of a file


@dataclass
class _Known:
    """What was read of a run, and the marks by which it is seen whether that still holds."""

    marks: dict[str, _Mark | None] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    rounds: list[RoundRow] = field(default_factory=list)
    newest: Newest = field(default_factory=Newest)
    parameters: int | None = None
    bytes_beside: int = 0
    """Of all files but metrics.jsonl."""
    problems: dict[str, str] = field(default_factory=dict)


class Runs:
    """The runs below `root`, which is resolved. For one thread at a time."""

    def __init__(self, root: Path, inventory: Inventory) -> None:
        self._root, self._inventory = root, inventory
        self._known: dict[str, _Known] = {}

    def list(self, jobs: Mapping[str, Job]) -> list[dict[str, Any]]:
        """All runs by path. jobs: the newest job of each run, by the run's path."""
        found = self._inventory.look(RUN, FOLLOWED)
        self._known = {each.path: self._known.get(each.path, _Known()) for each in found}
        return [entry for each in found if (entry := self._entry(each, jobs.get(each.path))) is not None]

    def entry(self, path: str, place: Path, job: Job | None) -> dict[str, Any] | None:
        """One run, as `list` shows it; None where there is none."""
        is_followed = (place / ROWS).exists() or (place / "follow.json").exists()
        return self._entry(Found(path, FOLLOWED if is_followed else RUN, place), job)

    def followed(self) -> dict[str, str]:
        """Of each text that a training in rounds follows, its place below the workspace, the path of that training."""
        found = {}
        for each in self._inventory.look(FOLLOWED):
            try:
                data = read_object(each.place / "follow.json", self._root).get("data")
            except CLLMError:
                continue
            if isinstance(data, str) and "\0" not in data:
                place = Path(os.path.realpath(self._root / data))
                if place.is_relative_to(self._root):
                    found[place.relative_to(self._root).as_posix()] = each.path
        return found

    def _entry(self, found: Found, job: Job | None) -> dict[str, Any] | None:
        known = self._known.setdefault(found.path, _Known())
        self._refresh(found, known)
        is_run = known.settings or known.newest.rows or known.newest.evaluation or known.steps or known.rounds or found.kind == FOLLOWED
        if not is_run and not known.problems:
            return None  # another program's config.toml or checkpoints
        row, evaluation = known.newest.row, known.newest.evaluation
        last_round = next((each for each in reversed(known.rounds) if each.accepted), None)
        step, steps = max(step_of(row), known.steps[-1] if known.steps else 0, 0), _steps(known.settings) or _steps(_part(known.state, "config"))
        state = _state(found.place, known, job, step, steps)
        best = min(_losses(known), default=None)
        pace = known.newest.seconds_per_step()
        return {
            "run": found.path,
            "name": _name(found),
            "kind": found.kind,
            "state": state,
            "job": job.get("id") if job else None,
            "step": step,
            "steps": steps,
            "tokens": _finite(row.get("tokens", known.state.get("tokens"))),
            "loss": _finite(row.get("loss")),
            "val_loss": _finite(evaluation.get("loss", best if last_round is None else last_round.new_after)),
            "best_val_loss": best,
            "bits_per_byte": _finite(evaluation.get("bits_per_byte")),
            "parameters": known.parameters,
            "tokens_per_second": _finite(row.get("tokens_per_second")),
            "eta_seconds": pace * (steps - step) if state == "training" and pace and steps else None,
            "updated": max((mark[3] / 1e9 for mark in known.marks.values() if mark), default=None),
            "size_bytes": known.bytes_beside + known.newest.size,
            "rounds": len(known.rounds) if found.kind == FOLLOWED else None,
            "damaged": " ".join(known.problems.values()) or None,
        }

    def _refresh(self, found: Found, known: _Known) -> None:
        """Reads again what has changed."""
        place, marks = found.place, known.marks
        now = {name: _mark(f"{place}/{name}") for name in (METRICS, CONFIG, CHECKPOINTS, ROWS)}
        metrics = now[METRICS]
        if now[METRICS] != marks.get(METRICS):
            self._read(known, METRICS, lambda: self._read_newest(place, known, marks.get(METRICS), now[METRICS]))
        if now[CONFIG] != marks.get(CONFIG):
            self._read(known, CONFIG, lambda: self._read_settings(place, known))
        if now[CHECKPOINTS] != marks.get(CHECKPOINTS) or not marks:
            self._read(known, CHECKPOINTS, lambda: self._read_checkpoints(place, known))
            known.bytes_beside = tree_bytes(place) - (metrics[2] if metrics else 0)
        if now[ROWS] != marks.get(ROWS):
            self._read(known, ROWS, lambda: self._read_rounds(place, known))
        known.marks = now

    def _read(self, known: _Known, name: str, read: Any) -> None:
        known.problems.pop(name, None)
        try:
            read()
        except CLLMError as error:
            known.problems[name] = str(error).replace(f"{self._root}/", "")

    def _read_newest(self, place: Path, known: _Known, before: Any, now: Any) -> None:
        words = problem(place / METRICS, self._root)
        known.newest = Newest() if words else newest(place / METRICS, known.newest if before and now and _has_grown(before, now) else None)
        if words:
            known.problems[METRICS] = f"{METRICS} {words}."

    def _read_settings(self, place: Path, known: _Known) -> None:
        known.settings = {}
        if (place / CONFIG).exists():
            try:
                tree = tomllib.loads(read_bytes(place / CONFIG, self._root).decode("utf-8"))
            except (ValueError, RecursionError) as error:
                known.problems[CONFIG] = f"{CONFIG} could not be read: {str(error)[:200]}."
                return
            known.settings = tree if isinstance(tree.get("train"), dict) else {}

    def _read_checkpoints(self, place: Path, known: _Known) -> None:
        known.state, known.parameters, known.steps = {}, None, []
        folder = place / CHECKPOINTS
        if not Path(os.path.realpath(folder)).is_relative_to(self._root):
            known.problems[CHECKPOINTS] = f"{CHECKPOINTS} is a link out of the workspace, which is not followed."
            return
        known.steps = steps_in(folder)
        if not known.steps:
            return
        newest_one = step_folder(folder, known.steps[-1])
        if not (newest_one / MANIFEST).is_file():
            known.problems[CHECKPOINTS] = f"the checkpoint of step {known.steps[-1]:,} is not complete."
        known.state = read_object(newest_one / "state.json", self._root)
        known.parameters = num_parameters(known.state.get("model"))

    def _read_rounds(self, place: Path, known: _Known) -> None:
        known.rounds = []
        words = problem(place / ROWS, self._root)
        if words is None:
            known.rounds = read_rounds(place)
        else:
            known.problems[ROWS] = f"{ROWS} {words}."


def num_parameters(model: Any) -> int | None:
    """Of a model's configuration as files hold it; None where it is none."""
    from cllm.config.model import ModelConfig

    try:
        return ModelConfig.from_dict(model).num_parameters()
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def _state(place: Path, known: _Known, job: Job | None, step: int, steps: int | None) -> str:
    if trained_by(place) is not None:
        return "training"
    if not known.newest.rows and not known.steps and not known.rounds:
        return "failed" if job and _OF_JOBS.get(job.get("state", "")) == "failed" else "empty"
    if steps is not None and step >= steps:
        return "finished"
    found = _OF_JOBS.get(job.get("state", "") if job else "", "stopped")
    return "stopped" if found == "training" else found


def _losses(known: _Known) -> list[float]:
    """The lowest validation loss before the newest checkpoint, and the newest one."""
    found = (_finite(_part(known.state, "best").get("loss")), _finite(known.newest.evaluation.get("loss")))
    return [each for each in found if each is not None]


def _name(found: Found) -> str:
    match = _ROUND.search(found.path)
    return f"{match[1]}, round {match[2]}" if match else found.name


def _steps(settings: dict[str, Any]) -> int | None:
    steps = _part(settings, "train").get("steps")
    return steps if type(steps) is int and steps >= 0 else None


def _part(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def _finite(value: Any) -> float | int | None:
    if type(value) is int:
        return value if abs(value) < 2**63 else None
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def _mark(place: str) -> _Mark | None:
    try:
        found = os.stat(place)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _has_grown(before: _Mark, now: _Mark) -> bool:
    return before[:2] == now[:2] and before[2] <= now[2]
