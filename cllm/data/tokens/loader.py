"""Batches of windows over packed tokens. Training batch `index` depends on (data, seed, index) alone: on no worker, and on no batch before it.

A window is T inputs and, one further, T targets. The stream of a split is taken as a ring, and an epoch is all of its windows, side by side
from a random place on, in random order: floor(tokens / T) windows, each token a target at most once, fewer than T of them left over, other
ones in each epoch. Where the ring closes there is no target (-100). Window j of the endless sequence of epochs is row j % B of batch j // B,
so that one batch of 12 and three of 4 see the same windows, and data smaller than a batch simply begins its next epoch within it.

With the document mask, rows are cut into documents (`cu_seqlens`), and the first token of a document is nobody's target.
Random numbers are raw Philox output, which numpy keeps the same in every version.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from cllm.data.tokens.shards import TokenSplit
from cllm.runtime.errors import DataError, UserError

IGNORE = -100
SHUFFLES = ("epoch", "random", "none")
_ORDER, _DRAW = 0, 1  # separate streams of random numbers for one seed


class Batch(NamedTuple):
    """tokens, targets (B, T) int64, targets -100 where there is none; cu_seqlens (n + 1,) int32 over the B * T tokens laid end to end,
    or None without the document mask; documents: the indices of the documents in it (`split.document_name` tells their names)."""

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None
    documents: list[int]


class Batches:
    """An endless sequence of training batches: `batch(index)` for index 0, 1, 2, ...

    shuffle: "epoch" (True): each epoch a new permutation of windows; "random": every window starts anywhere, drawn with replacement, as in
    nanoGPT; "none" (False): windows in order. Raises DataError when the split is too short for one window.
    """

    def __init__(
        self, split: TokenSplit, seq_len: int, batch_size: int, seed: int = 0, *, shuffle: str | bool = "epoch", document_mask: bool = False
    ):
        if isinstance(shuffle, bool):
            shuffle = "epoch" if shuffle else "none"
        if shuffle not in SHUFFLES:
            raise UserError(f'shuffle must be one of {", ".join(SHUFFLES)}, got "{shuffle}".')
        _check_sizes(seq_len, batch_size)
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
        return self.windows(index * self.batch_size, self.batch_size)

    def windows(self, first: int, count: int) -> Batch:
        """Windows `first` to `first + count` of the endless sequence as one batch, however they are cut into batches otherwise."""
        if self.shuffle == "random":
            room = self.split.num_tokens - self.seq_len  # starts of windows whose last target is still there
            starts = [int(raw % room) for raw in _raw_from(self.seed, first, count)]
        else:
            starts = [self._start(window) for window in range(first, first + count)]
        return _gather(self.split, starts, self.seq_len, self.document_mask, ring=True)

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


class Windows:
    """A whole split once, in order, for evaluation: every token but the first (of the split, or with the document mask of each document) is a
    target exactly once. The last row of the last batch is filled up with inputs 0 and targets -100.

    A window begins every `stride` tokens (default: seq_len, so that windows lie side by side). A shorter stride overlaps them, and a target that
    an earlier window had is -100 in the next: each but those of the first window then has at least seq_len - stride + 1 tokens before it, or all
    of its document. Windows are rows in order: the first input of row r of batch i is token (i * batch_size + r) * stride of the split.
    """

    def __init__(self, split: TokenSplit, seq_len: int, batch_size: int = 8, *, document_mask: bool = False, stride: int | None = None):
        _check_sizes(seq_len, batch_size)
        stride = seq_len if stride is None else stride
        if not 1 <= stride <= seq_len:
            raise UserError(f"stride must be within 1 and seq_len ({seq_len}), got {stride}. Half of seq_len is a usual choice.")
        self.split = split
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.document_mask = document_mask
        self.stride = stride
        self.num_windows = 0 if split.num_tokens < 2 else 1 + max(0, -(-(split.num_tokens - 1 - seq_len) // stride))

    def __len__(self) -> int:
        return -(-self.num_windows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            yield self.batch(index)

    @property
    def num_targets(self) -> int:
        """How many tokens are predicted in one pass."""
        if self.split.num_tokens < 2:
            return 0
        return self.split.num_tokens - (self.split.num_documents if self.document_mask else 1)

    def batch(self, index: int) -> Batch:
        """Batch number `index`; the last one may have fewer rows."""
        assert 0 <= index < len(self), index
        rows = range(index * self.batch_size, min((index + 1) * self.batch_size, self.num_windows))
        batch = _gather(self.split, [row * self.stride for row in rows], self.seq_len, self.document_mask, ring=False)
        batch.targets[1 if index == 0 else 0 :, : self.seq_len - self.stride] = IGNORE  # scored by the window before
        return batch


def _gather(split: TokenSplit, starts: list[int], seq_len: int, document_mask: bool, ring: bool) -> Batch:
    """Windows of `seq_len` inputs from each start. Past the end of the stream a ring goes on at its beginning; else rows are filled up."""
    end = split.num_tokens
    tokens = np.zeros((len(starts), seq_len), dtype=np.int64)
    targets = np.full((len(starts), seq_len), IGNORE, dtype=np.int64)
    cuts: list[np.ndarray] = []  # places in the B * T tokens where another document begins
    documents: set[int] = set()
    offsets = split.document_starts
    for row, start in enumerate(starts):
        place = 0
        while place < seq_len and (start < end or ring):
            start = start % end
            count = min(seq_len - place, end - start)
            span = split.read(start, min(count + 1, end - start))
            tokens[row, place : place + count] = span[:count]
            targets[row, place : place + len(span) - 1] = span[1:]
            # documents that begin in (start, start + count]: the token before is the last of another one and has no target
            low = int(np.searchsorted(offsets, start, side="right"))
            high = int(np.searchsorted(offsets, start + count, side="right"))
            first = split.document_at(start)
            last = int(np.searchsorted(offsets, start + count - 1, side="right")) - 1
            documents.update(range(first, last + 1))
            if document_mask:
                begins = np.asarray(offsets[low:high], dtype=np.int64) - start
                targets[row, place + begins - 1] = IGNORE
                cuts.append(row * seq_len + place + begins[begins < count])
                cuts.append(np.array([row * seq_len + place]))
            place += count
            start += count
        if document_mask and place < seq_len:  # the filling is a document of its own
            cuts.append(np.array([row * seq_len + place]))
    cu_seqlens = None
    if document_mask:
        bounds = np.unique(np.concatenate([*cuts, np.array([0, tokens.size])]))
        cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), cu_seqlens, sorted(documents))


def _philox(seed: int, stream: int, number: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([seed, stream, number]))


def _raw_from(seed: int, first: int, count: int) -> list[int]:
    """Numbers `first` to `first + count` of one endless stream of random 64-bit numbers, by moving Philox's counter (4 numbers a count)."""
    block = first // 4
    generator = _philox(seed, _DRAW, 0)
    generator.advance(block)
    skip = first - 4 * block
    return [int(raw) for raw in generator.random_raw(skip + count)[skip:]]


def _check_sizes(seq_len: int, batch_size: int) -> None:
    if seq_len < 1:
        raise UserError(f"seq_len must be at least 1, got {seq_len}. Use a value like 256.")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}. Use a value like 12.")
