"""What a run measured, as curves for a page: buckets with envelopes over steps, tokens or time, and a table of its layers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cllm.app.readers.columns import FIELDS
from cllm.app.readers.envelope import envelope, numbers, starts
from cllm.app.readers.rows import RunRows
from cllm.monitor.typed_json import number

AXES = {"step": "step", "tokens": "tokens", "time": "seconds"}
KEYS = tuple(name for name in FIELDS if name != "step")
MOST_POINTS = 10_000
_MOST_BYTES = 256 << 20  # of all runs that are kept; the one that is asked for stays, however long it is
_FIGURES = ("step", "loss", "unigram_loss", "bits_per_byte", "best", "accuracy", "perplexity", "num_targets", "split_targets")


class Shelf:
    """The rows of the runs that were asked for last, within some memory. For any thread."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[Path, tuple[threading.Lock, RunRows]] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def rows(self, run: Path) -> Iterator[RunRows]:
        """The rows of a run's folder as they are now, for one thread at a time."""
        with self._lock:
            lock, rows = self._kept.setdefault(run, (threading.Lock(), RunRows(run / "metrics.jsonl")))
            self._kept.move_to_end(run)
        with lock:
            rows.update()
            yield rows
        with self._lock:
            while len(self._kept) > 1 and sum(each.nbytes for _, each in self._kept.values()) > self._most_bytes:
                self._kept.popitem(last=False)


def series(
    rows: RunRows, axis: str = "step", keys: Sequence[str] = ("loss",), begin: float | None = None, end: float | None = None, points: int = 1500
) -> dict[str, Any]:
    """Curves of the fields `keys` over an axis of AXES, from `begin` to `end` of it, as at most `points` buckets. A bucket stands at its last row."""
    x = rows.column(AXES[axis])
    chosen = np.isfinite(x)
    if begin is not None:
        chosen &= x >= begin
    if end is not None:
        chosen &= x <= end
    index = np.flatnonzero(chosen)
    if np.any(np.diff(x[index]) < 0):  # a foreign file: a chart needs its points from left to right
        index = index[np.argsort(x[index], kind="stable")]
    begins = starts(len(index), points)
    ends = np.append(begins[1:], len(index)) - 1 if len(begins) else begins
    found: dict[str, Any] = {}
    for key in keys:
        least, largest, mean, nonfinite = envelope(rows.column(key)[index], begins)
        found[key] = {"min": numbers(least), "max": numbers(largest), "mean": numbers(mean), "nonfinite": nonfinite}
    steps = rows.column("step")
    return {
        "x": numbers(x[index][ends]),
        "series": found,
        "evaluations": evaluations(rows, axis, begin, end),
        "rows": len(index),
        "last_step": int(steps[-1]) if len(steps) else 0,
        "problems": rows.problems,
    }


def evaluations(rows: RunRows, axis: str = "step", begin: float | None = None, end: float | None = None) -> list[dict[str, Any]]:
    """The evaluations on this part of the axis. Their tokens and times are those of the last training row before them."""
    steps, tokens, times = (rows.column(name) for name in ("step", "tokens", "seconds"))
    found = []
    for row in rows.evaluations:
        place = int(np.searchsorted(steps, row.step, side="right")) - 1
        values = row.to_dict()
        entry = {name: values.get(name) for name in _FIGURES}
        entry |= {"tokens": float(tokens[place]) if place >= 0 else 0.0, "time": float(times[place]) if place >= 0 else 0.0}
        at = number(entry[axis])
        if at is None:
            continue
        if (begin is None or at >= begin) and (end is None or at <= end):
            found.append({name: None if isinstance(value, str) else value for name, value in entry.items()})
    return found


def layers(rows: RunRows, points: int = 200) -> dict[str, Any]:
    """Figures of each layer as [name][step]. Of neighbouring steps that share a column the largest counts, so that no peak is lost."""
    norm_names, steps, norms = rows.layers("gradient_norms")
    ratio_names, _, ratios = rows.layers("update_ratios")
    names = list(dict.fromkeys([*norm_names, *ratio_names]))
    begins = starts(len(steps), points)
    ends = np.append(begins[1:], len(steps)) - 1 if len(begins) else begins

    def peaks(own: list[str], table: np.ndarray) -> list[list[float | None]]:
        found = {name: numbers(envelope(each.astype(np.float64), begins).largest) for name, each in zip(own, table)}
        return [found.get(name) or [None] * len(begins) for name in names]

    return {
        "steps": [steps[each] for each in ends.tolist()],
        "names": names,
        "gradient_norms": peaks(norm_names, norms),
        "update_ratios": peaks(ratio_names, ratios),
    }
