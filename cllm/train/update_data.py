"""Which data each update learns from. It is a function of the settings, the update's number and the rollbacks before it, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from cllm.config.schedule import BatchRamp
from cllm.train.build import make_batches
from cllm.train.loader import Loader

if TYPE_CHECKING:
    from cllm.config.train import TrainConfig
    from cllm.data import TokenSplit
    from cllm.data.tokens.batch import Batch
    from cllm.distributed.share import Share
    from cllm.train.faults import Faults

NAMED_DOCUMENTS = 20  # the most documents that are named for one update


class _Key(NamedTuple):
    """An update, and the number of the data that it learns from."""

    update: int
    number: int


class UpdateData:
    """The microbatches of each update of a run.

    `faults` says which data rollbacks have left out, `share` which sequences are this process's own (None: all of them). With
    `train.overfit_one_batch` every update gets the data of the first one. Raises DataError where the split is too short for one sequence.
    A context manager: while entered, a thread makes microbatches one update ahead where there is something to do to each of them, `ready`, which
    that thread does as well.
    """

    def __init__(
        self, split: TokenSplit, config: TrainConfig, faults: Faults, share: Share | None, ready: Callable[[Batch], Batch] | None = None
    ) -> None:
        self.split, self.faults, self.share = split, faults, share
        self.batches = make_batches(split, config)
        self._always_the_first = config.train.overfit_one_batch
        self._ramp = BatchRamp(config.train.grad_accum, config.train.batch_ramp)
        self._made: tuple[_Key, list[Batch]] = (_Key(-1, -1), [])  # of the update asked for last, which is asked for twice
        self._ready = ready
        self._loader: Loader[_Key, list[Batch]] | None = None

    def __enter__(self) -> UpdateData:
        if self._ready is not None:
            self._loader = Loader(self._make)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def number(self, update: int) -> int:
        """The number of the data that update number `update` (from 0) learns from: its own, or a later one after rollbacks left data out."""
        return self.faults.data_of(update)

    def _key(self, update: int) -> _Key:
        return _Key(update, 0 if self._always_the_first else self.number(update))

    def microbatches(self, update: int) -> list[Batch]:
        """What this process learns from in update number `update`, from 0."""
        key = self._key(update)
        if self._made[0] != key:
            self._made = key, self._make(key) if self._loader is None else self._loader.take(key, self._key(update + 1))
        return self._made[1]

    def _make(self, key: _Key) -> list[Batch]:
        if self.share is not None:
            made = self.share.microbatches(self.batches, key.number)
        else:
            first = self._ramp.before(key.number)
            made = [self.batches.batch(first + index) for index in range(self._ramp.size(key.update))]
        return made if self._ready is None else [self._ready(each) for each in made]

    def documents(self, update: int) -> list[str]:
        """The names of the documents that all processes together learnt from in an update, at most NAMED_DOCUMENTS."""
        numbers = self._documents(update) if self._loader is None else self._loader.run(lambda: self._documents(update))
        return [self.split.document_name(each) for each in sorted(numbers)[:NAMED_DOCUMENTS]]

    def _documents(self, update: int) -> set[int]:
        key = self._key(update)
        first = self._ramp.before(key.number)
        return {each for index in range(self._ramp.size(update)) for each in self.batches.batch(first + index).documents}
