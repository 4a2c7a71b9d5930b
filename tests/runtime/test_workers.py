"""The threads of the CPU kernels: every task once, whoever comes and whoever does not; forks, exits, signals, faults, launches within launches."""

import ctypes
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from array import array
from functools import cached_property

import pytest
from command import PATIENCE
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.runtime import compiler, profiler

pytest.importorskip("numba")
compiler.numba_setup()

import numba  # noqa: E402
from numba import types  # noqa: E402

from cllm.runtime import workers as room  # noqa: E402
from cllm.runtime.workers import Launch, Pool, loop, table_of  # noqa: E402
from cllm.runtime.workers.words import add, load, replace  # noqa: E402

TASK = types.void(types.int64, types.int64, types.int64, types.int64)
COUNTED, FAULTS, MOST = 0, 8, 16  # words that the tasks below keep: tasks done, what went wrong, the highest number of a worker
BY_TASK, BY_WORKER = 64, 64 + 8 * 4096  # how often each task ran, and how many tasks a worker's number is at
WORDS = (BY_WORKER + 8 * 2048) // 8
LONG = 1 << 34  # looks at a word, after which a task no longer waits for others


class Task:
    """Compiled when a test first launches it: every process of a suite collects these tests, and few run them."""

    def __init__(self, body):
        self.body = body

    @cached_property
    def code(self):
        return numba.cfunc(TASK)(self.body)

    @property
    def address(self):
        return self.code.address


@Task
def count(memory, _, task, worker):
    if add(memory + BY_WORKER + 8 * worker, 1) != 0:
        add(memory + FAULTS, 1)  # two tasks at a time under one number would share their work space
    while True:
        most = load(memory + MOST)
        if worker <= most or replace(memory + MOST, most, worker):
            break
    add(memory + BY_TASK + 8 * task, 1)
    add(memory + COUNTED, 1)
    add(memory + BY_WORKER + 8 * worker, -1)


@Task
def after_all(memory, needed, task, worker):
    if load(memory + COUNTED) < needed:
        add(memory + FAULTS, 1)


@Task
def first_waits_for_all_others(memory, others, task, worker):
    looks = 0
    while task == 0 and load(memory + COUNTED) < others and looks < LONG:
        looks += 1
    if looks == LONG:
        add(memory + FAULTS, 1)
    add(memory + COUNTED, 1)


@Task
def fail(memory, _, task, worker):
    add(memory + COUNTED, 1)
    if task == 1:
        raise ValueError("a kernel that fails")


@Task
def long(memory, looks, task, worker):
    for _ in range(looks):
        load(memory)


@Task
def launch_again(memory, pool, task, worker):
    """`memory`: first the words of `count`, then a list of one launch for each task."""
    loop.run(pool, memory + WORDS * 8 + task * 8 * loop.FIELDS, 1, 3)


class Memory:
    """Words at an address that stays."""

    def __init__(self, words: int = WORDS) -> None:
        self.words = array("q", bytes(8 * words))
        self.address = self.words.buffer_info()[0]

    def __getitem__(self, offset: int) -> int:
        return self.words[offset // 8]

    def runs(self, tasks: int) -> list[int]:
        return list(self.words[BY_TASK // 8 : BY_TASK // 8 + tasks])


def run(pool, workers, *launches):
    table = table_of(launches)
    pool.run(table.buffer_info()[0], len(launches), workers)


@pytest.fixture(scope="module", params=["futex", "naps"])
def pool(request):
    pool = Pool() if request.param == "futex" else Pool(futex=-1)
    yield pool
    pool.stop()


@given(st.integers(0, 300), st.sampled_from([1, 2, 3, 8, 30]), st.booleans(), st.integers(0, 50))
@settings(deadline=None, max_examples=40)
def test_every_task_runs_once_under_a_number_of_its_own(pool, tasks, workers, even, first):
    memory = Memory()
    run(pool, workers, Launch(count.address, memory.address, 0, first, tasks, even))
    assert memory.runs(first + tasks) == [0] * first + [1] * tasks
    assert memory[FAULTS] == 0 and memory[MOST] < max(1, min(workers, tasks))


def test_far_more_workers_than_cores_all_come_to_an_end():
    pool, memory = Pool(), Memory()
    try:
        for _ in range(3):
            run(pool, 1741, Launch(count.address, memory.address, 0, 0, 4000, 1))
        assert memory.runs(4000) == [3] * 4000 and memory[FAULTS] == 0 and pool.size > 64
    finally:
        pool.stop()


def test_a_launch_begins_when_the_one_before_is_complete(pool):
    memory = Memory()
    one = [Launch(count.address, memory.address, 0, 0, 40, 1), Launch(after_all.address, memory.address, 40, 0, 40, 0)]
    later = [Launch(count.address, memory.address, 0, 40, 40, 0), Launch(after_all.address, memory.address, 80, 0, 40, 1)]
    for _ in range(20):
        memory.words[:] = array("q", bytes(8 * WORDS))
        run(pool, 4, *one, *later)
        assert memory[FAULTS] == 0 and memory[COUNTED] == 80


@pytest.mark.parametrize("even", [0, 1])
def test_who_is_put_aside_holds_up_one_task(pool, even):
    """The calling thread is held in its first task until all others are done, which another worker has to take out of the caller's piece."""
    for pause in (0.0, 0.05):  # the second time the worker sleeps and is woken
        memory = Memory()
        time.sleep(pause)
        run(pool, 2, Launch(first_waits_for_all_others.address, memory.address, 49, 0, 50, even))
        assert memory[COUNTED] == 50 and memory[FAULTS] == 0


def test_nobody_waits_for_workers_that_do_not_come(monkeypatch):
    pool, memory = Pool(), Memory()
    asked = []
    library = room._library()

    class Refusing:
        def pthread_create(self, *given):
            asked.append(given)
            return 11 if len(asked) > 1 else library.pthread_create(*given)

        def __getattr__(self, name):
            return getattr(library, name)

    monkeypatch.setattr(room, "_library", Refusing)
    for _ in range(2):
        run(pool, 64, Launch(count.address, memory.address, 0, 0, 100, 1))
    assert pool.size == 1 and len(asked) == 2, "what the system refuses is asked for once"
    pool.stop()
    run(pool, 64, Launch(count.address, memory.address, 0, 0, 100, 1))
    assert pool.size == 0 and memory.runs(100) == [3] * 100


def test_many_threads_launch_at_once(pool):
    """More of them than there are slots."""
    memories = [Memory() for _ in range(loop.NUM_SLOTS + 4)]
    start = threading.Barrier(len(memories))

    def launch(memory):
        start.wait()
        for _ in range(25):
            run(pool, 3, Launch(count.address, memory.address, 0, 0, 64, 1), Launch(count.address, memory.address, 0, 0, 64, 0))

    threads = [threading.Thread(target=launch, args=(memory,)) for memory in memories]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(memory.runs(64) == [50] * 64 and memory[FAULTS] == 0 for memory in memories)


def test_a_task_may_launch(pool):
    outer, inner = Memory(WORDS + 20 * loop.FIELDS), [Memory() for _ in range(20)]
    outer.words[WORDS:] = table_of(Launch(count.address, each.address, 0, 0, 30, 1) for each in inner)
    run(pool, 3, Launch(launch_again.address, outer.address, pool._address, 0, 20, 1))
    assert all(each.runs(30) == [1] * 30 and each[FAULTS] == 0 for each in inner)


def test_a_kernel_that_fails_says_so_and_ends_its_launch(pool, monkeypatch):
    memory, said = Memory(), []
    monkeypatch.setattr(sys, "unraisablehook", lambda about: said.append(str(about.exc_value)))
    run(pool, 2, Launch(fail.address, memory.address, 0, 0, 20, 1), Launch(count.address, memory.address, 0, 0, 20, 1))
    assert memory[COUNTED] == 40 and memory.runs(20) == [1] * 20
    assert said == ["a kernel that fails"]


def threads():
    """Those of this process, after all has been compiled: another thread tells of that while it lasts."""
    loop.serving()
    loop.compile_run()
    assert count.address
    return set(os.listdir("/proc/self/task"))


def test_workers_leave_signals_to_python():
    pool, memory = Pool(), Memory()
    before = threads()
    try:
        run(pool, 4, Launch(count.address, memory.address, 0, 0, 100, 1))
        started = threads() - before
        assert len(started) == 3
        for task in started:
            blocked, until = -1, time.monotonic() + PATIENCE
            while blocked >> (signal.SIGSEGV - 1) & 1 and time.monotonic() < until:  # a thread begins with every signal blocked
                with open(f"/proc/self/task/{task}/status") as status:
                    blocked = int(next(line for line in status if line.startswith("SigBlk")).split()[1], 16)
            assert blocked >> (signal.SIGINT - 1) & 1 and blocked >> (signal.SIGTERM - 1) & 1 and not blocked >> (signal.SIGSEGV - 1) & 1
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
    finally:
        pool.stop()


@pytest.mark.skipif(room.SET_SCHEDULING < 0, reason="Linux alone has slices")
@pytest.mark.parametrize("nice", [0, 3])
def test_workers_ask_for_short_slices_and_keep_the_priority_of_who_calls(nice):
    """In a thread of its own, because nobody gets a better priority back. Kernels before 6.12 have no slices and say 0."""
    found = []

    def launch():
        os.setpriority(os.PRIO_PROCESS, 0, nice)  # of this thread
        pool, memory = Pool(), Memory()
        before = threads()
        run(pool, 3, Launch(count.address, memory.address, 0, 0, 100, 1))
        for task in threads() - before:
            until = time.monotonic() + PATIENCE
            while (slices := scheduling(int(task)))[2] == usual[2] and has_slices and time.monotonic() < until:
                pass  # it has not begun
            found.append(slices)
        pool.stop()

    usual = scheduling(0)
    has_slices = usual[2] > 0
    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    assert found == [(os.SCHED_OTHER, nice, room.SLICE if has_slices else 0)] * 2


def scheduling(task):
    """(policy, nice, slice) of a thread, as sched_getattr tells them."""
    told = ctypes.create_string_buffer(56)
    assert ctypes.CDLL(None).syscall(room.SET_SCHEDULING + 1, task, told, 56, 0) == 0
    _, policy, _, nice, _, slice_ns, _, _ = struct.unpack_from("IIQiIQQQ", told.raw)
    return policy, nice, slice_ns


def test_a_signal_is_answered_between_two_launches(pool):
    memory = Memory()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell started in the background ignores Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                run(pool, 2, Launch(count.address, memory.address, 0, 0, 100, 1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert memory[COUNTED] % 100 == 0


def test_a_recording_hears_of_the_workers():
    memory, pool = Memory(), Pool()
    with profiler.record() as recording:
        run(pool, 5, Launch(count.address, memory.address, 0, 0, 100, 1))
        assert recording._running.workers == 5
    pool.stop()


def test_others_on_the_same_core_are_noticed():
    """A pool whose threads all have one core: each is put aside half of the time, as beside another program."""
    cores = os.sched_getaffinity(0)
    memory, pool = Memory(), Pool()
    os.sched_setaffinity(0, {min(cores)})
    try:
        while not pool.busy:
            run(pool, 2, Launch(long.address, memory.address, 20_000, 0, 100, 1))
    finally:
        os.sched_setaffinity(0, cores)
        pool.stop()


def test_a_forked_process_has_workers_of_its_own(pool):
    """Also when another thread was in the middle of a launch."""
    memory, stop = Memory(), threading.Event()

    def go_on():
        mine = Memory()
        while not stop.is_set():
            run(pool, 3, Launch(count.address, mine.address, 0, 0, 50, 1))

    other = threading.Thread(target=go_on)
    other.start()
    try:
        for _ in range(3):
            child = os.fork()
            if child == 0:
                signal.alarm(int(PATIENCE))
                good = pool.size == 0
                run(pool, 2, Launch(first_waits_for_all_others.address, memory.address, 49, 0, 50, 1))
                os._exit(0 if good and pool.size == 1 and memory[COUNTED] == 50 and memory[FAULTS] == 0 else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        other.join()


def test_a_process_ends_whatever_its_workers_do():
    """In the middle of a launch, while they spin, while they sleep."""
    script = """
import threading, time
from cllm.runtime import compiler
compiler.numba_setup()
import numba
from numba import types
from cllm.runtime import workers
@numba.cfunc(types.void(*[types.int64] * 4))
def nothing(a, b, task, worker):
    pass
table = workers.table_of([workers.Launch(nothing.address, 0, 0, 0, 1000, 1)] * 50)
def launch():
    workers.run(table.buffer_info()[0], 50, 4)
def forever():
    while True:
        launch()
launch()
if {daemon}:
    threading.Thread(target=forever, daemon=True).start()
time.sleep({pause})
print("end")
"""
    for daemon, pause in ((False, 0.0), (False, 0.1), (True, 0.1)):
        done = subprocess.run([sys.executable, "-c", script.format(daemon=daemon, pause=pause)], capture_output=True, text=True, timeout=PATIENCE)
        assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
