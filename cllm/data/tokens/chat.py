"""Chats for supervised fine-tuning: JSONL with {"messages": [{"role": ..., "content": ...}, ...]} on each line, loss on the answers only.

    OUT/chat/train/  val/          packed tokens as of any text (see shards.py), a conversation a document
             train/answers/        the same number of ones and zeros: whether the assistant wrote the token
             tokenizer.json, tokenizer_config.json (with the chat template), dataset.json (written last)

Conversations are never cut in two: a row of a batch holds as many whole ones as fit; one that is longer than a row loses its end.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from cllm.data.pipeline import _Progress as Steps
from cllm.data.tokens.chat_template import Part, check_messages, encode_conversation, with_template
from cllm.data.tokens.dataset import FORMAT, VERSION, Dataset, read_info
from cllm.data.tokens.loader import IGNORE, Batch, Windows
from cllm.data.tokens.shards import ShardWriter, TokenSplit, folder_written_atomically, write_atomically
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.runtime.errors import DataError

CHAT_VERSION = 1
SPLITS = ("train", "val")
EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


def is_chat(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a JSONL file whose first record holds messages."""
    file = Path(path)
    if file.suffix.lower() not in (".jsonl", ".ndjson") or not file.is_file():
        return False
    with open(file, "rb") as lines:
        for line in lines:
            if line.strip():
                try:
                    record = json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError):
                    return False
                return isinstance(record, dict) and "messages" in record
    return False


class ChatSplit(TokenSplit):
    """Packed conversations, and of each token whether it is part of an answer."""

    def __init__(self, folder: str | os.PathLike[str], tokenizer_hash: str | None = None):
        super().__init__(folder, tokenizer_hash)
        self._answers = TokenSplit(self.folder / "answers")
        if self._answers.num_tokens != self.num_tokens:
            raise DataError(f"{self.folder / 'answers'} does not fit {self.num_tokens:,} tokens. Remove {self.folder.parent} and train again.")

    def conversation(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, answer) of one conversation, both (n,) int64."""
        start, end = int(self._offsets[number]), int(self._offsets[number + 1])
        return self.read(start, end - start), self._answers.read(start, end - start)

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


def prepare_chat(
    path: str | os.PathLike[str], out_dir: str | os.PathLike[str], tokenizer: Tokenizer, val_fraction: float = 0.1,
    log: Callable[[str], None] | None = None,
) -> Dataset:  # fmt: skip
    """The packed conversations of a JSONL file; what `out_dir` already holds of the same is used again. Lines that are no conversation are left out,
    counted and named. Raises DataError when none is left, UserError for a tokenizer without a chat template and without the tokens of ours."""
    tell = log or (lambda line: None)
    tokenizer = with_template(tokenizer)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
    key = hashlib.blake2b(json.dumps([CHAT_VERSION, digest, val_fraction, tokenizer.hash, tokenizer.settings]).encode(), digest_size=16).hexdigest()
    folder, state = Path(out_dir) / "chat", "cached"
    if not _holds(folder, key):
        state = "done"
        _pack(Path(path), folder, key, tokenizer, val_fraction, tell)
    train, val = (ChatSplit(folder / name, tokenizer.hash) for name in SPLITS)
    words = f"train {train.num_documents:,} conversations of {train.num_tokens:,} tokens, val {val.num_documents:,} of {val.num_tokens:,}"
    tell(f"chats: {words} ({state})")
    return Dataset(folder, train, val, tokenizer, read_info(folder), [("chats", state, words)])


def _holds(folder: Path, key: str) -> bool:
    try:
        return read_info(folder)["key"] == key
    except DataError:
        return False


def _pack(path: Path, folder: Path, key: str, tokenizer: Tokenizer, val_fraction: float, tell: Callable[[str], None]) -> None:
    skipped: dict[str, list[int]] = {}
    with folder_written_atomically(folder) as temporary:
        writers: list[ShardWriter] = []
        for name in SPLITS:
            (temporary / name / "answers").mkdir(parents=True)
            writers.append(ShardWriter(temporary / name, tokenizer.vocab_size, tokenizer.hash, tokenizer.eot_id))
            writers.append(ShardWriter(temporary / name / "answers", 2, "answers", None))
        try:
            for line, side, parts in _conversations(path, tokenizer, val_fraction, skipped):
                ids = np.array([i for part in parts for i in part.ids], dtype=np.int64)
                answers = np.array([int(part.is_answer) for part in parts for _ in part.ids], dtype=np.int64)
                num_bytes = int(tokenizer.byte_lengths[ids[answers == 1]].sum())
                for writer, values in zip(writers[2 * side : 2 * side + 2], (ids, answers)):
                    writer.append(values)
                    writer.end_document(f"{path.name}:{line}", num_bytes, num_bytes)
            for writer in writers:
                writer.close()
        except BaseException:
            for writer in writers:
                writer.abandon()
            raise
        for reason, lines in skipped.items():
            shown = ", ".join(map(str, lines[:5])) + (" and more" if len(lines) > 5 else "")
            tell(f"  left out {len(lines):,} lines of {path.name} ({shown}): {reason}")
        if not writers[0].num_documents:
            raise DataError(f"{path} holds no conversation to learn from. Expected lines like {EXAMPLE}")
        info = {
            "format": FORMAT, "version": VERSION, "kind": "chat", "key": key, "tokenizer": tokenizer.hash, "val_fraction": val_fraction,
            "num_documents": writers[0].num_documents + writers[2].num_documents,
            "skipped": {reason: len(lines) for reason, lines in skipped.items()},
        }  # fmt: skip
        tokenizer.save(temporary / "tokenizer.json")
        write_atomically(temporary / "dataset.json", json.dumps(info, indent=1).encode("utf-8"))


def _conversations(path: Path, tokenizer: Tokenizer, val_fraction: float, skipped: dict[str, list[int]]) -> Iterator[tuple[int, int, list[Part]]]:
    """(line, 0 train or 1 validation, parts) of every good line. The side is the hash of the conversation: equal ones never lie on both."""
    size = path.stat().st_size
    with open(path, "rb") as lines, Steps(None) as bar:
        done = 0
        for number, line in enumerate(lines, 1):
            done += len(line)
            bar("Reading chats", done, size)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(record, dict):
                    raise DataError("not an object with messages")
                messages = check_messages(record.get("messages"))
                parts = encode_conversation(tokenizer, messages)
            except (ValueError, RecursionError):
                skipped.setdefault("not JSON in UTF-8", []).append(number)
                continue
            except DataError as error:
                skipped.setdefault(str(error), []).append(number)
                continue
            chosen = hashlib.blake2b(json.dumps([[m["role"], m["content"]] for m in messages]).encode(), digest_size=8).digest()
            yield number, int(int.from_bytes(chosen, "little") < val_fraction * 2**64), parts


class ChatBatches:
    """An endless sequence of training batches of whole conversations: `batch(index)` depends on (data, seed, index) alone.

    Each epoch takes the conversations in a new order and fills row after row; what of a row no conversation fits in is filled with
    tokens without a target, a document of their own.
    """

    def __init__(self, split: ChatSplit, seq_len: int, batch_size: int, seed: int = 0):
        self.split, self.seq_len, self.batch_size, self.seed = split, seq_len, batch_size, seed
        self._lengths = np.minimum(np.diff(split._offsets) - 1, seq_len)  # places that a conversation takes in a row
        self._ends: list[int] = []  # rows up to the end of each epoch
        self._epoch: tuple[int, list[list[int]]] = (-1, [])  # only a cache
        if not (self._lengths > 0).any():
            raise DataError(f"{split!r} holds no conversation of two tokens or more.")

    def batch(self, index: int) -> Batch:
        return self.windows(index * self.batch_size, self.batch_size)

    def windows(self, first: int, count: int) -> Batch:
        """Rows `first` to `first + count` of the endless sequence as one batch, however they are cut into batches otherwise."""
        return gather_rows(self.split, [self._row(row) for row in range(first, first + count)], self.seq_len)

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
    """Every conversation once, in order, for evaluation."""

    def __init__(self, split: ChatSplit, seq_len: int, batch_size: int = 8):
        self.split, self.seq_len, self.batch_size = split, seq_len, batch_size
        lengths = np.minimum(np.diff(split._offsets) - 1, seq_len)
        self._rows = fill_rows(np.arange(len(lengths)), lengths, seq_len)

    def __len__(self) -> int:
        return -(-len(self._rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            yield self.batch(index)

    def batch(self, index: int) -> Batch:
        """Batch number `index`; the last one may have fewer rows."""
        return gather_rows(self.split, self._rows[index * self.batch_size : (index + 1) * self.batch_size], self.seq_len)


def windows_over(split: TokenSplit, seq_len: int, batch_size: int, document_mask: bool) -> Windows | ChatWindows:
    """All of a split in order, for evaluation: windows of text, or whole conversations."""
    given = seq_len, batch_size
    return ChatWindows(split, *given) if isinstance(split, ChatSplit) else Windows(split, *given, document_mask=document_mask)


def fill_rows(order: np.ndarray, lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    """Conversations in this order, in rows of at most seq_len places."""
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
    """Rows of conversations as a batch; a target is there only where the next token is part of an answer."""
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
