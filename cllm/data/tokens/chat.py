"""Chats for supervised fine-tuning: JSONL with {"messages": [{"role": ..., "content": ...}, ...]} on each line, loss on the answers only.

    OUT/chat/train/  val/          packed tokens as of any text (see shards.py), a conversation a document
             train/answers/        the same number of ones and zeros: whether the assistant wrote the token
             tokenizer.json, tokenizer_config.json (with the chat template), dataset.json (written last)

`conversations.py` makes batches of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from cllm.data.documents.corpus import default_val_fraction
from cllm.data.tokens.chat_template import Part, check_messages, encode_conversation, with_template
from cllm.data.tokens.conversations import ChatSplit
from cllm.data.tokens.dataset import FORMAT, VERSION, Dataset, folder_for, read_info
from cllm.data.tokens.shards import ShardWriter
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.files import DATA, new_folder, write_file
from cllm.runtime.errors import DataError
from cllm.runtime.progress import ByteProgress

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


def prepare_chat(
    path: str | os.PathLike[str], out_dir: str | os.PathLike[str], tokenizer: Tokenizer, val_fraction: float | None = None,
    log: Callable[[str], None] | None = None, keep_others: bool = False,
) -> Dataset:  # fmt: skip
    """The packed conversations of a JSONL file; what `out_dir` already holds of the same is used again.

    Lines that are no conversation are left out, counted and named. keep_others: never replaces conversations of another file or split. Raises
    DataError when no conversation is left, UserError for a tokenizer without a chat template and without the tokens of ours.
    """
    tell = log or (lambda line: None)
    tokenizer = with_template(tokenizer)
    if val_fraction is None:
        val_fraction = default_val_fraction(os.path.getsize(path))
    key = chat_key(path, tokenizer, val_fraction)
    folder, state = folder_for(Path(out_dir), "chat", key, keep_others), "cached"
    if not _holds(folder, key):
        state = "done"
        _pack(Path(path), folder, key, tokenizer, val_fraction, tell)
    train, val = (ChatSplit(folder / name, tokenizer.hash) for name in SPLITS)
    words = f"train {train.num_documents:,} conversations of {train.num_tokens:,} tokens, val {val.num_documents:,} of {val.num_tokens:,}"
    tell(f"chats: {words} ({state})")
    return Dataset(folder, train, val, tokenizer, read_info(folder), [("chats", state, words)])


def chat_key(path: str | os.PathLike[str], tokenizer: Tokenizer, val_fraction: float) -> str:
    """A digest of everything that the packed conversations of a file depend on; `tokenizer` has its chat template."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
    parts = [CHAT_VERSION, digest, val_fraction, tokenizer.hash, tokenizer.settings]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _holds(folder: Path, key: str) -> bool:
    try:
        return read_info(folder)["key"] == key
    except DataError:
        return False


def _pack(path: Path, folder: Path, key: str, tokenizer: Tokenizer, val_fraction: float, tell: Callable[[str], None]) -> None:
    skipped: dict[str, list[int]] = {}
    with new_folder(folder, DATA) as temporary:
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
        write_file(temporary / "dataset.json", json.dumps(info, indent=1).encode("utf-8"), DATA)


def _conversations(path: Path, tokenizer: Tokenizer, val_fraction: float, skipped: dict[str, list[int]]) -> Iterator[tuple[int, int, list[Part]]]:
    """(line, 0 train or 1 validation, parts) of every good line. The side is the hash of the conversation: equal ones never lie on both."""
    size = path.stat().st_size
    with open(path, "rb") as lines, ByteProgress() as bar:
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
