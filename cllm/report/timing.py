"""Where a run's time went: the parts that its train rows name, or else steps against everything between them."""

import math
from collections.abc import Sequence
from typing import Any

from cllm.report.reading import number

_PREFIXES, _SUFFIX = ("seconds_", "time_"), "_seconds"
_WORDS = ("time", "second")  # in the name of a field that holds {part: seconds}
_NO_PARTS = {"eta", "total", "step", "elapsed"}


def time_split(rows: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, float]], str]:
    """[(part, seconds)] with the largest first, and a sentence on what they are."""
    sums: dict[str, float] = {}
    for row in rows:
        for name, seconds in _parts(row).items():
            sums[name] = sums.get(name, 0.0) + seconds
    if any(sums.values()):
        return sorted(sums.items(), key=lambda part: -part[1]), "Seconds of the recorded steps, added up"
    return _steps_and_rest(rows), "Estimated from the speed of the recorded steps"


def _parts(row: dict[str, Any]) -> dict[str, float]:
    named: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict) and any(word in key for word in _WORDS):
            named.update({str(name): item for name, item in value.items()})
        elif key.startswith(_PREFIXES):
            named[key.partition("_")[2]] = value
        elif key.endswith(_SUFFIX):
            named[key.removesuffix(_SUFFIX)] = value
    known = {name.replace("_", " "): number(value) for name, value in named.items() if name not in _NO_PARTS}
    return {name: value for name, value in known.items() if value is not None and math.isfinite(value) and value >= 0}


def _steps_and_rest(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """A step's seconds are its tokens over its speed; rows that were not written count like the one after them."""
    stepping, before, total = 0.0, 0.0, 0.0
    for row in rows:
        tokens, speed, seconds = (number(row.get(key)) for key in ("tokens", "tokens_per_second", "seconds"))
        if tokens is None or speed is None or seconds is None or not all(map(math.isfinite, (tokens, speed, seconds))) or speed <= 0:
            continue
        stepping += max(0.0, tokens - before) / speed
        before, total = tokens, max(total, seconds)
    if not total:
        return []
    stepping = min(stepping, total)
    return [("training steps", stepping), ("evaluation, checkpoints, samples, start", total - stepping)]
