"""Rows of kind "layers" (a figure for each parameter, at some steps) gathered by layer for a heat map."""

import math
import re
from collections.abc import Sequence
from typing import Any

from cllm.report.reading import number

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?:\.|$)")
_PARTS = re.compile(r"^(?:model|transformer)\.|\.weight$")


def layer_name(parameter: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> layer 3; model.embed_tokens.weight -> embed_tokens."""
    found = _LAYER.search(parameter)
    return f"layer {int(found.group(1))}" if found and len(found.group(1)) < 7 else _PARTS.sub("", parameter)


def layer_values(rows: Sequence[dict[str, Any]], field: str) -> tuple[list[str], list[int], list[list[float | None]]]:
    """(layer names in order of appearance, steps, values[layer][step]). Norms are joined as norms; of ratios the largest counts."""
    found: list[tuple[int, dict[str, float]]] = []
    for row in rows:
        figures = row.get(field)
        if not isinstance(figures, dict):
            continue
        known = {str(name): value for name, raw in figures.items() if (value := number(raw)) is not None}
        if known:
            found.append((row["step"], _joined(known, field)))
    names = list(dict.fromkeys(name for _, layers in found for name in layers))
    return names, [step for step, _ in found], [[layers.get(name) for _, layers in found] for name in names]


def _joined(figures: dict[str, float], field: str) -> dict[str, float]:
    parts: dict[str, list[float]] = {}
    for name, value in figures.items():
        parts.setdefault(layer_name(name), []).append(value)
    if field == "gradient_norms":
        return {name: math.hypot(*values) for name, values in parts.items()}
    return {name: next((value for value in values if not math.isfinite(value)), max(values)) for name, values in parts.items()}
