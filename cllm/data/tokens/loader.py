"""Training batches of windows over packed tokens. Batch `index` depends on (data, seed, index) alone: on no worker, and on no batch before it.

The stream of a split is taken as a ring, and an epoch is all of its windows, side by side
from a random place on, in random order: floor(tokens / T) windows, each token a target at most once, fewer than T of them left over, other
ones in each epoch. Where the ring closes there is no target (-100). Window j of the endless sequence of epochs is row j % B of batch j // B,
so that one batch of 12 and three of 4 see the same windows, and data smaller than a batch simply begins its next epoch within it.

Random numbers are raw Philox output, which numpy keeps the same in every version.
"""

import numpy as np

from cllm.data.tokens.batch import Batch
from cllm.data.tokens.shards import PackedTokens
from cllm.data.tokens.windows import check_sizes, gather
from cllm.runtime.errors import DataError, UserError

SHUFFLES = ("epoch", "random", "none")
_ORDER, _DRAW = 0, 1  # separate streams of random numbers for one seed


class Batches:
    """An endless sequence of training batches: `batch(index)` for index 0, 1, 2, ...

    shuffle: "epoch" (True): each epoch a new permutation of windows; "random": every window starts anywhere, drawn with replacement, as in
    nanoGPT; "none" (False): windows in order. Raises DataError when the split is too short for one window.
    """

    def __init__(
        self, split: PackedTokens, seq_len: int, batch_size: int, seed: int = 0, *, shuffle: str | bool = "epoch", document_mask: bool = False
    ):
        if isinstance(shuffle, bool):
            shuffle = "epoch" if shuffle else "none"
        if shuffle not in SHUFFLES:
            raise UserError(f'shuffle must be one of {", ".join(SHUFFLES)}, got "{shuffle}".')
        check_sizes(seq_len, batch_size)
        if seed < 0:
            raise UserError(f"seed must be >= 0, got {seed}.")
        if split.num_tokens < seq_len + 1:
            longest = split.num_tokens - 1
            advice = f"Use --seq-len {longest} or less, or more text." if longest >= 1 else "Use more text."
            raise DataError(f"The training data has {split.num_tokens:,} tokens; one window of --seq-len {seq_len} needs {seq_len + 1:,}. {advice}")
        self.split = split
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.document_mask = document_mask
        self.windows_per_epoch = split.num_tokens // seq_len
        self._epoch: tuple[int, int, np.ndarray] | None = None  # number, first token, order of windows: only a cache

    @property
    def tokens_per_epoch(self) -> int:
        """Targets in one epoch, those without a target included."""
        return self.windows_per_epoch * self.seq_len

    @property
    def num_batches(self) -> int:
        """Batches after which every window of the first epoch was seen."""
        return self.num_batches_for(1)

    def num_batches_for(self, epochs: float) -> int:
        """Batches that make up this many epochs, rounded up, at least 1."""
        return max(1, int(np.ceil(epochs * self.windows_per_epoch / self.batch_size)))

    def epoch_of(self, index: int) -> float:
        """Epochs seen before batch `index`, as a number with a fraction."""
        return index * self.batch_size / self.windows_per_epoch

    def batch(self, index: int) -> Batch:
        """Batch number `index` from 0; the same for the same data, seed, seq_len and batch_size, whoever asks and whatever was asked before."""
        assert index >= 0, index
        return self.rows(index * self.batch_size, self.batch_size)

    def rows(self, first: int, count: int) -> Batch:
        """Windows `first` to `first + count` of the endless sequence as one batch, wherever the batches of `batch` begin and end."""
        if self.shuffle == "random":
            room = self.split.num_tokens - self.seq_len  # starts of windows whose last target is still there
            starts = [int(raw % room) for raw in _raw_from(self.seed, first, count)]
        else:
            starts = [self._start(window) for window in range(first, first + count)]
        return gather(self.split, starts, self.seq_len, self.document_mask, ring=True)

    def __getitem__(self, index: int) -> Batch:
        return self.batch(index)

    def _start(self, window: int) -> int:
        epoch, place = divmod(window, self.windows_per_epoch)
        if self.shuffle == "none":
            return place * self.seq_len
        cached = self._epoch
        if cached is None or cached[0] != epoch:
            raw = _philox(self.seed, _ORDER, epoch).random_raw(self.windows_per_epoch + 1)
            offset = int(raw[0] % np.uint64(self.split.num_tokens))
            self._epoch = cached = (epoch, offset, np.argsort(raw[1:], kind="stable"))
        return (cached[1] + int(cached[2][place]) * self.seq_len) % self.split.num_tokens


def _philox(seed: int, stream: int, number: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([seed, stream, number]))


def _raw_from(seed: int, first: int, count: int) -> list[int]:
    """Numbers `first` to `first + count` of one endless stream of random 64-bit numbers, by moving Philox's counter (4 numbers a count)."""
    block = first // 4
    generator = _philox(seed, _DRAW, 0)
    generator.advance(block)
    skip = first - 4 * block
    return [int(raw) for raw in generator.random_raw(skip + count)[skip:]]
