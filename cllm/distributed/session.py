"""How the processes of a run find each other.

with session() as world:        # None where this process is alone
    Trainer(...).fit()
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any

from cllm.distributed.failure import WAKING, PeerWatch, Terminated, end_together, leave
from cllm.distributed.launch import entered, environment_number, launched
from cllm.distributed.world import World
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def session(device: str = "auto", timeout: float = 600.0) -> Iterator[World | None]:
    """Joins the processes that torchrun started; yields None at once where there is only this one.

    device: "cpu" communicates through gloo, a GPU through NCCL, where each process takes the GPU of its local rank. timeout: seconds to wait for
    the other processes before the run fails. While the session is open only the first process prints, and an error in one process ends all of
    them, with one message and the same exit status.

    Raises UserError where PyTorch has no distributed package, an environment variable of the launcher is not a number, or there are more
    processes than GPUs.
    """
    if not launched():
        yield None
        return
    stderr = sys.stderr
    with _silenced(environment_number("RANK") != 0), _Terminations() as terminations:
        world = watch = None
        try:
            world = _join(device, timeout)
            watch = PeerWatch(world, stderr)
            with entered(world):
                yield world
        except BaseException as error:
            terminations.ignored = True  # torchrun sends SIGTERM to all processes when one ends; this one has to report first
            cause: BaseException = error
            if watch is not None:
                if isinstance(error, Terminated):  # it can be faster than the connection that breaks
                    cause = watch.loss(WAKING) or error
                watch.ending()
            end_together(world, cause, stderr)
            raise
        finally:
            if watch is not None:
                watch.close()
            leave()


class _Terminations:
    """While entered, SIGTERM raises Terminated, or is ignored once `ignored` is set. In the training loop `StopSignals` handles it instead."""

    ignored = False

    def __enter__(self) -> _Terminations:
        self._before: Any = None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._arrived)
        return self

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if not self.ignored:
            raise Terminated("ended by SIGTERM.")

    def __exit__(self, *exc: object) -> None:
        if self._before is not None and not self.ignored:
            signal.signal(signal.SIGTERM, self._before)


@contextlib.contextmanager
def _silenced(silent: bool) -> Iterator[None]:
    """While entered, what this process prints goes nowhere, if `silent`."""
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _join(device: str, timeout: float) -> World:
    import torch
    import torch.distributed as dist

    rank, size = environment_number("RANK"), environment_number("WORLD_SIZE")
    local_rank, local_size = environment_number("LOCAL_RANK", rank), environment_number("LOCAL_WORLD_SIZE", size)
    if not dist.is_available():
        raise UserError("this PyTorch was built without torch.distributed. Install another build, or train in one process.")
    place, backend = _place(device, local_rank, local_size)
    wait = timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=wait))
    # torchrun keeps the store, which outlives the processes: after a restart they must not find what those before them left in it.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=wait)
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    world = World(rank, size, local_rank, local_size, place, dist.PrefixStore("cllm", store), timeout, patient)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if "CLLM_THREADS" not in os.environ:
        from cllm.runtime.device import usable_cores

        os.environ["CLLM_THREADS"] = str(max(1, usable_cores() // local_size))  # the processes of a machine share its cores
    return world


def _place(device: str, local_rank: int, local_size: int) -> tuple[torch.device, str]:
    """The device of this process, and the backend that the processes communicate through."""
    import torch

    from cllm.runtime.device import resolve_kind

    if resolve_kind(device)[0] == "cpu":
        return torch.device("cpu"), "gloo"
    if local_size > torch.cuda.device_count():
        raise UserError(
            f"{local_size} processes on a machine with {torch.cuda.device_count()} GPUs: each needs one of its own. "
            f"Use --nproc-per-node {torch.cuda.device_count()}, or --device cpu."
        )
    return torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
