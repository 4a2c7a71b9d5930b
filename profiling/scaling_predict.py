"""`scaling.py --predict N`: a step's own launches with measured task times, shared out by the model of `scaling_model.py`.

A step is replayed with each task of each launch run and timed by itself, on one thread. All of them are then lengthened evenly to what the launches
of an undisturbed step take on one worker: what such a step takes less what it spends in the compiled calls that walk through its launches is what
lies outside of them. What a launch may use on N workers is what the plan gives it there. How much of a launch is stretched by what the cores share is
taken from its time on two workers, and how that grows from one curve, that of copying memory on one and on two. The costs of a launch are those of
launches whose tasks do nothing.
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from scaling_model import Costs, Launch, in_a_step, launch_seconds, losses, saturating, step_seconds

from cllm import TrainStep, runtime
from cllm.runtime import workers as room
from cllm.runtime.workers import loop, table_of
from cllm.runtime.workers import run as run_launches

COUNTS = (1, 2, 4, 8, 16, 32, 64)
MANY = 1741
RECORDED_AFTER = 4  # steps, after which a step is replayed
NAMED = 6  # launches that are named as limits

Batch = tuple[torch.Tensor, torch.Tensor]


class Heard(NamedTuple):
    launch: loop.Launch
    workers: int  # the most that may share it
    seconds: float  # of the whole launch
    tasks: tuple[float, ...]  # of each task, where they were timed


@contextmanager
def run_by(run: Callable[[int, int, int, int], None]) -> Iterator[None]:
    """Lists of launches are given to `run` inside, in place of the compiled loop."""
    module: Any = loop
    original, module.run = module.run, run
    try:
        yield
    finally:
        module.run = original


@contextmanager
def clocked() -> Iterator[list[float]]:
    """The seconds that each compiled call takes which walks through a list of launches."""
    found: list[float] = []
    original: Any = loop.run

    def timed(pool: int, table: int, count: int, workers: int) -> None:
        began = time.perf_counter()
        original(pool, table, count, workers)
        found.append(time.perf_counter() - began)

    with run_by(timed):
        yield found


@contextmanager
def few_threads() -> Iterator[None]:
    """No thread is started inside, however many workers are asked for."""
    pool = room._pool
    most, pool._most = pool._most, pool.size
    try:
        yield
    finally:
        pool._most = most


@contextmanager
def listening(share: bool, by_task: bool) -> Iterator[list[Heard]]:
    """Every launch that is made inside, timed. share: by as many workers as it asks for, otherwise by the calling thread alone."""
    heard: list[Heard] = []
    original: Any = loop.run

    def timed(pool: int, table: int, count: int, workers: int) -> None:
        words = list((ctypes.c_int64 * (loop.FIELDS * count)).from_address(table))
        for i in range(count):
            each = loop.Launch(*words[i * loop.FIELDS : (i + 1) * loop.FIELDS])
            tasks = ctypes.c_int64.from_address(each.counted).value if each.counted else each.tasks
            each = each._replace(tasks=tasks, counted=0)
            if tasks <= 0:
                continue
            pieces = [each._replace(first=each.first + task, tasks=1) for task in range(tasks)] if by_task else [each]
            tables = [table_of([piece]) for piece in pieces]
            seconds = []
            for piece in tables:
                began = time.perf_counter()
                original(pool, piece.buffer_info()[0], 1, workers if share else 1)
                seconds.append(time.perf_counter() - began)
            heard.append(Heard(each, min(workers, each.workers), sum(seconds), tuple(seconds) if by_task else ()))

    with run_by(timed):
        yield heard


def least(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least seconds of each call, interleaved: what other programs add to a median would be taken for a property of the launches."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            found[name] = min(found[name], time.perf_counter() - began)
    return found


def kernel_names() -> dict[int, str]:
    """The kernels that are compiled by now, by the addresses of their code."""
    from cllm.kernels.numba.launch import Kernel

    modules = [module for name, module in sys.modules.items() if name.startswith("cllm.kernels.numba.")]
    kernels = [each for module in modules for each in vars(module).values() if isinstance(each, Kernel)]
    return {each._entry: f"{each.body.__module__.rpartition('.')[2]}.{each.body.__name__}" for each in kernels if each._entry}


def measured_costs(rounds: int = 2000) -> tuple[Costs, float]:
    """The costs of a launch, and what timing one task by itself adds to it."""
    import numba
    from numba import types

    signature = types.void(types.CPointer(types.int64), types.CPointer(types.float64), types.int64, types.int64)

    @numba.cfunc(signature)
    def nothing(p: Any, f: Any, task: Any, worker: Any) -> None:
        return

    def seconds(tasks: int, workers: int) -> float:
        table = table_of([loop.Launch(nothing.address, 0, 0, 0, tasks, 1)])
        found = []
        for _ in range(rounds):
            began = time.perf_counter()
            run_launches(table.buffer_info()[0], 1, workers)
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    one, two, many = seconds(1, 1), seconds(2, 2), seconds(1002, 2)
    shared = max(0.0, two - one)
    return Costs(launch=shared / 2, join=shared / 2, claim=max(0.0, many - two) / 1000), one


def copy_curve() -> float:
    """How many times the rate of one worker two get when they copy memory that lies in no cache."""
    from cllm.kernels.numba.launch import Kernel, copy_bytes

    size, tasks = 1 << 21, 32
    source, target = torch.ones(tasks * size, dtype=torch.uint8), torch.zeros(tasks * size, dtype=torch.uint8)

    def body(p: Any, f: Any, task: Any, worker: Any) -> None:
        copy_bytes(p[0] + task * p[2], p[1] + task * p[2], p[2])

    kernel = Kernel(body)
    numbers = [target.data_ptr(), source.data_ptr(), size]
    found = least({str(n): lambda n=n: kernel(tasks, n, numbers) for n in (1, 2)}, 15)
    return found["1"] / found["2"]


def heard_step(step: TrainStep, batch: Batch, threads: int, rounds: int, share: bool, by_task: bool) -> tuple[list[Heard], list[float]]:
    """The launches of a step that is replayed, each with its least seconds over some rounds, and the seconds that each step took."""
    found: list[list[Heard]] = []
    wholes = []
    with runtime.use(threads=threads):
        for _ in range(RECORDED_AFTER):
            step(*batch)
        for _ in range(rounds):
            with listening(share, by_task) as heard:
                began = time.perf_counter()
                step(*batch)
                wholes.append(time.perf_counter() - began)
            found.append(heard)
    assert len({len(each) for each in found}) == 1, "the steps differ"
    middle = [
        same[0]._replace(
            seconds=min(each.seconds for each in same),
            tasks=tuple(map(min, zip(*(each.tasks for each in same)))),
        )
        for same in zip(*found)
    ]
    return middle, wholes


def outside_seconds(timed: Callable[[], object], rounds: int) -> float:
    """What a step does outside of its launches, the least of some rounds."""
    found = []
    for _ in range(rounds):
        with clocked() as walks:
            began = time.perf_counter()
            timed()
            found.append(time.perf_counter() - began - sum(walks))
    return min(found)


def predict(new_step: Callable[[], TrainStep], batch: Batch, most: int, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(one row for each number of workers, one for each launch that keeps `most` from being that many times as fast as one)."""
    cores = runtime.device.usable_cores()
    costs, timing = measured_costs()
    curve = saturating(copy_curve()) if cores > 1 else saturating(2.0)
    step = new_step()

    def timed(threads: int) -> None:
        with runtime.use(threads=threads):
            step(*batch)

    real = {n: n for n in (1, 2) if n <= cores}
    for n in real:
        for _ in range(RECORDED_AFTER):
            timed(n)
    seconds = least({str(n): lambda n=n: timed(n) for n in real}, 3 * rounds)
    outside = outside_seconds(lambda: timed(1), 3 * rounds)
    alone, _ = heard_step(step, batch, 1, rounds, share=False, by_task=False)
    by_task, _ = heard_step(step, batch, 1, 3, share=False, by_task=True)
    together = heard_step(step, batch, 2, rounds, share=True, by_task=False)[0] if cores > 1 else alone
    alone, together = ([each._replace(seconds=max(1e-9, each.seconds - timing)) for each in found] for found in (alone, together))
    names = kernel_names()
    with few_threads():  # on more workers than cores only the plan is asked for, and the work is done by this thread
        plans = {
            n: [each.workers for each in heard_step(step, batch, n, 1, share=False, by_task=False)[0]]
            for n in dict.fromkeys([*(n for n in COUNTS if n <= most), most, MANY])
        }

    def launches(workers: int) -> list[Launch]:
        listed = []
        for whole, parts, two, allowed in zip(alone, by_task, together, plans[workers], strict=True):
            times = [max(1e-9, each - timing) for each in parts.tasks]
            scale = whole.seconds / sum(times)
            name = names.get(whole.launch.entry, "?")
            made = Launch(name, tuple(each * scale for each in times), bool(whole.launch.even), allowed)
            plain = launch_seconds(made._replace(workers=two.workers), 2, costs)
            stretch = (two.seconds / plain - 1.0) / max(1e-9, curve(2) - 1.0) if two.workers > 1 else 0.0
            listed.append(made._replace(share=min(1.0, max(0.0, stretch))))
        return in_a_step(listed, seconds["1"] - outside)

    base = step_seconds(launches(1), outside, 1, costs, curve)
    rows = []
    for n in plans:
        predicted = step_seconds(launches(n), outside, n, costs, curve)
        measured = seconds.get(str(n))
        unshared = step_seconds([each._replace(share=0.0) for each in launches(n)], outside, n, costs, curve)
        rows.append({
            "workers": n, "predicted_seconds": predicted, "predicted_speed_up": base / predicted,
            "unshared_speed_up": base / unshared, "measured_seconds": measured,
            "error": None if measured is None else predicted / measured - 1.0, "outside_seconds": outside,
        })  # fmt: skip
    limits = [
        {"workers": most, "part": name, "launches": count, "lost_seconds": lost}
        for name, lost, count in losses(launches(most), outside, most, costs, curve)[:NAMED]
    ]
    return rows, limits
