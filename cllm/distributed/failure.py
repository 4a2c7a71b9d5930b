"""How all processes of a run end when one of them fails: one of them reports it, and all exit with the same status.

A process that fails leaves a `Failure` in the store. The others learn of it when the communication library tells them that a connection broke,
when torchrun, which ends all processes as soon as one has ended, sends them SIGTERM, or, where a collective of NCCL hears of neither, from
`PeerWatch`. The first process reports if it is still there, because it is the one whose output a person sees; otherwise the first of the others
to claim the report does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TextIO

from cllm.distributed.launch import environment_number, launched
from cllm.runtime.errors import CLLMError

if TYPE_CHECKING:
    from cllm.distributed.world import World

PATIENCE = 5.0  # seconds that the first process has to report what went wrong before another one does
WAKING = 2.0  # seconds in which a process that can notice by itself that another one is gone has done so
FAILED, REPORTED = "failed", "reported"  # keys of the store: the first failure, and how many processes have claimed to report it
WATCHED = 713  # the tag of the message by which a process leaves in order


class Terminated(CLLMError):
    """SIGTERM arrived outside the training loop, where there is nothing to save."""

    exit_status = 143


class PeerFailed(CLLMError):
    """Another process of the run failed; `status` is the exit status that it ended with."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.exit_status = status


@dataclass(frozen=True)
class Failure:
    """What ended a process: the text that a person reads, the exit status, and the rank of the process, None where it could not say so itself."""

    text: str
    status: int
    rank: int | None

    def report(self, size: int) -> str:
        """The text, with the process it is about."""
        return self.text if self.rank is None else f"process {self.rank} of {size}: {self.text}"


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Around what fails in every process in the same way before the processes are connected, such as the reading of settings: the first process
    reports it, the others exit silently with the same status."""
    try:
        yield
    except CLLMError as error:
        if not launched() or os.environ["RANK"] == "0":
            raise
        time.sleep(PATIENCE)  # torchrun ends all processes when one ends: not before the first one has reported
        raise SystemExit(error.exit_status) from None


def end_together(world: World | None, error: BaseException, stderr: TextIO) -> None:
    """Agrees with the other processes on who reports `error`, which is ending this one. Returns where the caller is to raise it; otherwise raises
    SystemExit, or PeerFailed with the message of another process. `stderr`: where a process other than the first reports."""
    if isinstance(error, SystemExit) and not error.code:
        return
    if world is None:  # not connected yet
        with fail_together():
            raise error
    failure = _first_failure(world, error)
    close_connections()
    abort()
    if world.leads:
        if not claim_report(world):
            raise SystemExit(failure.status) from None
        if failure.rank == world.rank or failure.text == _message(error):
            return
        raise PeerFailed(failure.report(world.size), failure.status) from None
    wait_for_report(world)
    if claim_report(world):
        stderr.write(f"error: {failure.report(world.size)}\n")
        stderr.flush()
    raise SystemExit(failure.status) from None


def _first_failure(world: World, error: BaseException) -> Failure:
    """The failure that ends the run: this process's own, unless another process left one before it."""
    if is_peer_error(error):
        return peer_failure(world) or _without_a_word(world, _interrupted_error(error))
    own = Failure(_message(error), _exit_status(error), world.rank)
    with contextlib.suppress(Exception):  # the store may be gone
        value = json.dumps(asdict(own))
        if world.store.compare_set(FAILED, "", value).decode() != value:
            return peer_failure(world) or own
    return own


def _without_a_word(world: World, error: BaseException) -> Failure:
    """What there is to say of a process that left nothing. error: what the communication library raised."""
    what = f"another process of this run ended without a word, or did not answer for {world.timeout:.0f} s ({_library_message(error)})"
    return Failure(f"{what}. It may have been killed, or run out of memory. Run the same command to go on from the newest checkpoint.", 1, None)


def peer_failure(world: World) -> Failure | None:
    """What another process left before it ended; None after a second, because a process that was killed leaves nothing."""
    until = time.monotonic() + 1.0
    with contextlib.suppress(Exception):
        while time.monotonic() < until:
            if world.store.check([FAILED]):
                return Failure(**json.loads(world.store.get(FAILED)))
            time.sleep(0.05)
    return None


def wait_for_report(world: World) -> None:
    """Gives the first process the time to report before this one does."""
    until = time.monotonic() + PATIENCE
    with contextlib.suppress(Exception):  # the store may be gone
        while time.monotonic() < until and not world.store.check([REPORTED]):
            time.sleep(0.05)
    time.sleep(0.5)  # torchrun ends all processes when one ends: the first one needs a moment to print


def claim_report(world: World) -> bool:
    """Whether this process is the one that reports the failure: the first to ask, or any where the store is gone with the process that kept it.

    torchrun asks all processes to end when one has ended. The one that reports ignores that until it has done so.
    """
    mine = True
    with contextlib.suppress(Exception):
        mine = int(world.store.add(REPORTED, 1)) == 1
    if mine:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return mine


def is_peer_error(error: BaseException) -> bool:
    """Whether an error only says that another process is gone or does not answer, so that the cause is to be found there."""
    return _is_communication_error(_interrupted_error(error))


def _interrupted_error(error: BaseException) -> BaseException:
    """The error itself; for SIGTERM that arrived while a process was already ending because another one is gone, the error that told it so."""
    handled = error.__context__ if isinstance(error, Terminated) else None
    while handled is not None:
        if _is_communication_error(handled):
            return handled
        handled = handled.__context__
    return error


# What gloo raises is a plain RuntimeError; it begins with the place in gloo's source:
#   [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:17636. This is typically caused by ...
#   [/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv operation to complete
_GLOO = re.compile(r"\[\S*\bgloo/\S+:\d+\]|Connection (closed|reset) by peer|Timed out waiting \d+ms|Socket Timeout|\bNCCL\b")


def _is_communication_error(error: BaseException) -> bool:
    """Whether the communication library raised this. The store and NCCL raise subclasses of DistError; gloo is known by its words alone, which
    the tests of several processes compare with what it raises."""
    import torch

    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and _GLOO.search(str(error)) is not None)


def _library_message(error: BaseException) -> str:
    """What the communication library says, without the place in its source and without its advice."""
    text = re.sub(r"^\[\S*\] ", "", " ".join(str(error).split()))
    return text.partition(". This ")[0][:160].rstrip(". ") or type(error).__name__


def _message(error: BaseException) -> str:
    """What a person is told about an error; for one that is a fault of the program, where it was raised."""
    if isinstance(error, CLLMError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" (in {os.path.basename(where[0].filename)}, line {where[0].lineno})" if where else ""
    return f"{type(error).__name__}: {error}{place}"


def _exit_status(error: BaseException) -> int:
    if isinstance(error, CLLMError):
        return error.exit_status
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def close_connections() -> None:
    """Closes the connections to the other processes, so that those which wait for this one are woken up at once.

    gloo closes a connection only when nothing refers to its group any more, and the traceback of an error refers to much. The connection to the
    store stays open.
    """
    import psutil

    store = environment_number("MASTER_PORT", 0)
    with contextlib.suppress(psutil.Error, OSError):
        for each in psutil.Process().net_connections("tcp"):
            if each.status == psutil.CONN_ESTABLISHED and store not in (each.laddr.port, each.raddr.port):
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(each.fd)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)


def leave() -> None:
    """Leaves the group of processes, where this one has joined it and all is well."""
    dist = _joined()
    if dist is not None:
        with contextlib.suppress(Exception):  # the others may be gone
            dist.destroy_process_group()


def abort() -> None:
    """Leaves the group without waiting for anybody. To destroy a communicator of NCCL waits for the collectives that are on their way, which never
    end where a process is gone; to abort it ends them. Where even that does not come back, the kernel ends the process a little later, because
    CUDA would wait for the same at the end of the interpreter."""
    dist = _joined()
    if dist is None:
        return
    if "nccl" not in dist.get_backend_config():
        leave()
        return
    aborting = threading.Thread(target=_abort_nccl, daemon=True, name="cllm-abort")
    aborting.start()
    aborting.join(PATIENCE)
    if aborting.is_alive():
        signal.alarm(int(2 * PATIENCE))


def _abort_nccl() -> None:
    from torch.distributed import distributed_c10d

    with contextlib.suppress(Exception):
        distributed_c10d._abort_process_group()


def _joined() -> Any:
    """The module torch.distributed where this process has joined a group, otherwise None."""
    dist = getattr(sys.modules.get("torch"), "distributed", None)
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


class PeerWatch:
    """Ends this process when another one of the run is gone and the main thread does not notice. A collective of NCCL is not woken by closed
    connections, and while the main thread waits for one it hears no signal either.

    A thread of each process waits for a message from the next one, which comes when that one leaves in order. A connection that breaks instead is
    the end of the run: this process closes its own, which hands the news on and wakes a main thread that can be woken, and where that has not
    begun to end within WAKING seconds the thread reports in its place and ends the process. Checkpoints are complete at any moment.
    """

    def __init__(self, world: World, stderr: TextIO) -> None:
        self._world, self._stderr = world, stderr
        self._ending, self._lost = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name="cllm-peer-watch")
        if world.size > 1:
            self._thread.start()

    def ending(self) -> None:
        """The main thread has noticed, or has itself failed."""
        self._ending.set()

    def loss(self, seconds: float) -> Exception | None:
        """The error by which another process was lost, waited for at most so long; None where all are there."""
        self._lost.wait(seconds)
        return self._error

    def close(self) -> None:
        """Tells the process that watches this one that all is well, and waits until the one that it watches itself has left too, or is gone."""
        import torch

        self._ending.set()
        if self._world.size > 1:
            with contextlib.suppress(Exception):  # the connection is closed
                torch.distributed.send(torch.zeros(1), (self._world.rank - 1) % self._world.size, self._world.patient, WATCHED)
            self._thread.join()

    def _run(self) -> None:
        import torch

        try:
            torch.distributed.recv(torch.zeros(1), (self._world.rank + 1) % self._world.size, self._world.patient, WATCHED)
        except Exception as error:
            self._error = error
            self._lost.set()
            if self._ending.is_set():
                return
            close_connections()
            if not self._ending.wait(WAKING):
                self._end(error)

    def _end(self, error: Exception) -> None:
        """Reports what happened elsewhere, if no other process has, and ends the process under its main thread."""
        signal.alarm(int(2 * PATIENCE))  # the main thread may hold the store
        failure = peer_failure(self._world) or _without_a_word(self._world, error)
        if not self._world.leads:  # as in `end_together`
            wait_for_report(self._world)
        if claim_report(self._world):
            self._stderr.write(f"\nerror: {failure.report(self._world.size)}\n")
            self._stderr.flush()
        os._exit(failure.status)
