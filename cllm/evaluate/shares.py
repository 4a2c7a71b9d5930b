"""A share of some trials with the interval that it leaves for the true one."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any


@dataclass(frozen=True)
class Share:
    """`hits` of `trials`."""

    hits: int
    trials: int

    @property
    def value(self) -> float | None:
        """None for no trials."""
        return self.hits / self.trials if self.trials else None

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """(low, high) of the true share (Wilson 1927): right also for few trials and for shares near 0 and 1. None for no trials."""
        if not self.trials:
            return None
        z, n, p = NormalDist().inv_cdf(0.5 + confidence / 2), self.trials, self.hits / self.trials
        middle, wide = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, min(p, (middle - wide) / (1 + z * z / n))), min(1.0, max(p, (middle + wide) / (1 + z * z / n)))  # exact at 0 and at 1

    def to_dict(self, confidence: float = 0.95) -> dict[str, Any]:
        return {"hits": self.hits, "trials": self.trials, "share": self.value, "interval": self.interval(confidence)}

    def __str__(self) -> str:
        if not self.trials:
            return "none to judge"
        low, high = self.interval() or (0.0, 1.0)
        return f"{100 * self.hits / self.trials:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
