"""One batch of token windows: what the data yields and what training and evaluation consume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch

Row = TypeVar("Row")
IGNORE = -100  # a target with this value contributes neither to the loss nor to any count


class Batch(NamedTuple):
    """A batch of B rows of T tokens. Training calls it a microbatch: the gradients of one or more of them make one update.

    tokens: (B, T) int64, the inputs.
    targets: (B, T) int64, the token that follows each input, or `IGNORE` where nothing is predicted.
    cu_seqlens: (n + 1,) int32, the boundaries of the documents in the B * T tokens laid end to end, from 0 to B * T; attention does not cross
        them. None: every row is one document.
    documents: the numbers of the documents in the batch, ascending; `split.document_name` gives their names.
    positions: (B * T,) int64, the place of each token in its document, where it is known already; the bounds are then right.
    first_row: the number of its first row among all that a run learns from, which dropout draws by. None: nobody has counted.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    documents: Sequence[int] = ()
    positions: torch.Tensor | None = None
    first_row: int | None = None

    @property
    def num_targets(self) -> int:
        """How many targets are predicted."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; tensors that are there already are not copied."""
        return self.map(lambda each: each.to(device))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The batch with each of its tensors changed."""
        cu_seqlens, positions = (None if each is None else change(each) for each in (self.cu_seqlens, self.positions))
        return Batch(change(self.tokens), change(self.targets), cu_seqlens, self.documents, positions, self.first_row)


def first_tokens(microbatches: Sequence[Batch]) -> list[int]:
    """The number of the first token of each microbatch of an update. Rows that nobody has numbered are counted within the update."""
    rows, found = 0, []
    for each in microbatches:
        rows = rows if each.first_row is None else each.first_row
        found.append(rows * each.tokens.shape[1])
        rows += each.tokens.shape[0]
    return found


class TrainingBatches(Protocol):
    """An endless sequence of training batches. Each is a function of the data, the seed and its number alone."""

    def batch(self, index: int) -> Batch:
        """Batch number `index`, counted from 0."""

    def rows(self, first: int, count: int) -> Batch:
        """Rows `first` to `first + count` of the endless sequence as one batch; batch k of B rows consists of rows k * B to (k + 1) * B."""


class EvaluationBatches(Protocol):
    """A whole split once, in order, or a part of it."""

    @property
    def num_rows(self) -> int:
        """The number of rows in all batches together."""

    @property
    def num_targets(self) -> int:
        """The number of tokens that are predicted in all batches together."""

    @property
    def num_bytes(self) -> float:
        """The bytes of text, in UTF-8, that these tokens stand for."""

    def part(self, num_rows: int) -> EvaluationBatches:
        """At most `num_rows` of these rows, spread evenly over them: the same for the same numbers of rows."""

    def __len__(self) -> int:
        """The number of batches."""

    def __iter__(self) -> Iterator[Batch]: ...

    def batch(self, index: int) -> Batch:
        """Batch number `index`; the last one may have fewer rows."""


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """`count` of the rows, at most all of them, at even distances."""
    count = min(count, len(rows))
    return [rows[number * len(rows) // count] for number in range(count)]
