"""The end of a run that was given its time (`train.hours`): what the clock decides about it, and what a record says that it decided before."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.config.pace import COOLDOWN, Pace
from cllm.config.train import TrainConfig
from cllm.monitor.metrics import last_seconds
from cllm.train.clock import Clock

if TYPE_CHECKING:
    from cllm.checkpoint.folder import Checkpoint
    from cllm.config.evaluation_plan import EvaluationPlan

WITHOUT_GAIN = 3  # evaluations at the full learning rate after which it falls before its time


class TimedEnd:
    """Where a run is on its way to its end (`pace`), and the `clock` that moves the end; None where a record is followed.

    began: when the time of this start began, by time.perf_counter. out, found: the folder of the run, and the checkpoint that it goes on from.
    plan: its evaluations, some of which come after the last update. most_steps: that it may take however much time there is, None for any number.
    """

    def __init__(
        self, config: TrainConfig, began: float, out: Path, found: Checkpoint | None, plan: EvaluationPlan, most_steps: int | None = None
    ) -> None:
        assert config.train.steps is not None
        self._is_wsd = config.optim.schedule == "wsd"
        self.pace = Pace.first(config.train.steps) if config.train.pace is None else Pace.of_text(config.train.pace)
        self.clock: Clock | None = None
        self._has_more_time, self._most_steps = False, most_steps
        if config.seconds is None or not config.clocked:
            return
        spent, before = 0.0, None
        if found is not None:  # what was lost after the checkpoint took its time as well
            spent = float(found.state.get("spent", found.state["seconds"])) + max(0.0, last_seconds(out) - float(found.state["seconds"]))
            before = TrainConfig.from_dict(found.state["config"], found.state["sources"]).seconds
        self.clock = Clock(config.seconds, began, spent, aside=config.train.eval_budget)
        again = plan.split_rows / plan.rows if plan.whole_at_end else 1.0 if config.train.restore_best else 0.0
        self.clock.evaluations_at_end = 1.0 + again if plan.rows else 0.0
        self._has_more_time = before is not None and before < config.seconds and self._is_wsd

    def begin(self, step: int, steps: int) -> Pace | None:
        """Before the first update of this start: another end than after `steps` updates, where there is one."""
        if self.clock is None:
            return None
        self.clock.begin()
        if self._has_more_time:  # from its decayed weights at the full rate: WSD-S, Wen et al. 2024, arXiv 2410.05192
            end = self._limited(max(step + 1, int(step * self.clock.seconds / max(1.0, self.clock.elapsed))), step)
            return self.pace.decide(step, end, min(self.pace.share(step), step / max(1, end)))
        return self._moved(step, steps)

    def updated(self, step: int, steps: int) -> Pace | None:
        """After update number `step` (the first is 1): another end than after `steps` updates, where the speed of the machine, or the record, has
        one."""
        if self.clock is None:
            return self.pace if any(each.step == step for each in self.pace.decisions[1:]) else None
        self.clock.updated()
        return self._moved(step, steps)

    def _moved(self, step: int, steps: int) -> Pace | None:
        assert self.clock is not None
        end = self.clock.moved(step, steps)
        if end is None:
            return None
        end = self._limited(max(end, 1), step)  # at least one update is made
        if end == steps:
            return None
        share = step / end  # so that the cooldown takes its part of all updates, whatever was thought of their number before
        flat = self._is_wsd and max(self.pace.share(step), share) < COOLDOWN  # there the share changes no learning rate
        return self.pace.decide(step, end, share if flat else None)

    def _limited(self, end: int, step: int) -> int:
        limits = [each for each in (self._most_steps, self.pace.most_steps) if each is not None]
        return min([end, *(max(step, each) for each in limits)])

    def no_longer_falls(self, step: int, steps: int, evaluations: int) -> Pace | None:
        """After so many evaluations without a better loss: a cooldown at once, as long as that of a run which ends there, for the text has no more to
        teach this model. None where it is too soon for that, or the learning rate falls already."""
        if self.clock is None or not self._is_wsd or evaluations < WITHOUT_GAIN or step >= steps or self.pace.share(step) >= COOLDOWN:
            return None
        return self.pace.decide(step, min(steps, step + max(1, round(step * (1 / COOLDOWN - 1)))), COOLDOWN)

    def aside(self) -> AbstractContextManager[None]:
        """Around work between updates, which the clock keeps apart from them."""
        return nullcontext() if self.clock is None else self.clock.aside()
