"""The whole of a split once, in order, for evaluation; and how places in a stream of tokens become a batch.

A window is T inputs and, one token further, T targets. With the document mask, rows are cut into documents (`cu_seqlens`), and the first token of
a document is nobody's target.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from cllm.data.tokens.batch import IGNORE, Batch, spread
from cllm.data.tokens.shards import PackedTokens
from cllm.runtime.errors import UserError

# (row, place in the row, tokens, places above 0 at which another document begins) -> as many tokens
Rearrange = Callable[[int, int, np.ndarray, np.ndarray], np.ndarray]


class Windows:
    """A whole split once, in order, for evaluation. Every token is a target exactly once, except the first token of the split, or with the document
    mask the first token of each document. The end of the last row is padded with inputs 0 and targets -100.

    seq_len: T, the tokens of a row. batch_size: B, the rows of a batch. document_mask: whether attention stops at the boundaries of documents.
    stride: a window begins every `stride` tokens, 1 to seq_len; by default seq_len, so that windows lie side by side. Where windows overlap, a
        target that an earlier window had is -100: every target outside of the first window then has at least seq_len - stride + 1 tokens before
        it, or its whole document.

    The first input of row r of batch i is token (i * batch_size + r) * stride of the split, except in a `part`.
    Raises UserError for sizes out of range.
    """

    def __init__(self, split: PackedTokens, seq_len: int, batch_size: int = 8, *, document_mask: bool = False, stride: int | None = None):
        check_sizes(seq_len, batch_size)
        stride = seq_len if stride is None else stride
        if not 1 <= stride <= seq_len:
            raise UserError(f"stride must be within 1 and seq_len ({seq_len}), got {stride}. Half of seq_len is a usual choice.")
        self.split = split
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.document_mask = document_mask
        self.stride = stride
        self.num_windows = 0 if split.num_tokens < 2 else 1 + max(0, -(-(split.num_tokens - 1 - seq_len) // stride))
        self._windows: Sequence[int] = range(self.num_windows)  # the number of each row's window

    def part(self, num_rows: int) -> Windows:
        """At most `num_rows` of these windows, spread evenly over the split."""
        part = copy.copy(self)
        part._windows = spread(self._windows, num_rows)
        return part

    @property
    def num_rows(self) -> int:
        """Windows in all batches together."""
        return len(self._windows)

    def __len__(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            yield self.batch(index)

    @property
    def num_targets(self) -> int:
        """How many targets all batches have together."""
        if self.num_rows < self.num_windows:
            return sum(batch.num_targets for batch in self)
        if self.split.num_tokens < 2:
            return 0
        return self.split.num_tokens - (self.split.num_documents if self.document_mask else 1)

    @property
    def num_bytes(self) -> float:
        """Bytes of text: of the whole split all of them, of a `part` the share of its targets."""
        if self.num_rows == self.num_windows:
            return float(self.split.num_bytes)
        whole = Windows(self.split, self.seq_len, self.batch_size, document_mask=self.document_mask, stride=self.stride)
        return self.split.num_bytes * (self.num_targets / whole.num_targets)

    def batch(self, index: int) -> Batch:
        """Batch number `index`; the last one may have fewer rows."""
        assert 0 <= index < len(self), index
        windows = self._windows[index * self.batch_size : (index + 1) * self.batch_size]
        batch = gather(self.split, [window * self.stride for window in windows], self.seq_len, self.document_mask, ring=False)
        batch.targets[1 if windows[0] == 0 else 0 :, : self.seq_len - self.stride] = IGNORE  # targets of the window before
        return batch


def gather(
    split: PackedTokens, starts: list[int], seq_len: int, document_mask: bool, ring: bool, rearrange: Rearrange | None = None
) -> Batch:  # fmt: skip
    """A batch of windows of `seq_len` inputs, which begin at the tokens `starts`. A window that reaches the end of the split continues at its
    beginning, if `ring`; otherwise it is padded. rearrange: what is made of each stretch of inputs and its last target."""
    end = split.num_tokens
    tokens = np.zeros((len(starts), seq_len), dtype=np.int64)
    targets = np.full((len(starts), seq_len), IGNORE, dtype=np.int64)
    cuts: list[np.ndarray] = []  # places in the B * T tokens where a document begins
    documents: set[int] = set()
    offsets = split.document_starts
    for row, start in enumerate(starts):
        place = 0
        while place < seq_len and (start < end or ring):
            start = start % end
            count = min(seq_len - place, end - start)
            span = split.read(start, min(count + 1, end - start))
            # The documents that begin in (start, start + count]: the token before each is the last of another document, and its target is dropped.
            low = int(np.searchsorted(offsets, start, side="right"))
            high = int(np.searchsorted(offsets, start + count, side="right"))
            begins = np.asarray(offsets[low:high], dtype=np.int64) - start
            if rearrange is not None:
                span = rearrange(row, place, span, begins[begins < len(span)])
            tokens[row, place : place + count] = span[:count]
            targets[row, place : place + len(span) - 1] = span[1:]
            first = split.document_at(start)
            last = int(np.searchsorted(offsets, start + count - 1, side="right")) - 1
            documents.update(range(first, last + 1))
            if document_mask:
                targets[row, place + begins - 1] = IGNORE
                cuts.append(row * seq_len + place + begins[begins < count])
                cuts.append(np.array([row * seq_len + place]))
            place += count
            start += count
        if document_mask and place < seq_len:  # the padding is a document of its own
            cuts.append(np.array([row * seq_len + place]))
    cu_seqlens = None
    if document_mask:
        bounds = np.unique(np.concatenate([*cuts, np.array([0, tokens.size])]))
        cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), cu_seqlens, sorted(documents))


def check_sizes(seq_len: int, batch_size: int) -> None:
    if seq_len < 1:
        raise UserError(f"seq_len must be at least 1, got {seq_len}. Use a value like 256.")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}. Use a value like 12.")
