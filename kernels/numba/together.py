"""Launches whose tasks need nothing of each other, as one: many small pieces of work share one barrier."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from cllm.kernels.numba.launch import Kernel
from cllm.runtime.workers import Launch
from cllm.runtime.workers.words import run_task

_FIELDS = 5  # of each launch: its first task among all, its entry point, its integers, its floats, the number of its first task


def _together(p, f, task, worker):
    low, high = 0, p[0]
    while high - low > 1:
        middle = (low + high) // 2
        if p[1 + middle * _FIELDS] <= task:
            low = middle
        else:
            high = middle
    at = 1 + low * _FIELDS
    run_task(p[at + 1], p[at + 2], p[at + 3], p[at + 4] + task - p[at], worker)


_kernel = Kernel(_together)


def together(launches: Sequence[Launch]) -> tuple[Launch, array[int]]:
    """The launch that does the tasks of all of these, and its arguments, which whoever runs it keeps. Those that have no tasks are left out."""
    arguments, tasks = array("q", (0,)), 0
    for each in launches:
        if each.tasks > 0:
            arguments.extend((tasks, each.entry, each.ints, each.floats, each.first))
            arguments[0] += 1
            tasks += each.tasks
    return _kernel.launch(arguments.buffer_info()[0], 0, tasks), arguments
