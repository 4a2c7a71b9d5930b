"""A process of the run fails while the others are inside a collective that hears of nothing, as one of NCCL: all end, and one of them says why."""

import json
import re
from pathlib import Path

import pytest
from command import python

from cllm.checkpoint.store import CheckpointStore
from cllm.data.pipeline import prepare

# Who fails in the fourth collective, how, and how many processes there are.
CASES = {"fails": ("fails", 1, 2), "is killed": ("killed", 0, 3), "in order": ("nothing", 0, 2)}

# One Python that has imported everything forks the processes of all cases.
CODE = """
import ctypes, json, os, signal, sys
import torch, torch.distributed as dist
import process_jobs as jobs
from cllm import runtime
from cllm.distributed.session import session
from cllm.runtime.errors import DataError
import cllm.distributed.reduce, cllm.train.step_parallel

def process(rank, size, port, how, fails, data, out):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CLLM_THREADS": "1"}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # the launcher keeps the store
    all_reduce, calls = dist.all_reduce, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) < 4 or how == "nothing":
            return all_reduce(*args, **kwargs)
        if rank == fails and how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == fails:
            raise DataError("the data has gone.")
        lock, libc = (ctypes.c_long * 16)(), ctypes.CDLL(None)
        libc.pthread_mutex_lock(lock)
        libc.pthread_mutex_lock(lock)  # which waits in C, and no signal ends it

    dist.all_reduce = failing
    try:
        with session("cpu") as world, runtime.use(backend="torch"):
            jobs.train(world, data, out, {"checkpoint_every": 1, "eval_every": 100})
    except SystemExit as end:
        return end.code
    except BaseException as error:
        sys.stderr.write(f"error: {error}\\n")
        return getattr(error, "exit_status", 1)
    return 0

def forked(work, log):
    child = os.fork()
    if not child:
        if log is not None:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        status = work()
        sys.stdout.flush()
        os._exit(status)
    return child

def case(name, how, fails, size):
    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = os.path.join(folder, name)
    children = [forked(lambda: process(rank, size, port, how, fails, data, out), out + ".log") for rank in range(size)]
    store = dist.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    with open(out + ".json", "w") as file:
        json.dump(statuses, file)
    return 0

torch.set_num_threads(1)
data, folder, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for child in [forked(lambda: case(name, *what), None) for name, what in cases.items()]:
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of each case the exit status of each process, the lines that all together told as an error, and the step of the newest checkpoint."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("one two three many " * 150, encoding="utf-8")
    prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.05)
    done = python("-c", f"import sys; sys.path.append({str(Path(__file__).parents[2])!r})\n{CODE}", folder / "tokens", folder, json.dumps(CASES))
    assert done.status == 0, done.err
    return {name: _outcome(folder, name) for name in CASES}


def _outcome(folder, name):
    told = re.findall(r"^error: .*", (folder / f"{name}.log").read_text(), flags=re.M)
    return json.loads((folder / f"{name}.json").read_text()), told, CheckpointStore(folder / name / "checkpoints").newest_good().step


def test_an_error_of_one_process_ends_all_that_cannot_be_woken(runs):
    assert runs["fails"] == ([1, 1], ["error: process 1 of 2: the data has gone."], 3)


def test_a_process_that_is_killed_ends_all_that_cannot_be_woken(runs):
    statuses, told, step = runs["is killed"]
    assert (statuses, step) == ([-9, 1, 1], 3)
    assert len(told) == 1 and told[0].startswith("error: another process of this run ended without a word")


def test_processes_that_leave_in_order_end_well(runs):
    assert runs["in order"] == ([0, 0], [], 6)
