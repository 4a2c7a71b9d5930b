"""The learning rate as a pure function of the step and of immutable settings: nothing is multiplied up over time, so a resume cannot drift.

All shapes rise during the warm-up, never rise after it, and stay within [min_lr, learning_rate] at every step, also beyond the last one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cllm.runtime.errors import UserError

KINDS = ("cosine", "linear", "step", "wsd", "constant")


@dataclass(frozen=True)
class Schedule:
    learning_rate: float
    min_lr: float
    warmup: int
    steps: int
    kind: str = "cosine"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"schedule must be one of {', '.join(KINDS)}, got {self.kind!r}.")
        if not 0.0 <= self.min_lr <= self.learning_rate:
            raise UserError(f"min_lr must be within [0, learning_rate = {self.learning_rate:g}], got {self.min_lr:g}.")
        if self.warmup < 0 or self.steps < 1:
            raise UserError(f"warmup must be >= 0 and steps >= 1, got {self.warmup} and {self.steps}.")


def lr(step: int, schedule: Schedule) -> float:
    """The learning rate of the update number `step` (the first is 0).

    Warm-up: learning_rate * (step + 1) / (warmup + 1), so that the first update already moves.
    Then, with t in [0, 1] the part of the remaining steps that has passed:
      cosine    half a cosine wave down to min_lr (Loshchilov & Hutter 2017)
      linear    a straight line down to min_lr
      step      full until t = 0.8, then 31.6 %, from t = 0.9 on 10 % (DeepSeek-AI 2024)
      wsd       full until t = 0.8, then 1 - sqrt down to min_lr (Haegele et al. 2024)
      constant  stays
    """
    high, low = schedule.learning_rate, schedule.min_lr
    step = max(0, step)
    if step < schedule.warmup:
        rate = high * ((step + 1) / (schedule.warmup + 1))
    else:
        # The last update, number steps - 1, runs at t = 1.
        t = min(1.0, (step - schedule.warmup) / max(1, schedule.steps - 1 - schedule.warmup))
        share = _SHAPES[schedule.kind](t)
        # Written out for 1, where low + (high - low) may round to something else than high.
        rate = high if share == 1.0 else high * share if schedule.kind == "step" else low + (high - low) * share
    return min(high, max(low, rate))


_SHAPES = {
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
    "linear": lambda t: 1.0 - t,
    "step": lambda t: 1.0 if t < 0.8 else 0.316 if t < 0.9 else 0.1,
    "wsd": lambda t: 1.0 if t < 0.8 else 1.0 - math.sqrt((t - 0.8) / (1.0 - 0.8)),
    "constant": lambda t: 1.0,
}
