"""Where a run's time went: the measured parts of its steps, or where those are not known, its steps against everything between them."""

import math
from collections.abc import Sequence

from cllm.monitor.records import TrainRow


def time_split(rows: Sequence[TrainRow]) -> tuple[list[tuple[str, float]], str]:
    """[(part, seconds)] with the largest first, and a sentence on what they are."""
    sums: dict[str, float] = {}
    for row in rows:
        for name, seconds in row.parts().items():
            if math.isfinite(seconds) and seconds >= 0:
                sums[name] = sums.get(name, 0.0) + seconds
    if sums.get("forward"):
        return sorted(sums.items(), key=lambda part: -part[1]), "Seconds of the recorded steps, added up"
    return _steps_and_rest(rows, sums.get("data", 0.0)), "Estimated from the speed of the recorded steps"


def _steps_and_rest(rows: Sequence[TrainRow], data: float) -> list[tuple[str, float]]:
    """The seconds of a step are its targets over its speed. A step without a row counts like the next one that has one.

    data: seconds of making batches, which are outside the steps.
    """
    stepping, before, total = 0.0, 0.0, 0.0
    for row in rows:
        speed = row.tokens_per_second
        if speed is None or not all(map(math.isfinite, (row.tokens, speed, row.seconds))) or speed <= 0:
            continue
        stepping += max(0.0, row.tokens - before) / speed
        before, total = row.tokens, max(total, row.seconds)
    if not total:
        return []
    stepping = min(stepping, total)
    data = min(data, total - stepping)
    parts = [("training steps", stepping), ("data", data), ("evaluation, checkpoints, samples, start", total - stepping - data)]
    return [part for part in parts if part[1] or part[0] != "data"]
