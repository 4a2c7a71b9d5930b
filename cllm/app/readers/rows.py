"""The rows of a metrics.jsonl in columns. What is known is kept, and a look at a file that grows reads only what is new.

A run that is resumed cuts its file back to a checkpoint (`cllm.monitor.metrics`), which makes it another file; then all of it is read again. A last
line that has no end yet is left for the next look, and lines that are no rows are counted.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cllm.app.readers.columns import FIELDS, MOST_STEPS, PLACE, TRAIN, by_arrow, by_python
from cllm.monitor.records import EvaluationRow, FaultRow, FinalRow, LayersRow, MachineRow, Row, UnknownKindError, row_from_dict
from cllm.report.layers import layer_values

_BLOCK = 4 << 20  # bytes that are read at once
_LONGEST = 16 << 20  # bytes of a line; a row of a model with thousands of layers is far below
_TAIL = 256  # bytes before the place read up to, by which the file is known again
_MOST_EVENTS = 2_000  # faults, and events of the machine, that are kept: the newest


class RunRows:
    """The rows of one file. Not for several threads at once. problems: what could not be read, as sentences."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self._identity: tuple[int, int] | None = None
        self._offset, self._tail, self._is_skipping = 0, b"", False
        self._table, self.num_rows = np.empty((len(FIELDS), 0)), 0
        self._order: np.ndarray | None = None
        self._evaluations: dict[int, EvaluationRow] = {}
        self.final: FinalRow | None = None
        self.events: deque[Row] = deque(maxlen=_MOST_EVENTS)
        self._layers: list[tuple[list[int], dict[str, tuple[list[str], np.ndarray]]]] = []
        self.num_damaged = self.num_foreign = 0
        self._error = ""

    # -- reading -------------------------------------------------------------------------------------------------------

    def update(self) -> None:
        """Reads what has come to the file since the last look. A file that is not there has no rows."""
        self._error = ""
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                if not self._is_same(file, found):
                    self._begin()
                    self._identity = (found.st_dev, found.st_ino)
                if found.st_size > self._offset:
                    file.seek(self._offset)
                    for lines in self._blocks(file):
                        self._take(lines)
        except FileNotFoundError:
            self._begin()
        except OSError as error:
            self._error = f"{self.path.name} could not be read to its end: {(error.strerror or str(error)).lower()}."

    def _is_same(self, file: Any, found: os.stat_result) -> bool:
        """Whether what was read so far still is the beginning of the file."""
        if self._identity != (found.st_dev, found.st_ino) or found.st_size < self._offset:
            return False
        file.seek(self._offset - len(self._tail))
        return file.read(len(self._tail)) == self._tail

    def _blocks(self, file: Any) -> Iterator[list[bytes]]:
        """Whole lines, some megabytes of them at a time. What is left without an end stays unread."""
        rest = b""
        while block := file.read(_BLOCK):
            whole, newline, rest = (rest + block).rpartition(b"\n")
            if newline:
                self._offset += len(whole) + 1
                self._tail = (self._tail + whole[-_TAIL:] + newline)[-_TAIL:]
                lines = whole.split(b"\n")
                if self._is_skipping:  # the end of a line that was too long
                    self._is_skipping = False
                    del lines[0]
                yield lines
            elif len(rest) > _LONGEST:
                self.num_damaged += not self._is_skipping
                self._is_skipping = True
                self._offset += len(rest)
                self._tail, rest = rest[-_TAIL:], b""

    def _take(self, lines: list[bytes]) -> None:
        plain, others = [line for line in lines if line.startswith(TRAIN)], [line for line in lines if not line.startswith(TRAIN)]
        # Training rows in another spelling, of another program, would lose their place among the others.
        columns = by_arrow(plain) if plain and not any(b'"train"' in line for line in others) else None
        if columns is not None:
            lines = others
            self._add(columns, lambda index: json.loads(plain[index]))
        scan = json.JSONDecoder().raw_decode
        trained: list[dict[str, Any]] = []
        layers: list[LayersRow] = []
        for line in lines:
            text = line.decode("utf-8", "replace").strip()
            if not text:
                continue
            try:
                row, end = scan(text, 0)
                if end != len(text) or type(row) is not dict:
                    raise ValueError
                if row.get("kind") == "train":
                    if type(row.get("step")) is not int or not 0 <= row["step"] < MOST_STEPS:
                        raise ValueError
                    trained.append(row)
                else:
                    self._take_other(row_from_dict(row), layers)
            except UnknownKindError:
                self.num_foreign += 1
            except (ValueError, RecursionError):
                self.num_damaged += 1
        if trained:
            self._add(by_python(trained), lambda index: trained[index])
        if layers:
            self._add_layers(layers)

    def _take_other(self, row: Row, layers: list[LayersRow]) -> None:
        if isinstance(row, EvaluationRow):
            self._evaluations[row.step] = dataclasses.replace(row, classes=None, confusion=None)
        elif isinstance(row, LayersRow):
            layers.append(row)
        elif isinstance(row, FinalRow):
            self.final = row
        elif isinstance(row, FaultRow | MachineRow):
            self.events.append(row)

    def _add(self, columns: np.ndarray, row_at: Callable[[int], dict[str, Any]]) -> None:
        end = self.num_rows + columns.shape[1]
        if end > self._table.shape[1]:
            grown = np.empty((len(FIELDS), max(1024, end, self._table.shape[1] * 5 // 4)))
            grown[:, : self.num_rows] = self._table[:, : self.num_rows]
            self._table = grown
        self._table[:, self.num_rows : end] = columns
        for index in np.flatnonzero(columns[PLACE["updated"]] == 0).tolist()[-_MOST_EVENTS:]:
            try:
                self.events.append(row_from_dict(row_at(index)))
            except ValueError:
                continue
        self.num_rows, self._order = end, None

    def _add_layers(self, rows: list[LayersRow]) -> None:
        fields = {}
        for field in ("gradient_norms", "update_ratios"):
            names, steps, values = layer_values(rows, field)
            table = np.full((len(names), len(rows)), np.nan, dtype=np.float32)
            places = {row.step: place for place, row in enumerate(rows)}
            with np.errstate(over="ignore"):
                table[:, [places[step] for step in steps]] = np.array(values, dtype=np.float64).reshape(len(names), len(steps))
            fields[field] = names, table
        self._layers.append(([row.step for row in rows], fields))

    # -- what is known -------------------------------------------------------------------------------------------------

    def column(self, name: str) -> np.ndarray:
        """(steps,) float64 of a field of the training rows, by rising step; NaN where a row does not have it. Of several rows for one step, as a run
        that rolled back leaves them, the last one counts."""
        values = self._table[PLACE[name], : self.num_rows]
        if self._order is None:
            self._order = _last_of_each(self._table[PLACE["step"], : self.num_rows])
        return values if len(self._order) == 0 else values[self._order]

    @property
    def evaluations(self) -> list[EvaluationRow]:
        """By rising step."""
        return [self._evaluations[step] for step in sorted(self._evaluations)]

    def layers(self, field: str) -> tuple[list[str], list[int], np.ndarray]:
        """(names, steps, (names, steps) float32) of "gradient_norms" or "update_ratios", joined layer by layer (`cllm.report.layers`)."""
        names = list(dict.fromkeys(name for _, fields in self._layers for name in fields[field][0]))
        columns: dict[int, tuple[list[str], np.ndarray]] = {}
        for steps, fields in self._layers:
            columns |= {step: (fields[field][0], fields[field][1][:, place]) for place, step in enumerate(steps)}
        found = sorted(columns)
        table = np.full((len(names), len(found)), np.nan, dtype=np.float32)
        places = {name: place for place, name in enumerate(names)}
        for index, step in enumerate(found):
            own, values = columns[step]
            table[[places[name] for name in own], index] = values
        return names, found, table

    @property
    def problems(self) -> list[str]:
        found = [self._error] if self._error else []
        if self.num_damaged:
            found.append(f"{self.num_damaged:,} line{'s' * (self.num_damaged != 1)} of {self.path.name} could not be read and count for nothing.")
        if self.num_foreign:
            found.append(f"{self.num_foreign:,} row{'s' * (self.num_foreign != 1)} of {self.path.name} are of kinds that this version does not know.")
        return found

    @property
    def nbytes(self) -> int:
        """About what is held in memory."""
        layers = sum(table.nbytes for _, fields in self._layers for _, table in fields.values())
        return self._table.nbytes + layers + 1_000 * (len(self._evaluations) + len(self.events)) + 10_000


def _last_of_each(steps: np.ndarray) -> np.ndarray:
    """Where the last row of each step stands, by rising step; empty where the rows are in order already."""
    if len(steps) < 2 or bool(np.all(np.diff(steps) > 0)):
        return np.empty(0, dtype=np.int64)
    _, found = np.unique(steps[::-1], return_index=True)
    return len(steps) - 1 - found
