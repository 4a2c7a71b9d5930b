"""Training rows as columns of numbers: by pyarrow where it is installed, which takes a third of the time and leaves the other threads their turns.

What it does not take as it stands (NaN by its name, a number that is none, a line that is damaged) is left to Python's reader, line by line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cllm.monitor.records import TrainRow
from cllm.monitor.typed_json import number

# Every field of a training row is a number or a truth value, so each has a column: a new field of the record needs no word here.
FIELDS = tuple(each.name for each in dataclasses.fields(TrainRow))
PLACE = {name: place for place, name in enumerate(FIELDS)}
TRAIN = b'{"kind": "train", '
"""What a training row begins with, as `cllm.monitor.metrics` writes it."""
MOST_STEPS = 2**53  # larger whole numbers are no exact float64
_PLAIN = {int, float, bool, type(None)}


def by_arrow(lines: Sequence[bytes]) -> np.ndarray | None:
    """(fields, lines) float64 of training rows; None where pyarrow is not installed, or finds a line that is not plain."""
    try:
        import pyarrow as pa
        from pyarrow import compute, json
    except ImportError:
        return None
    kinds = {"step": pa.int64(), "updated": pa.bool_()}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in FIELDS])
    content = b"\n".join([*lines, b""])
    try:
        table = json.read_json(
            pa.BufferReader(content),
            read_options=json.ReadOptions(use_threads=False, block_size=len(content) + 1),
            parse_options=json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
        steps = table.column("step")
        limits = compute.min_max(steps).as_py()
        if table.num_rows != len(lines) or steps.null_count or not 0 <= limits["min"] <= limits["max"] < MOST_STEPS:
            return None
        return np.stack([table.column(name).cast(pa.float64()).to_numpy() for name in FIELDS])
    except pa.ArrowException:
        return None


def by_python(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """(fields, rows) float64: NaN for what is no number, and what NaN and infinity are written as."""
    return np.stack([_column([row.get(name) for row in rows]) for name in FIELDS])


def _column(values: list[Any]) -> np.ndarray:
    if set(map(type, values)) <= _PLAIN:
        try:
            return np.array(values, dtype=np.float64)
        except OverflowError:
            pass
    found = (float(each) if isinstance(each, bool) else number(each) for each in values)
    return np.array([np.nan if each is None else each for each in found], dtype=np.float64)
