"""Clusters keep the contract of the pool: every result once, a task whose worker dies runs again, one that kills every worker is named."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command import wait_until
from made import digest, make, recipe

from cllm.data.preparation.plan import prepare
from cllm.data.preparation.runner import Pool, runner_of
from cllm.runtime.errors import DataError

pytest.importorskip("pyarrow", reason="the data extra is not installed")
pytestmark = pytest.mark.timeout(600)  # a cluster that has lost its workers for good waits for others
PATHS = os.pathsep.join([str(Path(__file__).parent), *(each for each in sys.path if each)])


def dask_of_two():
    distributed = pytest.importorskip("distributed", reason="the cluster extra is not installed")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", worker_dashboard_address="127.0.0.1:0",
        env={"PYTHONPATH": PATHS},
    )  # fmt: skip
    return cluster.scheduler_address.replace("tcp://", "dask://"), cluster.close


def ray_of_two():
    pytest.importorskip("ray", reason="Ray is not installed, and no extra has it")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2",
               "--include-dashboard=false", "--disable-usage-stats"]  # fmt: skip
    head = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": PATHS}, stdout=subprocess.PIPE, text=True)
    assert head.stdout is not None
    wait_until(lambda: "--block" in head.stdout.readline(), head)  # its last words before it waits for its end

    def close():
        head.terminate()
        head.wait()

    return f"ray://127.0.0.1:{port}", close


@pytest.fixture(scope="module", params=[dask_of_two, ray_of_two], ids=["dask", "ray"])
def cluster(request):
    before = set(os.environ)
    address, close = request.param()
    runner = runner_of(address, 1)
    yield runner
    runner.close()
    close()
    for name in set(os.environ) - before:  # Dask gives its workers one thread of each library by variables that it sets here, and leaves them
        if not name.startswith("NUMBA_"):
            del os.environ[name]


def doubles(runner, function, arguments):
    return {number: result["double"] for number, result in runner.run(f"tasks:{function}", arguments)}


def test_the_bytes_are_those_of_the_pool(cluster, tmp_path):
    sources = make(tmp_path / "sources")
    prepare(sources, tmp_path / "out", recipe(), cluster)
    pool = Pool(2)
    prepare(sources, tmp_path / "pool", recipe(), pool)
    pool.close()
    assert digest(tmp_path / "out") == digest(tmp_path / "pool")


def test_a_task_whose_worker_is_killed_runs_again(cluster, tmp_path):
    """One of four tasks kills, and no worker that has only just begun: Dask gives up one that dies before its nanny has heard of it, and a cluster
    that has lost all of them so waits for ever."""
    arguments = [{"place": str(tmp_path), "number": number} for number in range(4)]
    for number in range(1, 4):
        (tmp_path / f"died-{number}").touch()
    assert doubles(cluster, "dies_once", arguments) == {number: 2 * number for number in range(4)}
    assert len(list(tmp_path.iterdir())) == 4


def test_what_a_task_raises_reaches_the_user_and_the_cluster_goes_on(cluster):
    arguments = [{"place": "", "number": number} for number in range(8)]
    with pytest.raises(DataError, match="the disk of the test is full"):
        list(cluster.run("tasks:raises_data", arguments))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        list(cluster.run("tasks:raises_bug", arguments))
    assert doubles(cluster, "double", arguments) == {number: 2 * number for number in range(8)}


def test_a_task_that_kills_every_worker_is_named(cluster):
    # The last test: four deaths of two workers, each of which may then be gone for good (see above).
    with pytest.raises(DataError, match=r"it killed each worker that tried \(dies of /some/file\.pdf\)"):
        list(cluster.run("tasks:dies", [{"place": "/some/file.pdf", "number": 1}]))


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_a_cluster_that_is_not_there_is_told_at_once(kind):
    pytest.importorskip({"dask": "distributed"}.get(kind, kind))
    with pytest.raises(DataError, match=f"there is no {kind.title()} .* at {kind}://127.0.0.1:9"):
        runner_of(f"{kind}://127.0.0.1:9", 1)
