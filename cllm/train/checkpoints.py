"""A run's checkpoints as the training loop uses them: save a step once, wait for the disk, know the newest good one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from cllm.checkpoint.safetensors import tensors_bytes
from cllm.checkpoint.writer import CheckpointWriter
from cllm.monitor.records import MachineRow
from cllm.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from cllm.checkpoint.store import CheckpointStore
    from cllm.monitor.metrics import Metrics
    from cllm.monitor.reporter import Reporter

SLOW_DISK_SECONDS = 1.0  # training that waits longer than this for the checkpoint before is told about


class Checkpoints:
    """Writes the checkpoints of a run into `store`, with `background` while training goes on. What is waited for is shown by `report`; a slow
    disk is recorded in `metrics`. A context manager: however its block ends, the checkpoint on its way is completed, or a second Ctrl-C ends
    that as well. Raises CheckpointError where one cannot be written; those before it are untouched.
    """

    def __init__(self, store: CheckpointStore, background: bool, report: Reporter, metrics: Metrics) -> None:
        self.store, self._report, self._metrics = store, report, metrics
        self._writer = CheckpointWriter(store, background)
        self.newest_step: int | None = None  # the newest step that was saved or found here; None: save the next one in any case
        self._saving = False

    def save(self, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Starts (or makes) the checkpoint of a step; the tensors may change only after `before_update`."""
        if self._writer.busy:
            began = time.perf_counter()
            self.finish()
            waited = time.perf_counter() - began
            if waited > SLOW_DISK_SECONDS:
                text = f"step {step:,}: the disk is slow: training waited {waited:.1f} s for the checkpoint before this one"
                self._metrics.write(MachineRow(step=step, event="slow_disk", action="wait", text=text, seconds=round(waited, 3)))
                self._report.say(f"{text}. Raise checkpoint_every, or use a faster disk")
        megabytes = (tensors_bytes(weights) + tensors_bytes(optimizer)) / 1e6
        self._saving = True
        with self._report.stage(f"writing a checkpoint ({megabytes:,.0f} MB)", "checkpoint"):
            self._writer.save(step, weights, optimizer, state)
        self.newest_step, self._saving = step, False

    def hold(self, step: int) -> bool:
        """Whether the checkpoint of a step is the newest and complete on the disk; may be asked in any thread."""
        return self.newest_step == step and not self._saving and self._writer.complete

    def mark_best(self, step: int) -> None:
        """Makes `best` name the checkpoint of a step, as soon as it is complete."""
        self._writer.afterwards(partial(self.store.mark_best, step))

    def before_update(self) -> None:
        """Returns when the checkpoint on its way has its copy of everything that an update changes."""
        self._writer.before_update()

    def check(self) -> None:
        """Raises what a checkpoint written in the background failed with."""
        self._writer.check()

    def finish(self) -> None:
        """Returns when no checkpoint is on its way; raises what it failed with."""
        if self._writer.busy:
            with self._report.stage("waiting for the disk to take the checkpoint"):
                self._writer.wait(self._report.beat)
        self._writer.check()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.finish()
            return
        try:
            self.finish()
        except CheckpointError as error:  # what ended the run is told first; this comes beside it
            self._report.say(f"error: {error}")
