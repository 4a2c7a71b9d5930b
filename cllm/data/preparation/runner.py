"""Where tasks run: in this machine's pool of workers by default, on a Dask or Ray cluster by address. The bytes are the same on all of them.

A runner moves no data. A task is the name of a function and small arguments, and works on files that all workers see.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from cllm.data.preparation.ledger import Heard, Runner, unheard
from cllm.data.preparation.worker import ATTEMPTS, ONE_THREAD, blame, result_of
from cllm.runtime.errors import DataError, UserError


def runner_of(address: str, workers: int) -> Runner:
    """The runner of `--runner`: "pool", "dask://HOST:PORT", "tls://HOST:PORT" (Dask as well) or "ray://HOST:PORT". Raises UserError."""
    if address == "pool":
        return Pool(workers)
    if address.startswith(("dask://", "tls://", "ray://")):
        from cllm.data.preparation.cluster import Dask, Ray

        return Ray(address) if address.startswith("ray://") else Dask(address)
    raise UserError(f"--runner must be pool, dask://HOST:PORT or ray://HOST:PORT, got {address!r}.")


class Pool:
    """Worker processes of this machine, each with one task at a time.

    A worker that dies (killed by hand, or for its memory) costs what it was doing: another one takes its place and begins that task again. A task
    that loses three workers is to blame itself, and the work stops with its name.
    """

    def __init__(self, workers: int) -> None:
        self._num_workers = max(1, workers)
        self._workers: list[_Worker] = []
        self._answers: queue.SimpleQueue[tuple[_Worker, str]] = queue.SimpleQueue()

    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [worker.process.pid for worker in self._workers]

    def run(self, function: str, arguments: Sequence[dict[str, Any]], heard: Heard = unheard) -> Iterator[tuple[int, dict[str, Any]]]:
        waiting = list(range(len(arguments)))[::-1]
        deaths = [0] * len(arguments)
        busy: dict[_Worker, int] = {}
        while waiting or busy:
            idle = [worker for worker in self._workers if worker not in busy]
            while waiting and (idle or len(self._workers) < self._num_workers):
                worker = idle.pop() if idle else self._start()
                number = waiting.pop()
                busy[worker] = number
                worker.send({"function": function, "arguments": arguments[number]})
            worker, line = self._answers.get()
            if worker not in self._workers:
                continue
            if worker not in busy:  # it died while it had nothing to do
                self._workers.remove(worker)
                continue
            message = json.loads(line) if line else {}
            if "done" in message:
                heard(busy[worker], message["done"])
                continue
            number = busy.pop(worker)
            if message:
                yield number, result_of(message, function)
                continue
            self._workers.remove(worker)
            deaths[number] += 1
            if deaths[number] >= ATTEMPTS:
                raise DataError(blame(function, arguments[number], f"{worker.how_it_ended()}, {ATTEMPTS} times in a row"))
            waiting.append(number)

    def _start(self) -> _Worker:
        worker = _Worker(self._answers)
        self._workers.append(worker)
        return worker

    def close(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []


class _Worker:
    """One process, and the thread that waits for its answers. An empty answer means that it has ended."""

    def __init__(self, answers: queue.SimpleQueue[tuple[_Worker, str]]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cllm.data.preparation.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)},
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in a terminal reaches only the program that owns the workers
        )
        threading.Thread(target=self._listen, args=(answers,), daemon=True).start()

    def _listen(self, answers: queue.SimpleQueue[tuple[_Worker, str]]) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                if line.endswith("\n"):  # or it was killed in the middle of it
                    answers.put((self, line))
        except ValueError:  # closed by `end`
            return
        answers.put((self, ""))

    def send(self, task: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
        except OSError:  # it has just died, which its listener tells
            pass

    def how_it_ended(self) -> str:
        status = self.process.wait()
        if status == -signal.SIGKILL:
            return "its process was killed (often because memory ran out)"
        return f"its process ended by {signal.Signals(-status).name}" if status < 0 else f"its process ended with status {status}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
