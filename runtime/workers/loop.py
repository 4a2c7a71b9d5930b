"""How a launch's tasks are claimed, and how workers wait for the next one. All of it is compiled and runs without Python's lock.

A launch takes a slot, writes what there is to do into it, opens it, and works on the tasks itself. Workers who see it join, each under a number
of its own. Tasks lie in stretches, one for each worker: who has finished its own takes the rear half of what is left of another's. So each reads and
writes memory in order, and a worker that the system has put aside holds up the task that it is at and no other. Launches whose tasks differ in
length have one stretch for all. When no task is left the slot is closed, and the calling thread waits for those who joined, not for those who did
not.

R. Blumofe, C. Leiserson, Scheduling Multithreaded Computations by Work Stealing, 1999.
"""

import functools
from typing import Any, NamedTuple

import numba
from numba import types

from cllm.runtime.workers.linked import linked
from cllm.runtime.workers.words import (
    WAIT,
    WAKE,
    add,
    futex,
    load,
    nanoseconds,
    nanoseconds_run,
    nap,
    pause,
    replace,
    run_task,
    set_scheduling,
    store,
)

LINE = 128  # bytes: two lines of a cache, because processors fetch them in pairs

# Words of the pool. Threads wait at EPOCH, which every launch raises.
EPOCH, ASLEEP, SPINNING, STOP, MOST_SPINNING, BUSY, CALL = (LINE * i for i in range(7))
NUM_SLOTS = 16  # launches at a time; further ones are worked on by their own threads alone
MOST_STRETCHES = 256
STATES = 8 * LINE  # a word for each slot, alone in its line: who has joined and who is at work
TAKEN = STATES + NUM_SLOTS * LINE  # whether a slot is in use
SLOTS = TAKEN + NUM_SLOTS * LINE
ENTRY, INTS, FLOATS, FIRST, TASKS, WORKERS, NUM_STRETCHES = (8 * i for i in range(7))  # words of a slot
STRETCHES = LINE  # behind them, the stretches of tasks
SLOT_BYTES = STRETCHES + MOST_STRETCHES * LINE
POOL_BYTES = SLOTS + NUM_SLOTS * SLOT_BYTES

# A slot's state: how many are at work, in the lower half with two flags; how many have joined, in the upper half.
WORKING, SLEEPS, OPEN, JOINED = (1 << 20) - 1, 1 << 20, 1 << 21, 1 << 32

# Who waits spins for so many nanoseconds before it sleeps: a sleeper takes tens of microseconds to come back, but on a machine whose cores others
# want too, time spent spinning is taken off the time for the work.
SPIN, SPIN_BUSY = 1_000_000, 5_000
# The machine is busy when a worker, while it had something to do, was put aside for more than this part of some 50 ms.
BUSY_SHARE, REMEMBERED = 8, 50_000_000
LOOKS = 16  # at a word between two looks at the clock


class Launch(NamedTuple):
    """What there is to do; a list of launches is a table of these."""

    entry: int  # address of the compiled function
    ints: int  # addresses of its arguments
    floats: int
    first: int  # number of the first task
    tasks: int
    even: int  # whether tasks take equally long
    workers: int = 1 << 30  # the most that may share it, where these are fewer than those of the whole list
    counted: int = 0  # address of the number of tasks, where that is not known beforehand


FIELDS = len(Launch._fields)

jit = linked()


@jit
def _sleep(pool, word, value):
    """Returns when the word's lower half is another than the value's, when somebody wakes this thread, or for no reason at all."""
    call = load(pool + CALL)
    if call < 0:
        nap()
    else:
        futex(call, word, WAIT, value)


@jit
def _wake(pool, word, count):
    call = load(pool + CALL)
    if call >= 0:
        futex(call, word, WAKE, count)


@jit
def _claim(stretch):
    """The first task of a stretch, or -1."""
    while True:
        held = load(stretch)
        if held >> 32 >= held & 0xFFFFFFFF:
            return -1
        if replace(stretch, held, held + (1 << 32)):
            return held >> 32


@jit
def _steal(slot, stretches, own, keep):
    """A task out of another's stretch, or -1; with `keep` half of what is left there, the rest of which becomes the own stretch."""
    for i in range(1, stretches + 1):
        stretch = slot + STRETCHES + (own + i) % stretches * LINE
        while True:
            held = load(stretch)
            first, end = held >> 32, held & 0xFFFFFFFF
            if first >= end:
                break
            took = (end - first + 1) // 2 if keep else 1
            if replace(stretch, held, held - took):
                if took > 1:
                    store(slot + STRETCHES + own * LINE, (end - took + 1) << 32 | end)
                return end - took
    return -1


@jit
def _work(slot, place, worker):
    """Tasks of a launch until none is left. place: the number of the stretch to begin with."""
    entry, ints, floats, first = load(slot + ENTRY), load(slot + INTS), load(slot + FLOATS), load(slot + FIRST)
    stretches = load(slot + NUM_STRETCHES)
    own = place % stretches
    while True:
        task = _claim(slot + STRETCHES + own * LINE)
        if task < 0 and stretches > 1:
            task = _steal(slot, stretches, own, own == place)
        if task < 0:
            return
        run_task(entry, ints, floats, first + task, worker)


@jit
def _join(pool, number, place):
    """Works on the launch in a slot, if it is open and wants more workers; whether it did."""
    state, slot = pool + STATES + number * LINE, pool + SLOTS + number * SLOT_BYTES
    while True:
        seen = load(state)
        worker = (seen >> 32) + 1
        if not seen & OPEN or worker >= load(slot + WORKERS):
            return False
        if replace(state, seen, seen + JOINED + 1):
            break
    # The slot may have been closed and opened for another launch between the two looks at it. What it says now is true until this worker leaves.
    fits = worker < load(slot + WORKERS)
    if fits:
        if load(pool + ASLEEP) > 0 and worker + 1 < load(slot + WORKERS):
            _wake(pool, pool + EPOCH, 2)  # each wakes two more, so that a launch on many cores does not wait for one thread to wake them all
        _work(slot, place, worker)
    if (add(state, -1) & (WORKING | SLEEPS)) == SLEEPS + 1:
        _wake(pool, state, 1)
    return fits


@jit
def _spin(pool, epoch):
    """Waits for a launch without giving the core away, for a while; whether there was one."""
    found = False
    if add(pool + SPINNING, 1) < load(pool + MOST_SPINNING):
        patience = SPIN_BUSY if load(pool + BUSY) != 0 else SPIN
        began = nanoseconds()
        while not found and nanoseconds() - began < patience:
            for _ in range(LOOKS):
                if load(pool + EPOCH) != epoch:
                    found = True
                    break
                pause()
    add(pool + SPINNING, -1)
    return found


def _serve(seat):
    """What a thread of the pool does all its life. seat: where the address of the pool and the thread's own number lie, then the number of the system
    call by which it asks to be woken soon, below 0 for none, and what that takes."""
    pool, place, call = load(seat), load(seat + 8), load(seat + 16)
    if call >= 0:
        set_scheduling(call, seat + 24)
    awake = aside = 0  # nanoseconds: how long it wanted a core, and how much of that it did not have one
    since, run_before = nanoseconds(), nanoseconds_run()
    while True:
        epoch = load(pool + EPOCH)
        if load(pool + STOP) != 0:
            return 0
        worked = False
        for number in range(NUM_SLOTS):
            if load(pool + STATES + number * LINE) & OPEN:
                worked |= _join(pool, number, place)
        if worked:
            continue
        now, run = nanoseconds(), nanoseconds_run()
        awake, aside = awake + now - since, aside + (now - since) - (run - run_before)
        since, run_before = now, run
        if awake > REMEMBERED:
            awake, aside = awake // 2, aside // 2
        busy = int(aside * BUSY_SHARE > awake)
        if load(pool + BUSY) != busy:
            store(pool + BUSY, busy)
        if not _spin(pool, epoch):
            add(pool + ASLEEP, 1)
            _sleep(pool, pool + EPOCH, epoch)
            add(pool + ASLEEP, -1)
            since, run_before = nanoseconds(), nanoseconds_run()


@jit
def _await_workers(pool, state):
    """Returns when all who joined a launch have left it; the slot is closed."""
    seen = add(state, -OPEN) - OPEN
    if not seen & WORKING:
        return
    patience, began = SPIN_BUSY if load(pool + BUSY) != 0 else SPIN, nanoseconds()
    while seen & WORKING:
        if nanoseconds() - began < patience:
            for _ in range(LOOKS):
                pause()
                if not load(state) & WORKING:
                    break
        elif seen & SLEEPS or replace(state, seen, seen | SLEEPS):
            _sleep(pool, state, seen | SLEEPS)
        seen = load(state)


@jit
def _take(pool):
    """The number of a slot that nobody uses, or -1."""
    for number in range(NUM_SLOTS):
        taken = pool + TAKEN + number * LINE
        if load(taken) == 0 and replace(taken, 0, 1):
            return number
    return -1


@jit
def _share(pool, number, table, tasks, workers):
    state, slot = pool + STATES + number * LINE, pool + SLOTS + number * SLOT_BYTES
    for i in range(4):
        store(slot + ENTRY + 8 * i, load(table + 8 * i))
    store(slot + TASKS, tasks)
    stretches = min(workers, MOST_STRETCHES) if load(table + 40) != 0 else 1
    store(slot + WORKERS, workers)
    store(slot + NUM_STRETCHES, stretches)
    for i in range(stretches):
        store(slot + STRETCHES + i * LINE, (i * tasks // stretches) << 32 | ((i + 1) * tasks // stretches))
    store(state, OPEN)
    add(pool + EPOCH, 1)
    asleep = load(pool + ASLEEP)
    if asleep > 0 and workers - 1 > load(pool + SPINNING):
        _wake(pool, pool + EPOCH, 2)
    _work(slot, 0, 0)
    _await_workers(pool, state)
    store(state, 0)


@jit
def _alone(table, tasks):
    entry, ints, floats, first = load(table), load(table + 8), load(table + 16), load(table + 24)
    for task in range(tasks):
        run_task(entry, ints, floats, first + task, 0)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def run(pool, table, launches, workers):
    """A list of launches, one after the other."""
    number = _take(pool) if workers > 1 else -1
    for i in range(launches):
        here = table + i * (8 * FIELDS)
        tasks, counted = load(here + 32), load(here + 56)
        if counted != 0:
            tasks = load(counted)
        most = min(workers, tasks, load(here + 48))
        if number < 0 or most <= 1:
            _alone(here, tasks)
        else:
            _share(pool, number, here, tasks, most)
    if number >= 0:
        store(pool + TAKEN + number * LINE, 0)


def compile_run() -> None:
    run.compile((types.int64,) * 4)


@functools.cache
def serving() -> Any:
    """`_serve` as a C function, compiled when it is first asked for."""
    return numba.cfunc(types.int64(types.int64), cache=True, error_model="numpy")(_serve)
