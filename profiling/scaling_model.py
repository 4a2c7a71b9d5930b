"""A model of how workers share the launches of a step (`runtime/workers/loop.py`): how long a list of them takes on any number of workers.

Workers join one after another, each wakes two more; they claim tasks one by one, out of a stretch of their own where tasks are even, and take half of
what is left of another's when theirs is done; the next launch begins when the last task has ended. What the cores share, memory above all, stretches
the tasks of a launch the more, the more workers it has. Seconds everywhere.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

Curve = Callable[[int], float]  # of a number of workers: how many times as long a task takes as on one
MOST_STRETCHES = 256  # as in loop.py


class Launch(NamedTuple):
    """tasks: how long each takes on one worker. workers: the most that may share it. share: of a task's time, what is stretched."""

    name: str
    tasks: tuple[float, ...]
    even: bool
    workers: int
    share: float = 0.0


class Costs(NamedTuple):
    """What a machine takes beside the tasks: to open and close a launch, until a worker has joined that another one wakes, to claim a task."""

    launch: float = 0.0
    join: float = 0.0
    claim: float = 0.0


def saturating(of_two: float) -> Curve:
    """A memory of which two workers get `of_two` times the rate of one: w of them get w / (1 + k (w - 1)) times, k by that figure."""
    k = min(1.0, max(0.0, 2.0 / of_two - 1.0))
    return lambda workers: 1.0 + k * (workers - 1)


def launch_seconds(launch: Launch, workers: int, costs: Costs = Costs(), curve: Curve = lambda workers: 1.0) -> float:
    """How long one launch takes on so many workers."""
    most = min(workers, launch.workers, len(launch.tasks))
    if most <= 1:
        return sum(launch.tasks)
    longer = 1.0 + launch.share * (curve(most) - 1.0)
    count = len(launch.tasks)
    stretches = min(most, MOST_STRETCHES) if launch.even else 1
    begin = [i * count // stretches for i in range(stretches)]
    end = [(i + 1) * count // stretches for i in range(stretches)]
    own = [worker % stretches for worker in range(most)]
    # The first works at once, the next two when the news has reached them, the four behind them after twice that time.
    free = [((worker + 1).bit_length() - 1) * costs.join for worker in range(most)]
    waiting = [(at, worker) for worker, at in enumerate(free)]
    heapq.heapify(waiting)
    last, left = 0.0, count
    while left:
        at, worker = heapq.heappop(waiting)
        mine = own[worker]
        if begin[mine] >= end[mine]:
            other = next(each for i in range(1, stretches + 1) if begin[each := (mine + i) % stretches] < end[each])
            half = end[other] - (end[other] - begin[other] + 1) // 2
            begin[mine], end[mine], end[other] = half, end[other], half
        task = begin[mine]
        begin[mine] += 1
        left -= 1
        at += costs.claim + launch.tasks[task] * longer
        last = max(last, at)
        heapq.heappush(waiting, (at, worker))
    return costs.launch + last


def in_a_step(launches: Sequence[Launch], seconds: float) -> list[Launch]:
    """The launches with tasks as long as inside of a step, in which all of them together take so long on one worker: one that is timed by itself
    finds its data in the caches more often, and the least of its times is one that a whole step never has for all."""
    longer = seconds / sum(sum(each.tasks) for each in launches)
    return [each._replace(tasks=tuple(task * longer for task in each.tasks)) for each in launches]


def step_seconds(launches: Sequence[Launch], outside: float, workers: int, costs: Costs = Costs(), curve: Curve = lambda workers: 1.0) -> float:
    """A step: its launches one after the other, and what one thread does between them."""
    return outside + sum(launch_seconds(each, workers, costs, curve) for each in launches)


def losses(
    launches: Sequence[Launch], outside: float, workers: int, costs: Costs = Costs(), curve: Curve = lambda workers: 1.0
) -> list[tuple[str, float, int]]:
    """What keeps a step from being `workers` times as fast as on one: (name, seconds beyond an even share, launches), the largest first."""
    found: dict[str, list[float]] = defaultdict(list)
    for each in launches:
        found[each.name].append(launch_seconds(each, workers, costs, curve) - sum(each.tasks) / workers)
    found["outside of launches"] = [outside - outside / workers]
    return sorted(((name, sum(lost), len(lost)) for name, lost in found.items()), key=lambda each: -each[1])
