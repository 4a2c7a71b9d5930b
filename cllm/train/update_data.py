"""Which data each update learns from. It is a function of the settings, the update's number and the rollbacks before it, and of nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cllm.config.schedule import BatchRamp
from cllm.train.build import make_batches

if TYPE_CHECKING:
    from cllm.config.train import TrainConfig
    from cllm.data import TokenSplit
    from cllm.data.tokens.batch import Batch
    from cllm.distributed.share import Share
    from cllm.train.faults import Faults

NAMED_DOCUMENTS = 20  # the most documents that are named for one update


class UpdateData:
    """The microbatches of each update of a run.

    `faults` says which data rollbacks have left out, `share` which sequences are this process's own (None: all of them). With
    `train.overfit_one_batch` every update gets the data of the first one. Raises DataError where the split is too short for one sequence.
    """

    def __init__(self, split: TokenSplit, config: TrainConfig, faults: Faults, share: Share | None) -> None:
        self.split, self.faults, self.share = split, faults, share
        self.batches = make_batches(split, config)
        self._always_the_first = config.train.overfit_one_batch
        self._ramp = BatchRamp(config.train.grad_accum, config.train.batch_ramp)
        self._made: tuple[tuple[int, int], list[Batch]] = ((-1, -1), [])  # of the update asked for last, which is asked for twice

    def number(self, update: int) -> int:
        """The number of the data that update number `update` (from 0) learns from: its own, or a later one after rollbacks left data out."""
        return self.faults.data_of(update)

    def microbatches(self, update: int) -> list[Batch]:
        """What this process learns from in update number `update`, from 0."""
        number = 0 if self._always_the_first else self.number(update)
        if self._made[0] != (update, number):
            self._made = (update, number), self._make(update, number)
        return self._made[1]

    def _make(self, update: int, number: int) -> list[Batch]:
        if self.share is not None:
            return self.share.microbatches(self.batches, number)
        first = self._ramp.before(number)
        return [self.batches.batch(first + index) for index in range(self._ramp.size(update))]

    def documents(self, update: int) -> list[str]:
        """The names of the documents that all processes together learnt from in an update, at most NAMED_DOCUMENTS."""
        first = 0 if self._always_the_first else self._ramp.before(self.number(update))
        numbers = {each for index in range(self._ramp.size(update)) for each in self.batches.batch(first + index).documents}
        return [self.split.document_name(each) for each in sorted(numbers)[:NAMED_DOCUMENTS]]
