"""A run's folder as it is. What is damaged, unfinished or of another version is left out and counted, and never stops a report."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cllm.files import reason
from cllm.monitor.records import Environment, EvaluationRow, FaultRow, MachineRow, Row, Sample, TrainRow, UnknownKindError, row_from_dict
from cllm.runtime.errors import UserError

SAMPLES_BYTES = 200_000  # of the end of samples.txt are read
_SEVERAL_IN_A_STEP = (FaultRow, MachineRow)

R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Setting:
    """A setting of a run and where its value came from, empty where the run did not record that."""

    key: str
    value: Any
    source: str


@dataclass(frozen=True)
class Event:
    """Something that happened to a run besides its updates, in words."""

    step: int
    what: str
    action: str
    details: str


@dataclass
class RunData:
    """What is known of a run."""

    folder: Path
    name: str
    metrics: dict[type[Row], list[Row]] = field(default_factory=dict)
    """Rows of each kind in the order of their steps. Of several for one step the last counts, except for faults and the machine."""
    settings: list[Setting] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    environments: list[Environment] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    """The state.json of the newest checkpoint."""
    problems: list[str] = field(default_factory=list)
    """What could not be read, as sentences."""

    def rows(self, kind: type[R]) -> list[R]:
        """The rows of one kind."""
        return self.metrics.get(kind, [])  # type: ignore[return-value]

    @property
    def evaluations(self) -> list[EvaluationRow]:
        return self.rows(EvaluationRow)

    def curve(self, name: str, kind: type[Row] = TrainRow) -> list[tuple[float, float]]:
        """(step, value) of every row of a kind in which this field is a number, nan and inf included."""
        found = ((row.step, getattr(row, name, None)) for row in self.rows(kind))
        return [(float(step), float(value)) for step, value in found if isinstance(value, int | float) and not isinstance(value, bool)]

    def setting(self, key: str) -> Any:
        """The value of a setting; None where it is not set."""
        return next((each.value for each in self.settings if each.key == key), None)

    @property
    def last_step(self) -> int:
        return max((row.step for row in [*self.rows(TrainRow), *self.evaluations]), default=0)

    @property
    def tokens(self) -> float | None:
        """Targets that the run has learnt from."""
        return next((value for _, value in reversed(self.curve("tokens"))), None)

    @property
    def seconds(self) -> float | None:
        """Seconds that the run has trained."""
        return next((value for _, value in reversed(self.curve("seconds")) if math.isfinite(value)), None)

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest validation loss."""
        finite = [(loss, step) for step, loss in self.curve("loss", EvaluationRow) if math.isfinite(loss)]
        return (int(min(finite)[1]), min(finite)[0]) if finite else None

    @property
    def num_parameters(self) -> int | None:
        from cllm.config.model import ModelConfig

        try:
            return ModelConfig.from_dict(self.state["model"]).num_parameters()
        except (KeyError, TypeError, ValueError, AttributeError):
            return None

    def faults(self) -> list[Event]:
        """The steps that went wrong, in order. An update that was left out and that no row of its own tells of is one of them."""
        rows = self.rows(FaultRow)
        told = {row.fault_step for row in rows}
        left_out = (row for row in self.rows(TrainRow) if not row.updated and row.step not in told)
        events = [
            *(Event(row.step, row.event, row.action, _sentence(row.text, row.documents)) for row in rows),
            *(Event(row.step, "update left out", "skip", f"loss {row.loss:.4g}, gradient norm {row.gradient_norm:.4g}") for row in left_out),
        ]
        return sorted(events, key=lambda event: event.step)

    def events(self) -> list[Event]:
        """The steps that went wrong, and what the machine did to the run, in order."""
        machine = [Event(row.step, row.event, row.action, row.text) for row in self.rows(MachineRow)]
        return sorted([*self.faults(), *machine], key=lambda event: event.step)


def _sentence(text: str, documents: Sequence[str]) -> str:
    return f"{text}; documents: {', '.join(documents)}" if documents else text


# -- reading a folder ------------------------------------------------------------------------------------------------------


def read_run(folder: str | Path, name: str | None = None, *, with_metrics: bool = True) -> RunData:
    """Everything that a report needs from a run's folder, or all but the rows of metrics.jsonl, which may be many. Raises UserError when there is no
    run in it."""
    place = Path(folder)
    if not any((place / file).is_file() for file in ("metrics.jsonl", "config.toml")):
        what = "does not exist" if not place.exists() else "holds no run (neither metrics.jsonl nor config.toml)"
        raise UserError(f"{place} {what}. Give the folder of a training run, such as runs/demo.")
    run = RunData(place, name or place.resolve().name)
    if with_metrics:
        _read_metrics(run)
    run.environments = list(_records(place / "environment.jsonl", Environment.from_dict, run.problems))
    run.state = _read_state(place)
    _read_settings(run)
    _read_samples(run)
    return run


def read_runs(folders: Sequence[str | Path]) -> list[RunData]:
    """Several runs, each named by as much of its path as tells them apart. Raises UserError when one is given twice or is no run."""
    places = [Path(folder).resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise UserError("the same run is given twice. Give each run once.")
    depth = 1
    while depth < 20 and len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return [read_run(folder, "/".join(place.parts[-depth:])) for folder, place in zip(folders, places)]


T = TypeVar("T")


def _records(path: Path, read: Callable[[Mapping[str, Any]], T], problems: list[str]) -> Iterator[T]:
    """The records in the lines of a file; lines that `read` does not understand (ValueError) are counted in a sentence."""
    damaged = 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                    if not isinstance(values, dict):
                        raise ValueError
                    record = read(values)
                except (ValueError, RecursionError):
                    damaged += 1
                    continue
                yield record
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path.name} could not be read to its end: {reason(error)}.")
    if damaged:
        lines = f"{damaged:,} line{'s' * (damaged != 1)}"
        problems.append(f"{lines} of {path.name} could not be read and {'were' if damaged != 1 else 'was'} left out.")


def _read_metrics(run: RunData) -> None:
    foreign: dict[str, int] = {}

    def read(values: Mapping[str, Any]) -> Row | None:
        try:
            return row_from_dict(values)
        except UnknownKindError as error:
            foreign[str(error)] = foreign.get(str(error), 0) + 1
            return None

    by_step: dict[type[Row], dict[Any, Row]] = {}
    for number, row in enumerate(_records(run.folder / "metrics.jsonl", read, run.problems)):
        if row is not None:
            key = (row.step, number) if isinstance(row, _SEVERAL_IN_A_STEP) else (row.step, 0)
            by_step.setdefault(type(row), {})[key] = row
    run.metrics = {kind: [rows[key] for key in sorted(rows)] for kind, rows in by_step.items()}
    if foreign:
        kinds = ", ".join(sorted(foreign)[:5])
        run.problems.append(f"{sum(foreign.values()):,} rows of metrics.jsonl are of kinds that this version does not know ({kinds:.100}).")
    if not run.metrics:
        run.problems.append("metrics.jsonl holds no rows yet.")


def _read_settings(run: RunData) -> None:
    """The values of config.toml. Each start of a run records their sources; runs of earlier versions have them in their checkpoints alone."""
    try:
        tree = tomllib.loads((run.folder / "config.toml").read_text("utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        run.problems.append(f"config.toml could not be read: {reason(error)}.")
        return
    stored = run.state.get("sources")
    sources = (run.environments[-1].sources if run.environments else {}) or (stored if isinstance(stored, dict) else {})
    for section, values in tree.items():
        for name, value in values.items() if isinstance(values, dict) else ():
            key = f"{section}.{name}"
            run.settings.append(Setting(key, value, str(sources.get(key, ""))))


def _read_samples(run: RunData) -> None:
    try:
        with open(run.folder / "samples.txt", "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - SAMPLES_BYTES))
            run.samples = Sample.all_in(file.read().decode("utf-8", errors="replace"))
    except OSError:
        return


def _read_state(folder: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint that has one. It is not verified, since only facts for the page are taken from it."""
    for path in sorted(folder.glob("checkpoints/step-*/state.json"), reverse=True):
        try:
            state = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(state, dict):
            return state
    return {}
