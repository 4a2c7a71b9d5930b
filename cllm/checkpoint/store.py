"""The checkpoints of one run: written, found again, and dropped when newer ones make them superfluous."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cllm.checkpoint.folder import Checkpoint, complete, read_checkpoint
from cllm.checkpoint.parts import OPTIMIZER, WEIGHTS
from cllm.checkpoint.place import named_step, step_folder, steps_in
from cllm.checkpoint.safetensors import describe_tensor, tensors_bytes, write_safetensors
from cllm.files import Wording, new_folder, write_file
from cllm.runtime.errors import CheckpointError
from cllm.runtime.files import clean, remove_folder

CHECKPOINT = Wording(CheckpointError, "another folder with --out, then run the same command to go on", "Earlier checkpoints are untouched.")


class CheckpointStore:
    """The checkpoints below `folder`: `step-00001000` and so on, and two files, `latest` and `best`, that each name one of them.

    Kept are the `keep` newest ones, the best, and with `keep_every` those of every so many steps. The store of a run is used under the run's
    lock (`RunLock`), so nobody else writes into its folder.
    """

    def __init__(self, folder: str | Path, keep: int = 2, keep_every: int = 0) -> None:
        self.folder, self.keep, self.keep_every = Path(folder), keep, keep_every

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of a step, whether it exists or not."""
        return step_folder(self.folder, step)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, in rising order. Whether a checkpoint is good shows only when it is read."""
        return steps_in(self.folder)

    def save(self, step: int, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Path:
        """Writes, verifies and commits a checkpoint, makes it the latest and drops the oldest. Returns its folder.

        Raises CheckpointError when the disk does not take it or does not read back what was written. Everything is then as it was.
        """
        self.clean()
        with new_folder(self.path(step), CHECKPOINT, tensors_bytes(weights) + tensors_bytes(optimizer)) as beside:
            digests, tensors = {}, {}
            for name, part in ((WEIGHTS, weights), (OPTIMIZER, optimizer)):
                digests[name] = write_safetensors(beside / name, part, {"format": "pt"})
                tensors[name] = {each: describe_tensor(tensor) for each, tensor in part.items()}
            complete(beside, step, digests, tensors, state)
        self._publish(step)
        return self.path(step)

    def clean(self) -> None:
        """Removes what an interrupted write left beside the checkpoints."""
        clean(self.folder, alone=True)

    def mark_best(self, step: int) -> None:
        """Makes `best` name the checkpoint of a step, and drops those that need not be kept any longer."""
        self._point("best", step)
        self._prune()

    def best(self) -> int | None:
        """The step that `best` names; None when there is none."""
        return named_step(self.folder, "best")

    def latest(self) -> int | None:
        """The step that `latest` names; None when there is none."""
        return named_step(self.folder, "latest")

    def read(self, step: int, with_optimizer: bool = True) -> Checkpoint:
        """The verified checkpoint of a step. Raises CheckpointError when it is damaged or missing."""
        return read_checkpoint(self.path(step), with_optimizer)

    def newest_good(self, report: Callable[[str], None] | None = None, with_optimizer: bool = True) -> Checkpoint | None:
        """The newest checkpoint whose every byte verifies; None when there are none. `report` is told of each damaged one that is passed over.

        Raises CheckpointError when there are checkpoints and all are damaged: starting afresh would be a silent loss.
        """
        problems = []
        for step in reversed(self.steps()):
            try:
                return self.read(step, with_optimizer)
            except CheckpointError as error:
                problems.append(str(error))
                if report is not None:
                    report(f"{error} Falling back to the checkpoint before it.")
        if problems:
            raise CheckpointError(f"no good checkpoint in {self.folder}: {' '.join(problems)} Move the folder away to start anew.")
        return None

    def _publish(self, step: int) -> None:
        self._point("latest", step)
        self._prune()

    def _point(self, name: str, step: int) -> None:
        write_file(self.folder / name, f"{self.path(step).name}\n".encode(), CHECKPOINT)

    def _prune(self) -> None:
        steps = self.steps()
        kept = {*steps[-self.keep :], self.best(), self.latest()}
        for step in steps:
            if step not in kept and not (self.keep_every and step % self.keep_every == 0):
                with contextlib.suppress(OSError):
                    remove_folder(self.path(step))
