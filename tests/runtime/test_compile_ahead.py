"""Kernels are compiled by other processes before they are needed, and nobody depends on these."""

import os
import subprocess

import pytest

from cllm.runtime import compile_ahead
from cllm.runtime.progress import Stage, compilation


@pytest.fixture
def jobs(monkeypatch):
    made = compile_ahead._Jobs(2)
    monkeypatch.setattr(compile_ahead, "_jobs", made)
    return made


def test_each_function_is_compiled_by_a_process_of_its_own_and_said_to_be_done(jobs, tmp_path, capsys):
    for name in ("first", "second", "third"):
        assert compile_ahead.is_postponed(lambda name=name: (tmp_path / name).write_text(str(os.getpid())))
    jobs.finish()
    processes = {each.read_text() for each in tmp_path.iterdir()}
    assert len(processes) == 3 and str(os.getpid()) not in processes
    told = [tuple(map(int, line.split())) for line in capsys.readouterr().out.splitlines()]
    assert told[-1] == (3, 3) and [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_function_that_cannot_be_compiled_does_not_keep_the_others_from_it(jobs, tmp_path):
    compile_ahead.is_postponed(lambda: 1 // 0)
    compile_ahead.is_postponed(lambda: os._exit(9))
    compile_ahead.is_postponed((tmp_path / "compiled").touch)
    jobs.finish()
    assert (tmp_path / "compiled").exists()


def test_elsewhere_nothing_is_postponed():
    assert not compile_ahead.is_postponed(pytest.fail)


@pytest.mark.parametrize("threads", ["1", "2"])
def test_one_thread_or_one_core_compiles_what_it_needs_itself(threads, monkeypatch):
    monkeypatch.setenv("CLLM_THREADS", threads)
    monkeypatch.setattr(compile_ahead, "usable_cores", lambda: 3 - int(threads))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: pytest.fail("a process was started"))
    compile_ahead.start("no.module", "")


def test_where_no_process_can_be_started_the_work_goes_on(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no more processes")

    monkeypatch.setattr(compile_ahead, "usable_cores", lambda: 2)
    monkeypatch.setenv("CLLM_THREADS", "2")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    compile_ahead.start("no.module", "")


def test_who_waits_for_kernels_is_told_how_many_are_done():
    with Stage("first step") as stage:
        compilation.begin("compiling CPU kernels")
        try:
            compilation.tell("7 of 21 done, ETA 0:09")
            assert stage.line().startswith("first step: compiling CPU kernels: 7 of 21 done, ETA 0:09")
            compilation.tell("")
            assert stage.line().startswith("first step: compiling CPU kernels ...")
        finally:
            compilation.end()
