"""Training batches of windows over packed tokens. Batch `index` is a function of the data, the seed and the index alone.

The tokens of a split are taken as a ring. An epoch consists of the windows of T tokens that lie side by side on the ring from a random place on, in
random order: floor(tokens / T) windows, in which each token is a target at most once. Fewer than T tokens are left out, others in each epoch. Where
the ring closes there is no target (-100). Window j of the endless sequence of epochs is row j % B of batch j // B: one batch of 12 and three
batches of 4 see the same windows, and where an epoch has fewer windows than a batch, the batch continues with the next epoch.

With `fim`, a share of what a window holds of each document is rearranged, so that its middle is learnt last (fim.py).

Random numbers are the raw output of Philox, which is the same in every version of numpy.
"""

from functools import partial

import numpy as np

from cllm.data.tokens.batch import Batch
from cllm.data.tokens.fim import FillInTheMiddle
from cllm.data.tokens.shards import PackedTokens
from cllm.data.tokens.windows import check_sizes, gather
from cllm.runtime.errors import DataError, UserError

SHUFFLES = ("epoch", "random", "none")
# Numbers of the independent random streams of a seed: the order of an epoch, single windows, and the parts of a window. Chats have another.
_ORDER, _DRAW, _FIM = 0, 1, 3


class Batches:
    """An endless sequence of training batches: `batch(index)` for index 0, 1, 2, ...

    seq_len: T, the tokens of a row. batch_size: B, the rows of a batch. seed: >= 0.
    shuffle: "epoch" (or True): a new permutation of the windows in each epoch; "random": each window begins anywhere, drawn with replacement,
        as in nanoGPT; "none" (or False): the windows in order.
    document_mask: whether attention stops at the boundaries of documents, whose first tokens are then no targets.
    fim: rearranges pieces of documents, each window by numbers of its own.

    Raises UserError for sizes below 1, a negative seed or another shuffle, DataError when the split is too short for one window.
    """

    def __init__(
        self, split: PackedTokens, seq_len: int, batch_size: int, seed: int = 0, *, shuffle: str | bool = "epoch", document_mask: bool = False,
        fim: FillInTheMiddle | None = None,
    ):  # fmt: skip
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
        self.fim = fim
        self.windows_per_epoch = split.num_tokens // seq_len
        self._epoch: tuple[int, int, np.ndarray] | None = None  # number, first token and order of the windows of the epoch used last: a cache

    @property
    def tokens_per_epoch(self) -> int:
        """Places for targets in one epoch, including those without one."""
        return self.windows_per_epoch * self.seq_len

    @property
    def num_batches(self) -> int:
        """The number of batches after which every window of the first epoch has been seen."""
        return self.num_batches_for(1)

    def num_batches_for(self, epochs: float) -> int:
        """The number of batches in this many epochs, rounded up, at least 1."""
        return max(1, int(np.ceil(epochs * self.windows_per_epoch / self.batch_size)))

    def epoch_of(self, index: int) -> float:
        """How many epochs come before batch `index`, with a fraction."""
        return index * self.batch_size / self.windows_per_epoch

    def batch(self, index: int) -> Batch:
        """Batch number `index`, counted from 0. What was asked for before makes no difference."""
        assert index >= 0, index
        return self.rows(index * self.batch_size, self.batch_size)

    def rows(self, first: int, count: int) -> Batch:
        """Windows `first` to `first + count` of the endless sequence as one batch, wherever the batches of `batch` begin and end."""
        if self.shuffle == "random":
            room = self.split.num_tokens - self.seq_len  # the number of places where a window with all of its targets may begin
            starts = [int(raw % room) for raw in _raw_from(self.seed, first, count)]
        else:
            starts = [self._start(window) for window in range(first, first + count)]
        rearrange = None if self.fim is None else partial(self._rearranged, self.fim, first)
        return gather(self.split, starts, self.seq_len, self.document_mask, ring=True, rearrange=rearrange)._replace(first_row=first)

    def __getitem__(self, index: int) -> Batch:
        return self.batch(index)

    def _rearranged(self, fim: FillInTheMiddle, first: int, row: int, place: int, tokens: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """What the window `first` + `row` holds from a place on; see `gather`."""
        numbers = _philox(self.seed, _FIM, first + row, place).random_raw(4 * (len(begins) + 1))
        return fim.rearranged(tokens, begins, numbers.reshape(-1, 4))

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


def _philox(*key: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(key))


def _raw_from(seed: int, first: int, count: int) -> list[int]:
    """Numbers `first` to `first + count` of an endless stream of random 64-bit numbers. Philox makes 4 of them from each value of its counter."""
    block = first // 4
    generator = _philox(seed, _DRAW, 0)
    generator.advance(block)
    skip = first - 4 * block
    return [int(raw) for raw in generator.random_raw(skip + count)[skip:]]
