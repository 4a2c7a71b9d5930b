"""The newest rows of a metrics.jsonl, read from its end: what a list of runs shows of each, without reading the runs."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm.monitor.typed_json import number

_END = 16 << 10  # bytes of the end, which hold some thirty rows as a rule
_LONGEST_END = 4 << 20
_BLOCK = 1 << 20
_FARTHEST = 64 << 20  # bytes from the end in which an evaluation is looked for
_EVALUATION = b'{"kind": "eval"'


@dataclass
class Newest:
    """The training rows and the evaluation at the end of a file, and the size that the file had."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    size: int = 0

    @property
    def row(self) -> dict[str, Any]:
        return self.rows[-1] if self.rows else {}

    def seconds_per_step(self) -> float | None:
        """Over the rows at the end; None where that is not known."""
        first, last = (self.rows[0], self.rows[-1]) if self.rows else ({}, {})
        begin, end = number(first.get("seconds")), number(last.get("seconds"))
        if begin is None or end is None:
            return None
        steps = step_of(last) - step_of(first)
        return (end - begin) / steps if steps > 0 and 0 < end - begin < float("inf") else None


def newest(path: Path, before: Newest | None = None) -> Newest:
    """before: of an earlier look at the same file, which has only grown since. A file that cannot be read has no rows."""
    found, is_found = Newest(evaluation=before.evaluation if before else {}), False
    try:
        with open(path, "rb") as file:
            found.size = begin = file.seek(0, os.SEEK_END)
            length = _END
            while not found.rows and begin and length <= _LONGEST_END:  # a row about the layers of a large model alone is longer than the usual end
                begin = max(0, found.size - length)
                file.seek(begin)
                lines = file.read(found.size - begin).split(b"\n")
                for line in lines[1 if begin else 0 : -1]:  # without the torn first one, and what comes after the last end of a line
                    row = _object(line)
                    if row.get("kind") == "train" and step_of(row) >= 0:
                        found.rows.append(row)
                    elif row.get("kind") == "eval" and step_of(row) >= 0:
                        found.evaluation, is_found = row, True
                length *= 16
            known = before.size if before else 0
            if begin > known and not is_found:
                found.evaluation = _last_evaluation(file, max(known, begin - _FARTHEST), begin) or found.evaluation
    except OSError:
        return found
    return found


def _last_evaluation(file: Any, first: int, end: int) -> dict[str, Any]:
    """The last evaluation that begins between two places of a file."""
    while end > first:
        begin = max(first, end - _BLOCK)
        file.seek(begin)
        block = file.read(end - begin + len(_EVALUATION))
        place = block.rfind(b"\n" + _EVALUATION)
        if place >= 0:
            file.seek(begin + place + 1)
            return _object(file.readline(_BLOCK))
        end = begin
    return {}


def step_of(row: dict[str, Any]) -> int:
    """-1 for what is no step."""
    step = row.get("step")
    return step if type(step) is int and 0 <= step < 2**53 else -1


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
