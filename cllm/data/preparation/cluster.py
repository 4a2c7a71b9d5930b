"""The same tasks on an existing cluster: Dask (extra `cluster`) by futures alone, or Ray.

All workers need the same versions of what can change a byte, and the same files under the same paths: a folder on shared storage whose renames are
atomic. Whoever reaches a scheduler can run any program on its workers, so an address outside of this machine has to be encrypted.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

from cllm._version import __version__
from cllm.data.preparation.ledger import Heard, unheard
from cllm.data.preparation.worker import ATTEMPTS, answer, blame, result_of
from cllm.runtime.errors import DataError, UserError

WINDOW = 1000  # tasks that a scheduler holds at a time
_LIBRARIES = ("numpy", "numba", "pyarrow", "rensa", "xxhash", "trafilatura", "resiliparse", "pypdfium2", "py3langid", "ftfy", "lxml")


def versions() -> dict[str, str]:
    """Of everything that the bytes of a result depend on."""
    found = {"cllm": __version__, "python": ".".join(map(str, sys.version_info[:2]))}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _answer_of_ours(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What a worker is asked first and then for each task. It names only this installed package, so nothing is sent but names and values."""
    return answer(function, arguments)


def check_address(address: str) -> None:
    """UserError for a scheduler on another machine that is not encrypted."""
    parts = urlsplit(address)
    host = parts.hostname or ""
    try:
        near = ipaddress.ip_address(host).is_loopback
    except ValueError:
        near = host in ("localhost", "")
    if not host or parts.port is None:
        raise UserError(f"--runner must be an address with its port, as in {parts.scheme}://127.0.0.1:8786, got {address!r}.")
    if not near and parts.scheme != "tls":
        raise UserError(
            f"--runner {address}: anyone who reaches a scheduler can run programs on its workers, so one on another machine must be encrypted. "
            "Start it with TLS and say --runner tls://HOST:PORT, or reach it through an SSH tunnel to 127.0.0.1."
        )


def _knock(address: str) -> None:
    """OSError where nobody listens. Dask would ask again until its time is over, and Ray for minutes, after which it ends this process."""
    parts = urlsplit(address)
    socket.create_connection((parts.hostname or "", parts.port or 0), timeout=20).close()


def _same_versions(found: dict[str, dict[str, str]]) -> None:
    own = versions()
    for worker, theirs in sorted(found.items()):
        other = [f"{name} {theirs.get(name)} instead of {version}" for name, version in own.items() if theirs.get(name) != version]
        if other:
            raise DataError(f"the worker {worker} would give other bytes: it has {', '.join(other)}. Install the same versions everywhere.")


class Dask:
    """A scheduler at dask://HOST:PORT (this machine) or tls://HOST:PORT, with the certificates of Dask's own configuration."""

    def __init__(self, address: str) -> None:
        check_address(address)
        try:
            from distributed import Client, Security
        except ImportError:
            raise UserError("--runner dask:// needs Dask. Install it: pip install 'cllm[cluster]'") from None
        encrypted = address.startswith("tls://")
        place = address if encrypted else f"tcp://{address.removeprefix('dask://')}"
        security = {"security": Security(require_encryption=True)} if encrypted else {}
        try:
            _knock(address)
            self._client = Client(place, timeout=20, set_as_default=False, **security)
        except (OSError, TimeoutError, RuntimeError) as error:
            raise DataError(
                f"there is no Dask scheduler at {address}: {' '.join(str(error).split())[:200]}. Start it, then run this again."
            ) from None
        try:
            _same_versions(self._client.run(versions))
            if not self._client.scheduler_info()["workers"]:
                raise DataError(f"the scheduler at {address} has no workers. Start some with `dask worker`, then run this again.")
        except BaseException:
            self.close()
            raise

    def run(self, function: str, arguments: Sequence[dict[str, Any]], heard: Heard = unheard) -> Iterator[tuple[int, dict[str, Any]]]:
        from distributed import KilledWorker, as_completed

        def submit(number: int) -> Any:
            # Equal arguments are not the same task: two attempts may be at work at once.
            return self._client.submit(_answer_of_ours, function, arguments[number], pure=False, retries=0)

        numbers = {submit(number): number for number in range(min(WINDOW, len(arguments)))}
        ready = as_completed(list(numbers), loop=self._client.loop)
        to_come = iter(range(len(numbers), len(arguments)))
        try:
            for future in ready:
                number = numbers.pop(future)
                try:
                    message = future.result()
                except KilledWorker as error:
                    raise DataError(blame(function, arguments[number], "it killed each worker that tried")) from error
                yield number, result_of(message, function)
                following = next(to_come, None)
                if following is not None:
                    future = submit(following)
                    numbers[future] = following
                    ready.add(future)
        finally:
            if numbers:
                self._client.cancel(list(numbers), force=True)

    def close(self) -> None:
        self._client.close(timeout=2)


class Ray:
    """A Ray cluster at ray://HOST:PORT, whose head runs on this machine."""

    def __init__(self, address: str) -> None:
        check_address(address)
        try:
            import ray
        except ImportError:
            raise UserError("--runner ray:// needs Ray, which is not installed. Install it with pip, the same version as the cluster's.") from None
        self._ray = ray
        try:
            _knock(address)
            ray.init(address=address.removeprefix("ray://"), log_to_driver=False, logging_level="error")
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"there is no Ray cluster at {address}: {' '.join(str(error).split())[:200]}. Start its head on this machine, then run this again."
            ) from None
        try:
            nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
            on = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
            asked = [ray.remote(versions).options(scheduling_strategy=on(node, soft=False)).remote() for node in nodes]
            _same_versions(dict(zip(nodes, ray.get(asked))))
        except BaseException:
            self.close()
            raise

    def run(self, function: str, arguments: Sequence[dict[str, Any]], heard: Heard = unheard) -> Iterator[tuple[int, dict[str, Any]]]:
        remote = self._ray.remote(_answer_of_ours).options(num_cpus=1, max_retries=ATTEMPTS - 1, scheduling_strategy="SPREAD")
        numbers: dict[Any, int] = {}
        to_come = iter(range(len(arguments)))
        try:
            while True:
                while len(numbers) < WINDOW and (number := next(to_come, None)) is not None:
                    numbers[remote.remote(function, arguments[number])] = number
                if not numbers:
                    return
                (ready,), _ = self._ray.wait(list(numbers), num_returns=1)
                number = numbers.pop(ready)
                try:
                    message = self._ray.get(ready)
                except (self._ray.exceptions.WorkerCrashedError, self._ray.exceptions.OutOfMemoryError) as error:
                    raise DataError(blame(function, arguments[number], "it killed each worker that tried")) from error
                yield number, result_of(message, function)
        finally:
            for each in numbers:
                self._ray.cancel(each, force=True)

    def close(self) -> None:
        self._ray.shutdown()
