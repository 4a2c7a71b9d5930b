"""The learning rate and the batch size of each step.

The learning rate is a pure function of the step and of immutable settings: nothing is multiplied up over time, so a resume cannot drift.
Only `Plateau` and `Pace` depend on what was measured; what they decided goes into the checkpoint.

All shapes rise during the warm-up, never rise after it, and stay within [min_lr, learning_rate] at every step, also beyond the last one.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from cllm.config.pace import COOLDOWN, Pace
from cllm.runtime.errors import UserError

KINDS = ("cosine", "linear", "step", "wsd", "constant", "plateau")


@dataclass(frozen=True)
class Schedule:
    learning_rate: float
    min_lr: float
    warmup: int
    steps: int
    kind: str = "cosine"
    pace: Pace | None = None
    """How far the run is at each step, where the clock decides when it ends; None: it ends after `steps`."""

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
    Then, with t in [0, 1] the part of the remaining steps that has passed, or of the run by its pace:
      cosine    half a cosine wave down to min_lr (Loshchilov & Hutter 2017)
      linear    a straight line down to min_lr
      step      full until t = 0.8, then 31.6 %, from t = 0.9 on 10 % (DeepSeek-AI 2024)
      wsd       full until t = 0.8, then 1 - sqrt down to min_lr (Haegele et al. 2024)
      constant  stays
      plateau   stays here; `Plateau` lowers it when the validation loss no longer falls
    """
    high, low = schedule.learning_rate, schedule.min_lr
    step = max(0, step)
    if step < schedule.warmup:
        rate = high * ((step + 1) / (schedule.warmup + 1))
    else:
        # The last update, number steps - 1, runs at t = 1.
        t = min(1.0, (step - schedule.warmup) / max(1, schedule.steps - 1 - schedule.warmup)) if schedule.pace is None else schedule.pace.share(step)
        share = _SHAPES[schedule.kind](t)
        # Written out for 1, where low + (high - low) may round to something else than high.
        rate = high if share == 1.0 else high * share if schedule.kind == "step" else low + (high - low) * share
    return min(high, max(low, rate))


_SHAPES = {
    "cosine": lambda t: 0.5 * (1.0 + math.cos(math.pi * t)),
    "linear": lambda t: 1.0 - t,
    "step": lambda t: 1.0 if t < 0.8 else 0.316 if t < 0.9 else 0.1,
    "wsd": lambda t: 1.0 if t < COOLDOWN else 1.0 - math.sqrt((t - COOLDOWN) / (1.0 - COOLDOWN)),
    "constant": lambda t: 1.0,
    "plateau": lambda t: 1.0,
}


@dataclass
class Plateau:
    """Multiplies the learning rate by `factor` after `patience` evaluations in a row without a loss lower by one part in ten thousand.

    As torch.optim.lr_scheduler.ReduceLROnPlateau with its relative threshold of 1e-4 (its patience is one less than this).
    """

    factor: float
    patience: int
    best: float = math.inf
    waited: int = 0
    reductions: int = 0

    def update(self, loss: float) -> bool:
        """Takes the next evaluation's loss; True when it lowers the learning rate."""
        if loss < self.best * (1 - 1e-4):
            self.best, self.waited = loss, 0
            return False
        self.waited += 1
        if self.waited < self.patience:
            return False
        self.waited, self.reductions = 0, self.reductions + 1
        return True

    def scaled(self, rate: float, min_lr: float) -> float:
        """The learning rate of a step after all reductions so far, never below `min_lr`."""
        return max(min(rate, min_lr), rate * self.factor**self.reductions)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and, before the first evaluation, no best loss: JSON knows no infinity."""
        return {**asdict(self), "best": self.best if math.isfinite(self.best) else None}

    def restore(self, values: dict[str, Any]) -> None:
        """Takes over what was measured before; factor and patience are settings and stay."""
        self.best = math.inf if values["best"] is None else values["best"]
        self.waited, self.reductions = values["waited"], values["reductions"]


@dataclass(frozen=True)
class BatchRamp:
    """Microbatches of each update: from 1 evenly up to `grad_accum` over the first `steps` updates, as GPT-3's batch grew (Brown et al. 2020).

    Small batches suffice while gradients still point the same way (McCandlish et al. 2018). A pure function of the step.
    """

    grad_accum: int
    steps: int = 0

    def size(self, step: int) -> int:
        """Microbatches of update number `step`."""
        return self.grad_accum if step >= self.steps else 1 + (self.grad_accum - 1) * step // self.steps

    def before(self, step: int) -> int:
        """Microbatches of all updates before number `step`, which is the number of its first one."""
        return self._sums[min(step, self.steps)] + self.grad_accum * max(0, step - self.steps)

    def steps_for(self, microbatches: int) -> int:
        """The least number of updates that takes at least so many microbatches."""
        if microbatches <= self._sums[-1]:
            return bisect_left(self._sums, microbatches)
        return self.steps + -(-(microbatches - self._sums[-1]) // self.grad_accum)

    @cached_property
    def _sums(self) -> list[int]:
        return list(accumulate((self.size(step) for step in range(self.steps)), initial=0))
