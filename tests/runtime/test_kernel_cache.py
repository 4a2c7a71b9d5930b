"""Processes that need the same compiled function: one compiles it, the others wait and load it, and nobody waits for one that is dead."""

import multiprocessing
import os
import signal
import subprocess
import time

import pytest
from command import wait_until

pytest.importorskip("numba")

# Who compiles `twice` says so in the file `compiling`, and takes as long as there is no file `go`.
KERNEL = """
import os, time
import numba
from numba.extending import overload

def slowly_compiled(x): ...

@overload(slowly_compiled)
def _(x):
    with open("compiling", "a") as file:
        file.write(f"{os.getpid()} {x}\\n")
    while not os.path.exists("go"):
        time.sleep(0.01)
    return lambda x: 2 * x

@numba.njit(cache=True)
def twice(x):
    return slowly_compiled(x)
"""

RUN = """
import os, sys
os.chdir({folder!r})
os.environ |= {{"CLLM_CACHE_DIR": "cache", "NUMBA_CACHE_DIR": ""}}
from cllm.runtime import compiler, kernel_cache
compiler.register_kernels("kernels")
compiler.numba_setup()
sys.path.insert(0, "kernels")
{before}
import kernel
open(f"ready-{{os.getpid()}}", "w").close()
answer.send((kernel.twice({argument}), sum(kernel.twice.stats.cache_hits.values())))
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "kernel.py").write_text(KERNEL)
    folder = _Folder(tmp_path)
    yield folder
    for process in folder.started:
        process.kill()


class _Process:
    """Forked from a process that has imported numba and what numba imports when it compiles first, and nothing of CLLM."""

    def __init__(self, code):
        forking = multiprocessing.get_context("forkserver")
        forking.set_forkserver_preload(["numba", "numba.np.arraymath", "numba.np.linalg", "numba.typed.dictimpl", "numba.cpython.unicode"])
        self._answer, theirs = forking.Pipe(duplex=False)
        self._process = forking.Process(target=exec, args=(code, {"answer": theirs}), daemon=True)
        self._process.start()
        theirs.close()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def communicate(self):
        return f"exit status {self.poll()}"

    def kill(self):
        self._process.kill()
        self._process.join()

    def signal(self, number):
        os.kill(self.pid, number)

    def answer(self):
        """(the result, whether it was loaded from the cache)"""
        answer = self._answer.recv()
        self._process.join()
        return answer


class _Folder:
    def __init__(self, path):
        self.path, self.started = path, []

    def start(self, before="", argument="21"):
        self.started.append(_Process(RUN.format(folder=str(self.path), before=before, argument=argument)))
        return self.started[-1]

    def compiling(self):
        """The processes that have begun to compile, in order."""
        place = self.path / "compiling"
        return [int(line.split()[0]) for line in place.read_text().splitlines()] if place.exists() else []

    def start_and_compile(self, **options):
        """A process in the middle of its compilation."""
        process = self.start(**options)
        wait_until(lambda: process.pid in self.compiling(), process)
        return process

    def start_and_wait(self, **options):
        """A process that has asked for the function, and has had time to compile it if it wanted to."""
        process = self.start(**options)
        wait_until((self.path / f"ready-{process.pid}").exists, process)
        time.sleep(0.5)
        return process

    def go(self):
        (self.path / "go").touch()

    def locks(self):
        return list(self.path.glob("cache/**/*.lock"))


def test_who_needs_what_another_process_compiles_waits_and_loads_it(folder):
    first = folder.start_and_compile()
    others = [folder.start_and_wait() for _ in range(2)]
    assert folder.compiling() == [first.pid] and folder.locks()
    folder.go()
    assert [process.answer() for process in (first, *others)] == [(42, 0), (42, 1), (42, 1)]
    assert folder.compiling() == [first.pid] and not folder.locks()


def test_when_the_one_that_compiles_is_killed_another_compiles(folder):
    first = folder.start_and_compile()
    second, third = folder.start_and_wait(), folder.start_and_wait()
    assert folder.compiling() == [first.pid]
    first.kill()
    wait_until(lambda: len(folder.compiling()) == 2, second)
    folder.go()
    assert sorted([second.answer(), third.answer()]) == [(42, 0), (42, 1)]
    assert len(folder.compiling()) == 2 and not folder.locks()


def test_one_that_was_stopped_is_not_waited_for_forever(folder):
    first = folder.start_and_compile()
    first.signal(signal.SIGSTOP)
    second = folder.start_and_compile(before="kernel_cache.WAIT_SECONDS = 0.2")
    folder.go()
    assert second.answer() == (42, 0)
    first.signal(signal.SIGCONT)
    assert first.answer() == (42, 0)
    assert folder.start().answer() == (42, 1)


def test_where_nothing_can_be_locked_each_process_compiles(folder):
    """A network file system without locks."""
    before = "import errno, fcntl\ndef flock(*_): raise OSError(errno.ENOLCK, 'no locks here')\nfcntl.flock = flock"
    processes = [folder.start_and_compile(before=before) for _ in range(2)]
    folder.go()
    assert [process.answer() for process in processes] == [(42, 0)] * 2
    assert folder.start(before=before).answer() == (42, 1)


def test_a_lock_that_cannot_be_made_costs_nothing(folder):
    """A folder that cannot be written any more; what lies in it is still loaded."""
    folder.go()
    before = "import errno\ndef refuse(path): raise OSError(errno.EROFS, 'read-only')\nkernel_cache._try_to_lock = refuse"
    assert folder.start().answer() == (42, 0)
    assert folder.start(before=before).answer() == (42, 1)
    assert folder.start(before=before, argument="21.5").answer() == (43.0, 0)


def test_other_types_are_compiled_meanwhile_and_neither_entry_is_lost(folder):
    first = folder.start_and_compile()
    second = folder.start_and_compile(argument="21.5")
    folder.go()
    assert [first.answer(), second.answer()] == [(42, 0), (43.0, 0)]
    assert [folder.start().answer(), folder.start(argument="21.5").answer()] == [(42, 1), (43.0, 1)]


def test_a_process_forked_in_the_middle_of_a_compilation_holds_no_lock(folder):
    """A data worker that is forked by another thread lives on when the process that compiled was killed."""
    fork = "import threading, os, time\ndef fork():\n    while not os.path.exists('compiling'): time.sleep(0.01)\n"
    fork += "    if os.fork() == 0:\n        open('forked', 'w').close()\n        time.sleep(600)\n"
    first = folder.start_and_compile(before=f"{fork}threading.Thread(target=fork, daemon=True).start()")
    wait_until((folder.path / "forked").exists, first)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(first.pid)], capture_output=True, text=True).stdout.split()
    try:
        first.kill()
        second = folder.start_and_compile()
        folder.go()
        assert second.answer() == (42, 0)
    finally:
        for child in children:
            os.kill(int(child), signal.SIGKILL)


def test_a_compilation_that_fails_gives_back_what_it_claimed(folder):
    (folder.path / "kernels" / "wrong.py").write_text("import numba\n@numba.njit(cache=True)\ndef wrong(x): return x.nothing\n")
    before = "import wrong\ntry:\n    wrong.wrong(1)\nexcept Exception as error:\n    answer.send((type(error).__name__, kernel_cache._locks))"
    folder.go()
    assert folder.start(before=before).answer() == ("TypingError", {})
    assert not folder.locks()
