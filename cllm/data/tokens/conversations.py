"""Packed conversations, as supervised fine-tuning reads them: rows of whole conversations, in which only the answers are predicted.

Conversations are never cut in two: a row holds as many whole ones as fit, and one that is longer than a row loses its end. Where no part of an
answer is left then, the conversation would teach nothing, and takes no place in a row. `chat.py` packs them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from cllm.data.tokens.batch import IGNORE, Batch, EvaluationBatches, TrainingBatches, spread
from cllm.data.tokens.shards import PackedTokens
from cllm.data.tokens.split import TokenSplit
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.runtime.errors import DataError, UserError

NO_FIM = "fim_rate is for text: a middle is cut out of a document, and this data holds chats. Leave it out."


class Fit(NamedTuple):
    """How the conversations of a split fit in rows of some length."""

    conversations: int
    cut: int  # that lose their end
    left_out: int  # that hold no part of an answer in the length of a row
    longest: int  # length of a row that holds any of them whole

    @property
    def usable(self) -> int:
        return self.conversations - self.left_out


class ChatSplit(TokenSplit):
    """Packed conversations, and of each token whether it is part of an answer."""

    document_noun = "conversation"
    counts_all_bytes = False  # of answers alone

    def __init__(self, folder: str | os.PathLike[str], tokenizer_hash: str | None = None):
        super().__init__(folder, tokenizer_hash)
        self._answers = PackedTokens(self.folder / "answers")
        if self._answers.num_tokens != self.num_tokens:
            raise DataError(f"{self.folder / 'answers'} does not fit {self.num_tokens:,} tokens. Remove {self.folder.parent} and train again.")

    def conversation(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, answer) of one conversation, both (n,) int64."""
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        return self.read(start, end - start), self._answers.read(start, end - start)

    @cached_property
    def first_answers(self) -> np.ndarray:
        """(num_documents,) int64: the place of the first token in each conversation that is to be predicted; its length where there is none."""
        found = np.array(self.document_lengths, dtype=np.int64)
        starts = np.asarray(self.document_starts, dtype=np.int64)
        first = 0
        while first < len(starts):
            last = max(first + 1, int(np.searchsorted(starts, starts[first] + (1 << 22), side="right")) - 1)  # a few million tokens at a time
            begin, end = int(starts[first]), int(starts[last - 1] + found[last - 1])
            answers = begin + np.flatnonzero(self._answers.read(begin, end - begin) == 1)
            next_answer = np.searchsorted(answers, starts[first:last] + 1)  # nothing comes before the first token of a conversation
            places = np.append(answers, end)[next_answer] - starts[first:last]
            found[first:last] = np.minimum(found[first:last], places)
            first = last
        return found

    def row_lengths(self, seq_len: int) -> np.ndarray:
        """(num_documents,) int64: the inputs of each conversation in rows of `seq_len` tokens, 0 where none of its answers begins there.

        The last token of a conversation is only a target.
        """
        lengths = self.document_lengths - 1
        return np.where(self.first_answers <= np.minimum(lengths, seq_len), np.minimum(lengths, seq_len), 0)

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int64: the bytes of text that each token stands for, 0 for special tokens."""
        return Tokenizer.load(self.folder.parent / "tokenizer.json").byte_lengths

    def fit(self, seq_len: int) -> Fit:
        """How many conversations are cut or left out in rows of `seq_len` tokens."""
        lengths, used = self.document_lengths - 1, self.row_lengths(seq_len)
        cut = int(((used > 0) & (lengths > seq_len)).sum())
        return Fit(len(lengths), cut, int((used == 0).sum()), int(lengths.max(initial=0)))

    def has_targets(self, seq_len: int) -> bool:
        return bool((self.row_lengths(seq_len) > 0).any())

    def token_counts(self) -> np.ndarray:
        """(vocab_size,) int64: how often each token occurs in answers, which alone are predicted."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start in range(0, self.num_tokens, 1 << 20):
            count = min(1 << 20, self.num_tokens - start)
            ids = self.read(start, count)[self._answers.read(start, count) == 1]
            counts += np.bincount(ids, minlength=self.vocab_size)
        return counts

    def verify(self) -> None:
        super().verify()
        self._answers.verify()

    def batches(
        self, seq_len: int, batch_size: int, seed: int = 0, *, shuffle: str | bool = "epoch", document_mask: bool = False, fim_rate: float = 0.0
    ) -> TrainingBatches:  # fmt: skip
        """Rows of whole conversations, in a new order in each epoch. Attention never crosses from one to the next, so that `shuffle` and
        `document_mask` change nothing here. Raises DataError where no part of an answer lies within `seq_len` tokens, UserError for a `fim_rate`."""
        if fim_rate:
            raise UserError(NO_FIM)
        return ChatBatches(self, seq_len, batch_size, seed)

    def windows(self, seq_len: int, batch_size: int = 8, *, document_mask: bool = False) -> EvaluationBatches:
        """Every conversation that has a target once, in order.

        `document_mask` changes nothing: attention never crosses from one conversation to the next.
        """
        return ChatWindows(self, seq_len, batch_size)


class ChatBatches:
    """An endless sequence of training batches of whole conversations. `batch(index)` is a function of the data, the seed and the index alone.

    Each epoch takes the conversations in a new random order and fills row after row. The end of a row in which the next conversation does not
    fit is padded with token 0 without a target, as a document of its own. Raises DataError when no conversation has a target.
    """

    def __init__(self, split: ChatSplit, seq_len: int, batch_size: int, seed: int = 0):
        self.split, self.seq_len, self.batch_size, self.seed = split, seq_len, batch_size, seed
        self._lengths = split.row_lengths(seq_len)
        self._ends: list[int] = []  # the number of rows up to the end of each epoch so far
        self._epoch: tuple[int, list[list[int]]] = (-1, [])  # number and rows of the epoch used last: a cache
        if not (self._lengths > 0).any():
            raise DataError(f"none of the {split.num_documents:,} conversations in {split.folder} has a part of an answer within {seq_len} tokens.")

    def batch(self, index: int) -> Batch:
        """Batch number `index`, counted from 0: batch_size rows of seq_len tokens."""
        return self.rows(index * self.batch_size, self.batch_size)

    def rows(self, first: int, count: int) -> Batch:
        """Rows `first` to `first + count` of the endless sequence as one batch, wherever the batches of `batch` begin and end."""
        rows = [self._row(row) for row in range(first, first + count)]
        return gather_rows(self.split, rows, self.seq_len)._replace(first_row=first)

    def _row(self, number: int) -> list[int]:
        while not self._ends or self._ends[-1] <= number:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._rows_of(len(self._ends))))
        epoch = int(np.searchsorted(self._ends, number, side="right"))
        return self._rows_of(epoch)[number - (self._ends[epoch - 1] if epoch else 0)]

    def _rows_of(self, epoch: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            raw = np.random.Philox(np.random.SeedSequence([self.seed, 2, epoch])).random_raw(len(self._lengths))
            self._epoch = epoch, fill_rows(np.argsort(raw, kind="stable"), self._lengths, self.seq_len)
        return self._epoch[1]


class ChatWindows:
    """Every conversation that has a target once, in order, for evaluation; as many whole ones in each row of seq_len tokens as fit."""

    def __init__(self, split: ChatSplit, seq_len: int, batch_size: int = 8):
        self.split, self.seq_len, self.batch_size = split, seq_len, batch_size
        self._rows = fill_rows(np.arange(split.num_documents), split.row_lengths(seq_len), seq_len)

    def part(self, num_rows: int) -> ChatWindows:
        """At most `num_rows` of these rows, spread evenly over the split."""
        part = ChatWindows(self.split, self.seq_len, self.batch_size)
        part._rows = spread(self._rows, num_rows)
        return part

    @property
    def num_rows(self) -> int:
        """Rows in all batches together."""
        return len(self._rows)

    @cached_property
    def num_targets(self) -> int:
        """How many tokens are predicted in one pass: those of answers, as far as conversations fit in a row."""
        return sum(map(len, self._targets()))

    @cached_property
    def num_bytes(self) -> float:
        """The bytes of these tokens; what a conversation loses because it is longer than a row does not count."""
        return float(sum(int(self.split.byte_lengths[targets].sum()) for targets in self._targets()))

    def _targets(self) -> Iterator[np.ndarray]:
        """The tokens that are predicted of each conversation."""
        for number in (number for row in self._rows for number in row):
            ids, answers = (each[1 : self.seq_len + 1] for each in self.split.conversation(number))
            yield ids[answers == 1]

    def __len__(self) -> int:
        return -(-len(self._rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            yield self.batch(index)

    def batch(self, index: int) -> Batch:
        """Batch number `index`; the last one may have fewer rows."""
        return gather_rows(self.split, self._rows[index * self.batch_size : (index + 1) * self.batch_size], self.seq_len)


def fill_rows(order: np.ndarray, lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    """The numbers of the conversations in each row: taken in `order`, as many as fit in seq_len places; `lengths` (n,) are those of all."""
    rows: list[list[int]] = []
    room = 0
    for number in order.tolist():
        length = int(lengths[number])
        if length < 1:
            continue
        if length > room:
            rows.append([])
            room = seq_len
        rows[-1].append(number)
        room -= length
    return rows


def gather_rows(split: ChatSplit, rows: list[list[int]], seq_len: int) -> Batch:
    """Rows of conversations, given by their numbers, as one batch. Only tokens of answers are targets."""
    tokens = np.zeros((len(rows), seq_len), dtype=np.int64)
    targets = np.full((len(rows), seq_len), IGNORE, dtype=np.int64)
    bounds = {0, tokens.size}
    for row, numbers in enumerate(rows):
        place = 0
        for number in numbers:
            ids, answers = (each[: seq_len + 1] for each in split.conversation(number))
            end = place + len(ids) - 1
            tokens[row, place:end] = ids[:-1]
            targets[row, place:end] = np.where(answers[1:] == 1, ids[1:], IGNORE)
            bounds.add(row * seq_len + place)
            place = end
        bounds.add(row * seq_len + place)
    documents = sorted({number for numbers in rows for number in numbers})
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.tensor(sorted(bounds), dtype=torch.int32), documents)
