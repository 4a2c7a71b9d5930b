"""Training in several processes, on one machine or many, as `torchrun` starts them.

    torchrun --nproc-per-node 2 -m cllm train books/ --out runs/books

    session.py      the processes of a run: how they find each other, what they agree on, how all of them end when one does
    share.py        which sequences of an update's batch a process learns from
    sharding.py     which rows of each weight it holds, where weights are sharded
    reduce.py       gradients of all processes together: bucketed all-reduce, and the fixed tree of the deterministic mode

The training steps on top of that are in `cllm.train` (step_parallel.py, step_sharded.py), the checkpoints of several processes in
`cllm.checkpoint`. A process that trains alone imports none of these modules, and `torch.distributed` nowhere.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cllm.runtime.errors import CLLMError

if TYPE_CHECKING:
    from cllm.distributed.session import World

_current: World | None = None


def launched() -> bool:
    """Whether torchrun, or a launcher that speaks its environment, started this process as one of several."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def current() -> World | None:
    """The processes of this run while a `session` is open; None for a process of its own."""
    return _current


PATIENCE = 5.0  # seconds in which the first process is left to tell what went wrong before another one does


@contextmanager
def alike() -> Iterator[None]:
    """Around what fails in all processes alike, before they know of each other: the first one tells it, the others end with its status."""
    try:
        yield
    except CLLMError as error:
        if not launched() or os.environ["RANK"] == "0":
            raise
        time.sleep(PATIENCE)  # torchrun ends all when one ends: not before the first one has spoken
        raise SystemExit(error.exit_status) from None
