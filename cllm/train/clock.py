"""The clock of a run that was given its time (`train.hours`): after how many updates it has to end so that the command ends in time."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cllm.config.recipe import TAIL

WINDOW = 0.04  # of the whole time: what the speed is averaged over
TOLERANCE = 0.01  # of the whole time: an end that moves by less is left where it is


def now() -> float:
    """Seconds since some moment in the past; the only clock that decides anything about a training."""
    return time.perf_counter()


class Clock:
    """Measures a run and tells when it has to end. Everything since `began` counts, and what earlier starts of the run have spent.

    seconds: the whole time. spent: of it, before this start. aside: the share of the time that goes into evaluations, as planned, before it is
    measured.
    """

    def __init__(self, seconds: float, began: float, spent: float = 0.0, *, aside: float = 0.05) -> None:
        self.seconds, self.spent = seconds, spent
        self._began, self._planned_aside = began, aside
        self._speed = 0.0  # updates per second, of the last updates
        self._last: float | None = None  # the end of the last update
        self._updates_seconds = self._aside_seconds = 0.0
        self._longest_aside = 0.0
        self._warm = False
        self.evaluations_at_end = 2.0  # after the last update, in those that are made on the way

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken, over all its starts."""
        return self.spent + now() - self._began

    def begin(self) -> None:
        """Just before the first update of this start, and after work that is not to be counted as that of an update."""
        self._last = now()

    def updated(self) -> None:
        """Just after an update. The first one of a start, which compiles kernels, tells nothing of the speed."""
        at = now()
        assert self._last is not None
        seconds, self._last = max(1e-9, at - self._last), at
        if not self._warm:
            self._warm = True
            return
        weight = 1.0 - math.exp(-seconds / (WINDOW * self.seconds))
        # The sum of the weights of one speed that lasts is 1. Right after the start the newest update stands for all that are not there yet.
        weight = max(weight, seconds / (self._updates_seconds + seconds)) if self._updates_seconds < WINDOW * self.seconds else weight
        self._speed += weight * (1.0 / seconds - self._speed)
        self._updates_seconds += seconds

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around an evaluation, and other work between updates."""
        began = now()
        yield
        seconds = now() - began
        self._aside_seconds += seconds
        self._longest_aside = max(self._longest_aside, seconds)
        if self._last is not None:
            self._last += seconds

    @property
    def reserve(self) -> float:
        """Seconds for what follows the last update: evaluations, and what is printed."""
        return self.evaluations_at_end * (self._longest_aside or self._planned_aside / 10 * self.seconds) + TAIL

    def has_time_for(self, evaluations: float) -> bool:
        """Whether so many evaluations can still be made, counted in those that were made on the way."""
        return self.elapsed + evaluations * self._longest_aside + TAIL <= self.seconds

    def end(self, step: int) -> int:
        """After how many updates the run should end, when `step` of them are done; `step` itself when the time is over."""
        left = self.seconds - self.reserve - self.elapsed
        if left <= 0 or not self._speed:
            return step if left <= 0 else step + 1
        measured = self._aside_seconds / (self._aside_seconds + self._updates_seconds) if self._aside_seconds else 0.0
        aside = max(0.0, min(0.5, measured or self._planned_aside))
        return step + int(left * (1.0 - aside) * self._speed)

    def moved(self, step: int, steps: int) -> int | None:
        """After how many updates the run should end, where that is worth a new decision; None where `steps` is near enough."""
        end = self.end(step)
        if end <= step:
            return step
        off = abs(end - steps) / self._speed if self._speed else 0.0
        return end if off > TOLERANCE * self.seconds else None


def process_began() -> float:
    """When this process was started, on the scale of time.perf_counter."""
    import psutil

    try:
        return time.perf_counter() - max(0.0, time.time() - psutil.Process(os.getpid()).create_time())
    except psutil.Error:
        return time.perf_counter()
