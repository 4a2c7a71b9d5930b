"""How much of the validation split a run evaluates, so that all evaluations together take a stated share of the training time.

The share is counted in work and not in measured seconds: the same settings give the same plan on every machine, and a resumed run evaluates the
same tokens as one that was never stopped. Evaluating a token is a forward pass, a third of the forward and backward pass of training on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from cllm.config.schedule import BatchRamp
from cllm.config.schema import LogSection, TrainSection

FORWARD_SHARE = 1 / 3  # of the work of training on the same tokens
LEAST_BATCHES, LEAST_TOKENS = 2, 512  # that every evaluation takes, whatever the budget: the larger of both
CLASSES_SHARE, CLASSES_MOST = 1 / 4, 16384  # of an evaluation's tokens, and at most so many, are looked at by class
CLASSES_COST = 2.0  # forward passes: one, and the whole row of probabilities of each token, which is ranked


class Settings(Protocol):
    """The sections of a `TrainConfig` that a plan follows from."""

    @property
    def train(self) -> TrainSection: ...

    @property
    def log(self) -> LogSection: ...


@dataclass(frozen=True)
class EvaluationPlan:
    """Counted in rows of `train.seq_len` tokens, spread evenly over the validation split, which has `split_rows` of them."""

    num_evaluations: int
    rows: int
    """What each evaluation during the run predicts."""
    class_rows: int
    """Those of which each class of tokens is told; 0 without log.classes."""
    whole_at_end: bool
    """Whether the whole split is evaluated once more at the end."""
    split_rows: int

    @classmethod
    def of(cls, config: Settings, split_rows: int) -> EvaluationPlan:
        """The plan of a configuration whose steps and eval_every are resolved."""
        settings = config.train
        assert settings.steps is not None and settings.eval_every is not None
        trained_rows = BatchRamp(settings.grad_accum, settings.batch_ramp).before(settings.steps) * settings.batch_size
        affordable = settings.eval_budget * trained_rows / FORWARD_SHARE / _cost(config)
        times = -(-settings.steps // settings.eval_every)
        if split_rows * times <= affordable:
            rows, whole_at_end = split_rows, False
        else:
            least = least_rows(config)
            # At most half of the budget for the end; the evaluations during the run, which choose the best checkpoint, share the rest.
            whole_at_end = split_rows <= affordable / 2 and split_rows + times * least <= affordable
            each = (affordable - (split_rows if whole_at_end else 0)) / times
            rows = max(least, int(each) // settings.batch_size * settings.batch_size)  # a part of a batch costs nearly as much as all of it
        rows = min(rows, split_rows)
        return cls(times, rows, class_rows_of(config, rows), whole_at_end and rows < split_rows, split_rows)

    @property
    def forward_rows(self) -> float:
        """The work of all evaluations, in rows of forward passes."""
        each = self.rows + CLASSES_COST * self.class_rows
        return self.num_evaluations * each + (self.split_rows if self.whole_at_end else 0)


def class_rows_of(config: Settings, rows: int) -> int:
    """The rows of an evaluation of `rows` rows of which each class of tokens is told."""
    if not config.log.classes or not rows:
        return 0
    return max(1, min(int(CLASSES_SHARE * rows), CLASSES_MOST // config.train.seq_len))


def least_eval_every(config: Settings) -> int:
    """The least number of steps between evaluations at which the smallest evaluation still keeps to train.eval_budget."""
    each = least_rows(config) * _cost(config) * FORWARD_SHARE  # in rows of training
    return math.ceil(each / config.train.eval_budget / (config.train.grad_accum * config.train.batch_size))


def least_rows(config: Settings) -> int:
    """The rows that every evaluation predicts, whatever the budget, where the split has so many."""
    return max(LEAST_BATCHES * config.train.batch_size, -(-LEAST_TOKENS // config.train.seq_len))


def _cost(config: Settings) -> float:
    """Forward passes that one evaluated token costs, classes included."""
    return 1.0 + (CLASSES_SHARE * CLASSES_COST if config.log.classes else 0.0)
