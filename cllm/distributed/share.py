"""Which sequences of an update's batch a process learns from.

The batch of an update has `batch_size x grad_accum` sequences, whatever the number of processes, and is a function of the seed and the number of the
update alone. It is cut into pieces: microbatches of batch_size sequences, or in deterministic mode leaves of `unit` sequences. Each process takes a
contiguous run of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cllm.data.tokens.batch import Batch, TrainingBatches
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.config.train import TrainConfig
    from cllm.distributed.world import World


@dataclass(frozen=True)
class Share:
    """The part of process `rank` of `size`, in an update of `sequences` sequences that is cut into pieces of `piece`."""

    sequences: int
    piece: int
    rank: int = 0
    size: int = 1
    whole_pieces: bool = False  # whether pieces are never cut at the boundary between two processes
    dealt: bool = False  # whether piece k goes to process k % size; otherwise each process takes a contiguous run

    @classmethod
    def of(cls, config: TrainConfig, world: World | None) -> Share:
        """The share of this process; `world` is None for one that trains alone. Raises UserError where an update has too few sequences, or in
        deterministic mode too few leaves, for so many processes."""
        settings = config.train
        sequences = settings.batch_size * settings.grad_accum
        rank, size = (0, 1) if world is None else (world.rank, world.size)
        piece = min(settings.unit, sequences) if settings.deterministic else settings.batch_size
        share = cls(sequences, piece, rank, size, settings.deterministic, settings.deterministic and settings.parallel != "ddp" and size > 1)
        most = share.num_pieces if settings.deterministic else sequences
        if most < size:
            what = f"leaves of {piece} sequences (unit)" if settings.deterministic else "sequences"
            raise UserError(
                f"an update has {most} {what} for {size} processes. Raise batch_size or grad_accum, whose product is the number of sequences of an "
                "update over all processes, or start fewer processes."
            )
        return share

    @property
    def num_pieces(self) -> int:
        """The pieces of an update, over all processes; the last one may be shorter."""
        return -(-self.sequences // self.piece)

    def pieces(self) -> list[tuple[int, int]]:
        """(first sequence, number of sequences) of each piece of this process, in order."""
        if self.dealt:
            chosen = list(range(self.rank, self.num_pieces, self.size))
        elif self.whole_pieces:
            chosen = list(range(*self.run_of(self.rank)))
        else:
            first, last = (self.sequences * (self.rank + more) // self.size for more in (0, 1))
            return [(start, min(self.piece, last - start)) for start in range(first, last, self.piece)]
        return [(number * self.piece, min(self.piece, self.sequences - number * self.piece)) for number in chosen]

    def run_of(self, rank: int) -> tuple[int, int]:
        """The first piece of a process and the one after its last, where each process takes a run of whole pieces."""
        return self.num_pieces * rank // self.size, self.num_pieces * (rank + 1) // self.size

    @property
    def rounds(self) -> int:
        """The largest number of pieces that any process has."""
        each = self.sequences if not (self.whole_pieces or self.dealt) else self.num_pieces
        most = -(-each // self.size)
        return most if self.whole_pieces or self.dealt else -(-most // self.piece)

    def microbatches(self, batches: TrainingBatches, step: int) -> list[Batch]:
        """What this process learns from in update number `step`, counted from 0."""
        return [batches.rows(step * self.sequences + first, count) for first, count in self.pieces()]
