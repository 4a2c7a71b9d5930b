"""Figures of single parameters, gathered layer by layer for a heat map."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from cllm.monitor.records import LayersRow

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?:\.|$)")
_PARTS = re.compile(r"^(?:model|transformer)\.|\.weight$")

Table = tuple[list[str], list[int], list[list[float | None]]]
"""The names of the rows, the steps of the columns, and values[row][step]."""


def layer_name(parameter: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> layer 3; model.embed_tokens.weight -> embed_tokens."""
    found = _LAYER.search(parameter)
    return f"layer {int(found.group(1))}" if found and len(found.group(1)) < 7 else _PARTS.sub("", parameter)


def layer_values(rows: Sequence[LayersRow], field: Literal["gradient_norms", "update_ratios"]) -> Table:
    """A field of the rows by layer. Norms of a layer's parameters are joined as norms; of ratios the largest counts."""
    return as_table({row.step: _joined(getattr(row, field), field) for row in rows})


def as_table(figures: Mapping[int, Mapping[str, float]]) -> Table:
    """step -> name -> figure as a table whose rows stand in the order in which their names appear. Steps without figures are left out."""
    found = [(step, each) for step, each in figures.items() if each]
    names = list(dict.fromkeys(name for _, each in found for name in each))
    return names, [step for step, _ in found], [[each.get(name) for _, each in found] for name in names]


def _joined(figures: Mapping[str, float], field: str) -> dict[str, float]:
    parts: dict[str, list[float]] = {}
    for name, value in figures.items():
        parts.setdefault(layer_name(name), []).append(value)
    if field == "gradient_norms":
        return {name: math.hypot(*values) for name, values in parts.items()}
    return {name: next((value for value in values if not math.isfinite(value)), max(values)) for name, values in parts.items()}
