"""The processes of one run: how they find each other, what they agree on, and how all of them end when one does.

    with session() as world:        # None where this process is alone
        Trainer(...).fit()

Small things (how a run is resumed, why a process ended) travel as JSON through the store that torchrun keeps, never as pickles.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from cllm import distributed
from cllm.distributed import PATIENCE, alike
from cllm.runtime.errors import CLLMError, UserError

if TYPE_CHECKING:
    import torch

FAILED, TOLD = "failed", "told"


@dataclass
class World:
    """This process and the others. `rank` counts over all machines, `local_rank` over this one."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    store: Any
    timeout: float
    patient: Any = None  # the same processes as a group that waits for days; None: the usual one
    _values: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sums(self, values: Sequence[float], group: Any = None) -> list[float]:
        """Each value summed over the processes, in float64 and in the order of ranks: whole numbers exactly, others with the same bits everywhere."""
        import torch

        first, *others = gathered(torch.tensor(values, dtype=torch.float64), self.size, group)
        for row in others:
            first += row
        return first.tolist()

    def largest(self, value: float) -> float:
        """The largest value of any process, the same for all."""
        import torch

        return float(gathered(torch.tensor([value], dtype=torch.float64), self.size).max())

    def agreed(self, asked: str | None) -> str | None:
        """The name of the signal that asked any of the processes to stop (`asked` is what this one received), so that all stop together."""
        number = int(self.largest(0 if asked is None else signal.Signals[asked]))
        return signal.Signals(number).name if number else None

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the first process, as JSON. The others wait as long as it lives, for it may take hours (tokenizing)."""
        self._values += 1
        key = f"value/{self._values}"
        if self.leads:
            value = make()
            self.store.set(key, json.dumps(value))
        self.sums([0.0], self.patient)  # not a look into the store now and then: a connection that breaks ends the wait at once
        return value if self.leads else json.loads(self.store.get(key))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, as JSON."""
        self._values += 1
        self.store.set(f"value/{self._values}/{self.rank}", json.dumps(value))
        self.sums([0.0])
        return [json.loads(self.store.get(f"value/{self._values}/{rank}")) for rank in range(self.size)]


def gathered(mine: torch.Tensor, size: int, group: Any = None) -> torch.Tensor:
    """The equally long vectors of `size` processes, (size, length) by rank."""
    import torch.distributed as dist

    everyone = mine.new_empty(size * mine.numel())
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13
    gather(everyone, mine.contiguous(), group=group)
    return everyone.view(size, -1)


@contextlib.contextmanager
def session(device: str = "auto", timeout: float = 600.0) -> Iterator[World | None]:
    """Joins the processes that torchrun started; yields None at once where there is only this one.

    device "cpu" talks over gloo, a GPU over NCCL (each process takes the GPU of its local rank). `timeout`: seconds to wait for the others.
    While it is open only the first process prints. An error in one process ends all, with one message and the same exit status.
    """
    if not distributed.launched():
        yield None
        return
    loud = sys.stderr
    with _quiet(int(os.environ["RANK"]) != 0), _Terminations() as terminations:
        world = None
        try:
            world = _join(device, timeout)
            distributed._current = world
            yield world
        except BaseException as error:
            terminations.ignored = True  # torchrun sends SIGTERM to all when one ends: what happened is told first
            _end(world, error, loud)
            raise
        finally:
            distributed._current = None
            _leave()


class Terminated(CLLMError):
    """SIGTERM where there is nothing to save."""

    exit_status = 143


class _Terminations:
    """While entered, SIGTERM raises Terminated, or nothing once the end is being told. In the training loop `StopSignals` takes it instead."""

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
def _quiet(quiet: bool) -> Iterator[None]:
    """Silences a process that is not the first."""
    if not quiet:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment variable {name} must be a whole number, got {text!r}. Start the processes with torchrun.") from None


def _join(device: str, timeout: float) -> World:
    import torch
    import torch.distributed as dist

    rank, size = _number("RANK"), _number("WORLD_SIZE")
    local_rank, local_size = _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size)
    if not dist.is_available():
        raise UserError("this PyTorch was built without torch.distributed. Install another build, or train in one process.")
    place, backend = _place(device, local_rank, local_size)
    wait = timedelta(seconds=timeout)
    store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=wait))
    # With torchrun the store lives in its agent and outlives the processes: what those before a restart left in it must not be found.
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
    import torch

    from cllm.runtime.device import resolve

    place, _ = resolve(device)
    if place.type == "cpu":
        return place, "gloo"
    if local_size > torch.cuda.device_count():
        raise UserError(
            f"{local_size} processes on a machine with {torch.cuda.device_count()} GPUs: each needs one of its own. "
            f"Use --nproc-per-node {torch.cuda.device_count()}, or --device cpu."
        )
    return torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"


def _leave() -> None:
    dist = getattr(sys.modules.get("torch"), "distributed", None)
    if dist is not None and dist.is_available() and dist.is_initialized():
        with contextlib.suppress(Exception):  # the others may be gone
            dist.destroy_process_group()


def _hang_up() -> None:
    """Closes the connections to the other processes, so that whoever waits for this one wakes up.

    gloo closes them only once nothing refers to a group any more, and an error on its way refers to much. The store's connection stays.
    """
    import psutil

    store = _number("MASTER_PORT", 0)
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.Process().net_connections("tcp"):
            if each.status == psutil.CONN_ESTABLISHED and store not in (each.laddr.port, each.raddr.port):
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(each.fd)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)


# -- the end of a run that failed ------------------------------------------------------------------------------------------


def _end(world: World | None, error: BaseException, loud: TextIO) -> None:
    """Sees to it that one process tells what happened and that all end with the same status. Raises, or returns where `error` shall go on."""
    if isinstance(error, SystemExit) and not error.code:
        return
    if world is None:  # nobody to agree with
        with alike():
            raise error
    said: dict[str, Any] | None = None
    own: dict[str, Any] = {}
    if _of_others(error):
        said = _said(world)
        if said is None:
            words = f"another process of this run ended without a word, or did not answer for {world.timeout:.0f} s"
            said = {"text": f"{words} ({_brief(error)}). It may have been killed, or run out of memory. Run the same command to go on "
                    "from the newest checkpoint.", "status": 1, "rank": None}  # fmt: skip
    else:
        own = {"text": _told_by(error), "status": _status(error), "rank": world.rank}
        with contextlib.suppress(Exception):
            if world.store.compare_set(FAILED, "", json.dumps(own)).decode() != json.dumps(own):
                said = _said(world)  # another was first; an error that all meet alike is told once
    _hang_up()
    _leave()
    status = (said or own)["status"]
    if world.leads:
        if not _claim(world):
            raise SystemExit(status) from None
        if said is None or said["rank"] == 0 or said["text"] == _told_by(error):
            return  # the command line tells it
        by = "" if said["rank"] is None else f"process {said['rank']} of {world.size}: "
        raise _Other(by + said["text"], status) from None
    waited = time.monotonic() + PATIENCE
    with contextlib.suppress(Exception):
        while time.monotonic() < waited and not world.store.check([TOLD]):
            time.sleep(0.05)
    time.sleep(0.5)  # torchrun ends all when one ends
    if _claim(world):
        told = said or own
        by = "" if told["rank"] is None else f"process {told['rank']} of {world.size}: "
        loud.write(f"error: {by}{told['text']}\n")
        loud.flush()
    raise SystemExit(status) from None


class _Other(CLLMError):
    """What ended the run in another process, with that process's exit status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.exit_status = status


def _claim(world: World) -> bool:
    """Whether this process is the one that tells; also where the store is gone with the process that kept it.

    torchrun asks all to end when one has: who is to tell does so before it ends.
    """
    mine = True
    with contextlib.suppress(Exception):
        mine = int(world.store.add(TOLD, 1)) == 1
    if mine:
        with contextlib.suppress(ValueError):  # outside the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return mine


def _said(world: World) -> dict[str, Any] | None:
    """What another process left before it ended. One that was killed left nothing."""
    until = time.monotonic() + 1.0
    with contextlib.suppress(Exception):
        while time.monotonic() < until:
            if world.store.check([FAILED]):
                return json.loads(world.store.get(FAILED))
            time.sleep(0.05)
    return None


def _of_others(error: BaseException) -> bool:
    """Whether an error only says that another process is gone: those of the communication library have no class of their own on gloo."""
    if isinstance(error, Terminated) and error.__context__ is not None:
        error = error.__context__  # SIGTERM came while another error was on its way
    import torch

    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "ProcessGroup", "Timed out waiting", "Socket Timeout")
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def _brief(error: BaseException) -> str:
    """The library's own words without the place in its source and without its advice."""
    text = " ".join(str(error).split())
    return text.rpartition("cc:")[2].partition("] ")[2].partition(". This ")[0][:160].rstrip(". ") or type(error).__name__


def _told_by(error: BaseException) -> str:
    if isinstance(error, CLLMError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" (in {os.path.basename(where[0].filename)}, line {where[0].lineno})" if where else ""
    return f"{type(error).__name__}: {error}{place}"


def _status(error: BaseException) -> int:
    if isinstance(error, CLLMError):
        return error.exit_status
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1
