"""Training in several processes, on one machine or many, as `torchrun` starts them.

    torchrun --nproc-per-node 2 -m cllm train books/ --out runs/books

    launch.py       whether this process is one of several
    session.py      how the processes of a run find each other
    world.py        what they agree on: sums, the largest value, small messages
    failure.py      how all of them end, with one message and one exit status, when one fails
    share.py        which sequences of an update's batch a process learns from
    sharding.py     which rows of each weight it holds, where weights are sharded
    reduce.py       gradients of all processes together: bucketed all-reduce, and the fixed tree of the deterministic mode

The training steps on top of that are in `cllm.train` (step_parallel.py, step_sharded.py), the checkpoints of several processes in
`cllm.checkpoint`. A process that trains alone imports `launch.py` and `failure.py` at most, and `torch.distributed` nowhere.
"""

from typing import TYPE_CHECKING

from cllm._lazy import exports

__all__ = ["current", "fail_together", "launched"]

if TYPE_CHECKING:
    from cllm.distributed.failure import fail_together
    from cllm.distributed.launch import current, launched

__getattr__, __dir__ = exports(
    __name__,
    {
        "current": "cllm.distributed.launch",
        "fail_together": "cllm.distributed.failure",
        "launched": "cllm.distributed.launch",
    },
)
