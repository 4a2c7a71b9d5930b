"""Writes checkpoints while training goes on.

Weights and optimizer state change only when the optimizer updates them. A thread therefore copies them during the forward and backward passes
of the next step, and `before_update` waits for that copy only. Hashing, writing and reading back then work on the copy, at a low priority. One
checkpoint is written at a time: a disk that is slower than the interval between checkpoints delays training instead of filling the memory.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cllm.checkpoint.store import CheckpointStore

_NICENESS = 10  # the thread that hashes and writes leaves the cores to training where both want them


class CheckpointWriter:
    """Saves into `store`, in the background or, with `background=False`, before `save` returns.

    An error of a background write is raised by the next call of `check`, `save` or `wait`. Earlier checkpoints are untouched.
    """

    def __init__(self, store: CheckpointStore, background: bool = True) -> None:
        self.store, self.background = store, background
        self.stall_seconds = 0.0  # time that training has waited for checkpoints so far
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._error: BaseException | None = None
        self._afterwards: list[Callable[[], None]] = []
        self._copies: dict[str, torch.Tensor] = {}  # memory that is used again for the next checkpoint

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def complete(self) -> bool:
        """Whether everything that was given is on the disk."""
        return not self.busy and self._error is None

    def save(self, step: int, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Starts the checkpoint of `step`, or makes it. The tensors may only change after `before_update` has returned."""
        self.wait()
        began = time.perf_counter()
        if not self.background:
            self.store.save(step, weights, optimizer, state)
        else:
            self._copied.clear()
            self._thread = threading.Thread(target=self._write, args=(step, weights, optimizer, state), daemon=True, name="cllm-checkpoint")
            self._thread.start()
        self.stall_seconds += time.perf_counter() - began

    def afterwards(self, action: Callable[[], None]) -> None:
        """Calls `action` when the checkpoint that is being written is complete: now, or in a later `check`, `save` or `wait`."""
        self._afterwards.append(action)
        self.check()

    def before_update(self) -> None:
        """Returns when the checkpoint that is being written, if there is one, has copied everything that an update changes."""
        if self.busy and not self._copied.is_set():
            began = time.perf_counter()
            self._copied.wait()
            self.stall_seconds += time.perf_counter() - began

    def check(self) -> None:
        """Raises the error of a background write that has ended."""
        if not self.busy:
            self.wait()

    def wait(self, beat: Callable[[], None] | None = None) -> None:
        """Returns when no checkpoint is being written, and raises the error of the one that was. `beat` is called every second meanwhile."""
        if self._thread is not None:
            began = time.perf_counter()
            while self._thread.is_alive():
                self._thread.join(1.0)
                if beat is not None:
                    beat()
            self._thread = None
            self.stall_seconds += time.perf_counter() - began
        error, self._error = self._error, None
        actions, self._afterwards = self._afterwards, []
        if error is not None:
            raise error
        for action in actions:
            action()

    def _write(self, step: int, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        try:
            copies = [{name: self._copy(kind, name, tensor) for name, tensor in part.items()} for kind, part in (("w", weights), ("o", optimizer))]
            self._copied.set()
            with contextlib.suppress(OSError, AttributeError):  # on Linux a priority belongs to a thread; elsewhere it is left
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
            self.store.save(step, copies[0], copies[1], state)
        except BaseException as error:
            self._error = error
        finally:
            self._copied.set()

    def _copy(self, kind: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        key = f"{kind}.{name}"
        copy = self._copies.get(key)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = self._copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype)
        # The copy of numpy runs on this thread and without the interpreter lock. That of torch would start a second set of threads.
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dim():
            copy.view(torch.uint8).numpy()[...] = tensor.detach().view(torch.uint8).numpy()
        else:
            copy.copy_(tensor.detach())
        return copy
