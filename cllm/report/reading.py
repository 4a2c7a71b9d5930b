"""A run's folder as it is: half-written lines, missing files and fields of other versions are passed over and counted, never fatal."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm.config.schema import FIELDS
from cllm.runtime.errors import UserError

SAMPLES_BYTES = 200_000  # of the end of samples.txt
_NUMBER_NAMES = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "infinity": math.inf, "-infinity": -math.inf}
_COMMENT = re.compile(r"\s#\s(.*)$")


def number(value: Any) -> float | None:
    """A number of metrics.jsonl, where nan and inf are written as their names; None for anything else."""
    if isinstance(value, str):
        return _NUMBER_NAMES.get(value.strip().lower())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@dataclass
class RunData:
    """What is known of a run. `rows`: kind -> rows with their steps, in order of steps, the last one written for a step (all for events)."""

    folder: Path
    name: str
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    settings: list[tuple[str, Any, str]] = field(default_factory=list)  # key, value, source
    samples: list[tuple[str, str]] = field(default_factory=list)  # heading, text
    environments: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)  # of the newest checkpoint
    problems: list[str] = field(default_factory=list)

    @property
    def train(self) -> list[dict[str, Any]]:
        return self.rows.get("train", [])

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return self.rows.get("eval", [])

    def curve(self, key: str, kind: str = "train") -> list[tuple[float, float]]:
        """(step, value) of every row that has a number under this key, nan and inf included."""
        found = ((row["step"], number(row.get(key))) for row in self.rows.get(kind, []))
        return [(float(step), value) for step, value in found if value is not None]

    def setting(self, key: str) -> Any:
        return next((value for name, value, _ in self.settings if name == key), None)

    @property
    def last_step(self) -> int:
        return max((int(row["step"]) for row in [*self.train, *self.evaluations]), default=0)

    @property
    def tokens(self) -> float | None:
        return next((value for _, value in reversed(self.curve("tokens"))), None)

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest validation loss."""
        finite = [(loss, step) for step, loss in self.curve("loss", "eval") if math.isfinite(loss)]
        return (int(min(finite)[1]), min(finite)[0]) if finite else None

    @property
    def num_parameters(self) -> int | None:
        from cllm.config.model import ModelConfig

        try:
            return ModelConfig.from_dict(self.state["model"]).num_parameters()
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def events(self) -> list[dict[str, Any]]:
        """Rows of kind "event", and the steps whose update was left out; without those that an event tells already."""
        told = {row["step"] for row in self.rows.get("event", [])}
        left_out = [
            {"step": row["step"], "event": "update left out", "loss": row.get("loss"), "gradient_norm": row.get("gradient_norm")}
            for row in self.train
            if row.get("updated") is False and row["step"] not in told
        ]
        return sorted([*self.rows.get("event", []), *left_out], key=lambda row: row["step"])


def read_run(folder: str | Path, name: str | None = None) -> RunData:
    """Everything that a report needs from a run's folder. UserError when there is no run."""
    place = Path(folder)
    if not any((place / file).is_file() for file in ("metrics.jsonl", "config.toml")):
        what = "does not exist" if not place.exists() else "holds no run (neither metrics.jsonl nor config.toml)"
        raise UserError(f"{place} {what}. Give the folder of a training run, such as runs/demo.")
    run = RunData(place, name or place.resolve().name)
    _read_metrics(run)
    _read_settings(run)
    _read_samples(run)
    run.environments = [row for row in _json_lines(place / "environment.jsonl", run, "environment.jsonl") if row]
    run.state = _read_state(place)
    return run


def _json_lines(path: Path, run: RunData, name: str) -> Iterator[dict[str, Any]]:
    damaged = 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    yield row
                else:
                    damaged += 1
    except FileNotFoundError:
        return
    except OSError as error:
        run.problems.append(f"{name} could not be read to its end: {error.strerror or error}.")
    if damaged:
        run.problems.append(f"{damaged:,} line{'s' * (damaged != 1)} of {name} could not be read and {'were' if damaged != 1 else 'was'} left out.")


def _read_metrics(run: RunData) -> None:
    by_step: dict[str, dict[int, dict[str, Any]]] = {}
    events: list[dict[str, Any]] = []
    without_step = 0
    for row in _json_lines(run.folder / "metrics.jsonl", run, "metrics.jsonl"):
        kind, step = row.get("kind"), number(row.get("step"))
        if not isinstance(kind, str) or step is None or not abs(step) < 2**53:
            without_step += 1
            continue
        row["step"] = int(step)
        if kind == "event":
            events.append(row)
        else:
            by_step.setdefault(kind, {})[int(step)] = row
    run.rows = {kind: [rows[step] for step in sorted(rows)] for kind, rows in by_step.items()}
    if events:
        run.rows["event"] = sorted(events, key=lambda row: row["step"])
    if without_step:
        run.problems.append(f"{without_step:,} row{'s' * (without_step != 1)} of metrics.jsonl without a kind and a step left out.")
    if not run.rows:
        run.problems.append("metrics.jsonl holds no rows yet.")


def _read_settings(run: RunData) -> None:
    """config.toml names each value's source in the comment behind it, after the help of the setting."""
    path = run.folder / "config.toml"
    try:
        content = path.read_text("utf-8")
        tree = tomllib.loads(content)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        run.problems.append(f"config.toml could not be read: {' '.join(str(error).split())[:200]}.")
        return
    comments: dict[str, str] = {}
    section = ""
    for line in content.splitlines():
        if line.startswith("[") and line.rstrip().endswith("]"):
            section = line.strip()[1:-1]
            continue
        key, equals, rest = line.partition(" = ")
        found = _COMMENT.search(rest)
        if equals and found:
            comments[f"{section}.{key}"] = found.group(1)
    for section, values in tree.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            name = f"{section}.{key}"
            run.settings.append((name, value, _source(name, comments.get(name, ""))))


def _source(key: str, comment: str) -> str:
    help_ = " ".join(str(FIELDS[key].metadata["help"]).split()) if key in FIELDS else ""
    rest = " ".join(comment.split()).removeprefix(help_).strip()
    found = re.search(r"\[(.*)\]$", rest if help_ else rest[rest.rfind(" [") :])
    return found.group(1) if found else "default"


def _read_samples(run: RunData) -> None:
    try:
        with open(run.folder / "samples.txt", "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - SAMPLES_BYTES))
            content = file.read().decode("utf-8", errors="replace")
    except OSError:
        return
    parts = re.split(r"^=== (step [^\n]*)\n", content, flags=re.MULTILINE)
    run.samples = list(zip(parts[1::2], (part.rstrip("\n") for part in parts[2::2])))


def _read_state(folder: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint that has one; only facts for the page, so it is not verified here."""
    for path in sorted(folder.glob("checkpoints/step-*/state.json"), reverse=True):
        try:
            state = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(state, dict):
            return state
    return {}


def read_runs(folders: Sequence[str | Path]) -> list[RunData]:
    """Several runs, each with a name of its own: as much of its path as tells them apart."""
    places = [Path(folder).resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise UserError("the same run is given twice. Give each run once.")
    depth = 1
    while depth < 20 and len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return [read_run(folder, "/".join(place.parts[-depth:])) for folder, place in zip(folders, places)]
