"""The pool: every result once, whatever happens to its workers."""

import os
import signal

import pytest

from cllm.data.preparation.runner import Pool, runner_of
from cllm.runtime.errors import DataError, UserError

ARGUMENTS = [{"place": "", "number": number} for number in range(20)]


@pytest.fixture
def pool():
    pool = Pool(2)
    yield pool
    pool.close()


def test_a_task_tells_how_far_it_is(pool):
    heard = []
    results = list(pool.run("tasks:tells", ARGUMENTS[:1], lambda number, done: heard.append((number, done))))
    assert heard == [(0, 0.5)] and results == [(0, {"files": {}, "double": 0})]


def doubles(pool, function, arguments=ARGUMENTS):
    return {number: result["double"] for number, result in pool.run(f"tasks:{function}", arguments)}


def test_each_task_gives_its_result_and_what_a_library_prints_does_not_matter(pool):
    assert doubles(pool, "noisy") == {number: 2 * number for number in range(20)}


def test_a_worker_writes_rows_without_pandas(pool):
    pytest.importorskip("pyarrow", reason="the data extra is not installed")
    assert doubles(pool, "makes_a_column", ARGUMENTS[:1]) == {0: False}


def test_a_task_whose_worker_is_killed_runs_again(pool, tmp_path):
    arguments = [{"place": str(tmp_path), "number": number} for number in range(4)]
    assert doubles(pool, "dies_once", arguments) == {number: 2 * number for number in range(4)}
    assert len(list(tmp_path.iterdir())) == 4


def test_a_worker_that_is_killed_between_tasks_is_replaced(pool):
    assert doubles(pool, "double")
    for pid in pool.pids():
        os.kill(pid, signal.SIGKILL)
    assert doubles(pool, "double") == {number: 2 * number for number in range(20)}


def test_a_task_that_kills_every_worker_is_named(pool):
    with pytest.raises(DataError, match=r"SIGSEGV, 3 times in a row \(dies of /some/file\.pdf\)"):
        list(pool.run("tasks:dies", [{"place": "/some/file.pdf", "number": 1}]))


def test_what_a_task_raises_reaches_the_user_as_an_error_or_as_a_mistake_of_ours(pool):
    with pytest.raises(DataError, match="the disk of the test is full"):
        list(pool.run("tasks:raises_data", ARGUMENTS[:1]))
    with pytest.raises(DataError, match=r"input/output error \(/mnt/far/pages\.parquet\)\. Once that is put right"):
        list(pool.run("tasks:raises_system", ARGUMENTS[:1]))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        list(pool.run("tasks:raises_bug", ARGUMENTS[:1]))


def test_workers_end_with_the_pool(pool):
    doubles(pool, "double")
    pids = pool.pids()
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("slurm", "pool, dask://HOST:PORT or ray://HOST:PORT"),
        ("dask://10.1.2.3:8786", "must be encrypted"),
        ("dask://scheduler.example:8786", "must be encrypted"),
        ("ray://10.1.2.3:6379", "must be encrypted"),
        ("dask://127.0.0.1", "with its port"),
    ],
)
def test_an_address_that_is_none_or_is_open_to_others_is_refused(address, words):
    with pytest.raises(UserError, match=words):
        runner_of(address, 1)
