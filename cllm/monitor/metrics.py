"""What a run measured: one JSON object per line in metrics.jsonl, and the same numbers for TensorBoard where tensorboardX is installed.

Each row has `kind` (train, eval, event for what went wrong, machine for what the machine did) and `step` (updates done). On resume the file is
cut back to the checkpoint, so that a run that was stopped and resumed leaves the same rows as one that was not, apart from the fields that hold
times and the rows of kind machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cllm.files import RUN, new_file, reported
from cllm.monitor.prometheus import PrometheusEndpoint

# Fields that depend on the machine and the hour, not on the training.
TIME_FIELDS = (
    "seconds", "tokens_per_second", "share_of_peak", "memory_bytes", "cpu_share", "time", "data_seconds", "forward_seconds", "backward_seconds",
    "optimizer_seconds", "checkpoint_seconds", "gpu_share",
)  # fmt: skip
BOARD_EVERY = 10  # steps of training between two points on TensorBoard: a row there costs more than all of metrics.jsonl


class Metrics:
    """Appends rows to `run/metrics.jsonl` and to TensorBoard events in `run`."""

    def __init__(self, run: str | Path, tensorboard: bool = False, prometheus_port: int = 0) -> None:
        self.run = Path(run)
        self.path = self.run / "metrics.jsonl"
        self._file: Any = None
        self._board = _tensorboard(self.run) if tensorboard else None
        self.prometheus = PrometheusEndpoint(prometheus_port) if prometheus_port else None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def truncate(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drops the rows that a resumed run, or one that went back to a checkpoint, will write again, and a last line that a kill cut short."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if not self.path.exists():
            return
        with new_file(self.path, RUN) as beside, open(beside, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in read_metrics(self.path) if keep(row))

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One row, on disk when this returns (flushed to the operating system; a checkpoint's rows survive a kill)."""
        row = {"kind": kind, "step": step, **{key: _plain(value) for key, value in values.items()}}
        with reported(self.path, RUN):
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open for the run's whole life)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        if self.prometheus is not None:
            self.prometheus.update(kind, {"step": step, **values})
        if self._board is not None and (kind != "train" or step % BOARD_EVERY == 0):
            for key, value in _scalars(values):
                self._board.add_scalar(f"{kind}/{key}", value, step)

    def histograms(self, kind: str, step: int, tensors: Mapping[str, Any]) -> None:
        """Distributions, for TensorBoard alone."""
        if self._board is not None:
            for name, tensor in tensors.items():
                self._board.add_histogram(f"{kind}/{name}", tensor.numpy(), step)

    def text(self, name: str, step: int, text: str) -> None:
        """A generated sample or the configuration, for TensorBoard alone."""
        if self._board is not None:
            self._board.add_text(name, f"```\n{text}\n```", step)

    def hyperparameters(self, settings: Mapping[str, Any], outcome: Mapping[str, float]) -> None:
        """Settings beside what came of them, for TensorBoard's table of runs."""
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


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become their names."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers among the values, those inside dicts under KEY/KEY."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield prefix + key, value


def read_metrics(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl; lines that are not whole JSON objects are passed over."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and line.endswith("\n"):
                yield row


def _tensorboard(run: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "events"))
