"""Writes checkpoints while training goes on.

Weights and moments change only where the optimizer updates them. So a thread copies them during the forward and backward of the next step,
`before_update` waits for that copy alone, and hashing, writing and reading back happen from the copy at a low priority. At most one checkpoint
is on its way: a disk that is slower than the interval between checkpoints holds training up rather than filling the memory.
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

_NICENESS = 10  # of the thread that hashes and writes: it takes the cores' idle moments first


class CheckpointWriter:
    """Saves into `store`, in the background or (`background=False`) before `save` returns.

    An error of a background write is raised by the next call of `check`, `save` or `wait`; earlier checkpoints are untouched.
    """

    def __init__(self, store: CheckpointStore, background: bool = True) -> None:
        self.store, self.background = store, background
        self.stall_seconds = 0.0  # for which all checkpoints together have held up training
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._error: BaseException | None = None
        self._afterwards: list[Callable[[], None]] = []
        self._copies: dict[str, torch.Tensor] = {}  # kept from one checkpoint to the next

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
        """Starts (or makes) the checkpoint of `step`. The tensors may change only after `before_update` has returned."""
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
        """Calls `action` once what is on its way is complete: now, or in the next `check`, `save` or `wait` after it."""
        self._afterwards.append(action)
        self.check()

    def before_update(self) -> None:
        """Returns as soon as the checkpoint on its way, if there is one, has its copy of everything that an update changes."""
        if self.busy and not self._copied.is_set():
            began = time.perf_counter()
            self._copied.wait()
            self.stall_seconds += time.perf_counter() - began

    def check(self) -> None:
        """Raises what a background write failed with."""
        if not self.busy:
            self.wait()

    def wait(self, beat: Callable[[], None] | None = None) -> None:
        """Returns when nothing is on its way; raises what it failed with. `beat` is called while it lasts."""
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
            with contextlib.suppress(OSError, AttributeError):  # of this thread alone, on Linux
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
        # numpy's copy runs on this thread alone, without Python's lock; torch's would start a second set of threads.
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dim():
            copy.view(torch.uint8).numpy()[...] = tensor.detach().view(torch.uint8).numpy()
        else:
            copy.copy_(tensor.detach())
        return copy
