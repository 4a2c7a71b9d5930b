"""How far along its schedule a run is at each update, where the clock and not a number of steps says when it ends (`train.hours`).

What the clock decides depends on the machine and the hour. It is therefore decided at a few steps, and recorded: the learning rate of each update is
a function of the record alone, so that a run that is resumed, or made again from its record, computes the same bits.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from cllm.runtime.errors import UserError

COOLDOWN = 0.8  # the share of a run after which the learning rate of the wsd schedule falls


@dataclass(frozen=True)
class Decision:
    """From update number `step` (the first is 0) on, the run is to end after `steps` updates; `share` of its schedule has passed before `step`."""

    step: int
    share: float
    steps: int


@dataclass(frozen=True)
class Pace:
    """The decisions of a run, in the order of their steps. Between them the share grows evenly, to 1 at the last update."""

    decisions: tuple[Decision, ...]

    @classmethod
    def first(cls, steps: int) -> Pace:
        """A run that is expected to take so many updates."""
        return cls((Decision(0, 0.0, steps),))

    def decide(self, step: int, steps: int, share: float | None = None) -> Pace:
        """With the decision, taken before update number `step`, that the run ends after `steps` updates. share: where on its schedule it goes on;
        None: where it is."""
        earlier = tuple(each for each in self.decisions if each.step < step)
        return Pace((*earlier, Decision(step, self.share(step) if share is None else share, steps)))

    def until(self, step: int) -> Pace:
        """Without the decisions after update number `step`, which a run that goes back to it takes anew."""
        return Pace(tuple(each for each in self.decisions if each.step <= step))

    def steps(self, step: int) -> int:
        """After how many updates the run is to end, as known before update number `step`."""
        return self._at(step).steps

    def share(self, step: int) -> float:
        """The share of the schedule, from 0 to 1, that has passed before update number `step`; 1 at the last one."""
        found = self._at(step)
        return min(1.0, found.share + (1.0 - found.share) * (step - found.step) / max(1, found.steps - 1 - found.step))

    def _at(self, step: int) -> Decision:
        return self.decisions[max(0, bisect_right(self._steps, step) - 1)]

    @cached_property
    def _steps(self) -> list[int]:
        return [each.step for each in self.decisions]

    @property
    def most_steps(self) -> int | None:
        """The end of a cooldown that began before its time, because the validation loss no longer fell; None where there was none."""
        for before, each in pairwise(self.decisions):
            if each.share == COOLDOWN and Pace((before,)).share(each.step) < COOLDOWN:
                return each.steps
        return None

    # -- as a text, which a setting holds -----------------------------------------------------------------------------------

    def to_text(self) -> str:
        """STEP:SHARE:STEPS of each decision, separated by spaces; `of_text` gives the very same numbers back."""
        return " ".join(f"{each.step}:{each.share!r}:{each.steps}" for each in self.decisions)

    @classmethod
    def of_text(cls, text: str) -> Pace:
        """Raises UserError for a text that is no record."""
        decisions = []
        try:
            for word in text.split():
                step, share, steps = word.split(":")
                decisions.append(Decision(int(step), float(share), int(steps)))
        except ValueError:
            decisions = []
        steps_in_order = all(one.step < other.step for one, other in pairwise(decisions))
        fits = all(0 <= each.share <= 1 and each.step <= each.steps for each in decisions)
        if not decisions or decisions[0].step != 0 or not steps_in_order or not fits:
            raise UserError(
                f"pace must be the record of a run, as in '0:0.0:1000 400:0.4:900', got {text[:80]!r}. Take it from the run's config.toml."
            )
        return cls(tuple(decisions))
