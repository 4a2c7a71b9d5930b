"""What a run measured: one row per line in metrics.jsonl, and the same numbers for TensorBoard and Prometheus.

`cllm.monitor.records` has the rows. On resume the file is cut back to the checkpoint, so a run that was stopped and resumed leaves the same rows
as one that was not, apart from the fields that hold times (`TIME_FIELDS`) and the rows of kind "machine".
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cllm.files import RUN, Appender, new_file
from cllm.monitor.prometheus import PrometheusEndpoint
from cllm.monitor.records import TIME_FIELDS, Row

__all__ = ["BOARD_EVERY", "TIME_FIELDS", "Metrics", "last_seconds", "read_metrics"]

BOARD_EVERY = 10  # updates between two points on TensorBoard, where a row costs more than all of metrics.jsonl


class Metrics:
    """Writes the rows of the run in the folder `run`. A context manager that closes what it opened.

    tensorboard: also write events for TensorBoard, where tensorboardX is installed. prometheus_port: where the newest numbers are served on
    this machine; 0 for nowhere.
    """

    def __init__(self, run: str | Path, tensorboard: bool = False, prometheus_port: int = 0) -> None:
        self.run = Path(run)
        self.path = self.run / "metrics.jsonl"
        self._file: Appender | None = None
        self._board = _tensorboard(self.run) if tensorboard else None
        self.prometheus = PrometheusEndpoint(prometheus_port) if prometheus_port else None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def truncate(self, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Keeps only the rows that `keep` accepts and returns the others, which a run that goes on from a checkpoint writes again. A torn last line
        is dropped."""
        if self._file is not None:
            self._file.close()
            self._file = None
        others: list[dict[str, Any]] = []
        if self.path.exists():
            with new_file(self.path, RUN) as beside, open(beside, "w", encoding="utf-8") as file:
                for row in read_metrics(self.path):
                    if keep(row):
                        file.write(json.dumps(row) + "\n")
                    else:
                        others.append(row)
        return others

    def write(self, row: Row) -> None:
        """Adds a row, which survives a kill as soon as this returns. Raises OutputError when the disk does not take it."""
        if self._file is None:
            self._file = Appender(self.path, RUN)
        self._file.write(json.dumps(row.to_dict()) + "\n")
        values = row.values()
        if self.prometheus is not None:
            self.prometheus.update(row.kind, values)
        if self._board is not None and (row.kind != "train" or row.step % BOARD_EVERY == 0):
            for key, value in _scalars({key: value for key, value in values.items() if key != "step"}):
                self._board.add_scalar(f"{row.kind}/{key}", value, row.step)

    def histograms(self, kind: str, step: int, tensors: Mapping[str, Any]) -> None:
        """Distributions by name, for TensorBoard only."""
        if self._board is not None:
            for name, tensor in tensors.items():
                self._board.add_histogram(f"{kind}/{name}", tensor.numpy(), step)

    def text(self, name: str, step: int, text: str) -> None:
        """A text such as a sample, for TensorBoard only."""
        if self._board is not None:
            self._board.add_text(name, f"```\n{text}\n```", step)

    def hyperparameters(self, settings: Mapping[str, Any], outcome: Mapping[str, float]) -> None:
        """The settings and the outcome of the run, for TensorBoard's table of runs."""
        if self._board is not None:
            plain = {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in settings.items()}
            self._board.add_hparams(plain, {f"outcome/{key}": value for key, value in outcome.items()}, name="hparams")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
        if self.prometheus is not None:
            self.prometheus.close()


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers among the values, those of nested mappings under KEY/KEY."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield prefix + key, value


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl as plain values. Lines that are not complete JSON objects are skipped."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and line.endswith("\n"):
                yield row


def last_seconds(run: Path) -> float:
    """The seconds that a run had trained by the newest row that tells them, 0 where there is none."""
    try:
        return max((float(row.get("seconds", 0.0)) for row in read_metrics(run / "metrics.jsonl") if row.get("kind") == "train"), default=0.0)
    except (OSError, TypeError, ValueError):
        return 0.0


def _tensorboard(run: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "events"))
