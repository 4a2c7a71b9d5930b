"""Chats for supervised fine-tuning: conversations in any of the forms that `documents/chat_forms.py` knows, with loss on the answers only.

    OUT/chat/train/  val/          packed tokens as of any text (see shards.py), a conversation a document
             train/answers/        the same number of ones and zeros: whether the assistant wrote the token
             tokenizer.json, tokenizer_config.json (with the chat template), dataset.json (written last)

`conversations.py` makes batches of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cllm.data.documents.charset import AUTO, Binary
from cllm.data.documents.chat_forms import EXAMPLE, NotAConversation, conversation, mostly_conversations
from cllm.data.documents.decodings import Decodings
from cllm.data.documents.files import Skipped, SourceFile, find
from cllm.data.documents.records import RECORD_EXTENSIONS, Records, decoding_of
from cllm.data.documents.sides import default_val_fraction
from cllm.data.tokens.chat_template import Part, check_messages, encode_conversation, with_template
from cllm.data.tokens.conversations import ChatSplit
from cllm.data.tokens.dataset import FORMAT, VERSION, Dataset, folder_for, is_packed, left_out, read_info, token_words
from cllm.data.tokens.shards import ShardWriter
from cllm.data.tokens.split import TokenSplit
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.files import DATA, new_folder, write_file
from cllm.runtime.errors import DataError
from cllm.runtime.printable import printable
from cllm.runtime.progress import ByteProgress
from cllm.runtime.quantities import counted

CHAT_VERSION = 2
SPLITS = ("train", "val")
OTHER_FORMS = "Also known: ShareGPT, Alpaca, prompt and completion, question and answer, in JSON, CSV or Parquet."
_LOOKED_AT = 200  # files of a folder whose records are looked at to see whether they are chats
_REASONS = 30  # kinds of mistakes that are told apart


def is_chat(path: str | os.PathLike[str]) -> bool:
    """Whether a path holds chats: a file whose first records are conversations more often than texts, or a folder that holds more of such files
    than of all others, by their sizes. Of a large folder some files are looked at."""
    if is_packed(path):
        return False
    try:
        files, _ = find(path)
    except DataError:
        return False
    records = [file for file in files if file.path.suffix.lower() in RECORD_EXTENSIONS]
    some = records[:: max(1, len(records) // _LOOKED_AT)]
    chats = sum(file.size for file in some if _holds_chats(file))
    if not chats:
        return False
    share = chats / sum(file.size for file in some)
    return share * sum(file.size for file in records) > sum(file.size for file in files) / 2


def _holds_chats(file: SourceFile) -> bool:
    try:
        records = Records.of_head(file.path)
    except OSError:
        return False
    return not isinstance(records, Binary) and mostly_conversations(records.sample())


def prepare_chat(
    path: str | os.PathLike[str], out_dir: str | os.PathLike[str], tokenizer: Tokenizer, val_fraction: float | None = None,
    log: Callable[[str], None] | None = None, keep_others: bool = False, exclude: Iterable[str | os.PathLike[str]] = (), encoding: str = AUTO,
) -> Dataset:  # fmt: skip
    """The packed conversations of a file or folder; what `out_dir` already holds of the same is used again.

    What is no conversation is left out and counted by reason, and both that and the forms of the others are told to `log`, from the cache as well.
    keep_others: never replaces conversations of another file or split. exclude: places below `path` that are not data; out_dir never is.
    encoding: the charset of files that are not Unicode; auto tells it by their letters. Raises DataError when no conversation is left, UserError
    for a tokenizer without a chat template and without the tokens of ours.
    """
    tell = log or (lambda line: None)
    tokenizer = with_template(tokenizer)
    exclude = [out_dir, *exclude]
    if val_fraction is None:
        val_fraction = default_val_fraction(sum(file.size for file in find(path, exclude)[0]))
    key = chat_key(path, tokenizer, val_fraction, exclude, encoding)
    folder, state = folder_for(Path(out_dir), "chat", key, keep_others), "cached"
    if not _holds(folder, key):
        state = "done"
        _pack(Path(path), folder, key, tokenizer, val_fraction, exclude, encoding)
    info = read_info(folder)
    train, val = (ChatSplit(folder / name, tokenizer.hash) for name in SPLITS)
    words = token_words(train, val)
    tell(f"tokens: {words} ({state})")
    for form, count in list(info["forms"].items())[:8]:
        tell(f"  {counted(count, 'conversation')} from {form}")
    for line in Decodings.from_dict(info["decodings"]).lines() if "decodings" in info else ():
        tell(f"  {line}")
    for line in left_out(info):
        tell(f"  {line}")
    return Dataset(folder, train, val, tokenizer, info, [("chats", state, words)])


def chat_key(
    path: str | os.PathLike[str], tokenizer: Tokenizer, val_fraction: float, exclude: Iterable[str | os.PathLike[str]] = (), encoding: str = AUTO
) -> str:
    """A digest of everything that the packed conversations of a file or folder depend on; `tokenizer` has its chat template."""
    contents = []
    for file in find(path, exclude)[0]:
        with open(file.path, "rb") as raw:
            contents.append([file.name if Path(path).is_dir() else "", hashlib.file_digest(raw, "blake2b").hexdigest()])
    parts = [CHAT_VERSION, contents, val_fraction, tokenizer.hash, tokenizer.settings, *([encoding] if encoding != AUTO else [])]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def check_fit(splits: Sequence[TokenSplit], seq_len: int, context: int, tell: Callable[[str], None]) -> None:
    """Tells which conversations do not fit in `seq_len` tokens; nothing of data that is no chats.

    splits: the one for training and the one for validation, or the one that is evaluated. context: the most that the model can see.
    Raises DataError where the first of them has nothing to predict.
    """
    chats = [split for split in splits if isinstance(split, ChatSplit)]
    if not chats:
        return
    fits = [split.fit(seq_len) for split in chats]
    advice = _advice(max(fit.longest for fit in fits), seq_len, context)
    if not fits[0].usable:
        count = fits[0].conversations
        which, purpose = ("for training ", "learnt") if len(fits) > 1 else ("", "evaluated")
        subject = f"the only conversation {which}has no" if count == 1 else f"none of the {count:,} conversations {which}has a"
        raise DataError(f"{subject} part of an answer within its first {seq_len} tokens, so that nothing can be {purpose}. {advice}")
    total, cut, useless = (sum(each) for each in zip(*((fit.conversations, fit.cut, fit.left_out) for fit in fits)))
    if cut:
        tell(f"{cut:,} of {counted(total, 'conversation')} {'is' if cut == 1 else 'are'} cut at {seq_len} tokens. {advice}")
    if useless:
        verb = "is" if useless == 1 else "are"
        tell(
            f"{useless:,} of {counted(total, 'conversation')} {verb} left out, because no part of an answer lies within the first {seq_len} tokens."
            + ("" if cut else f" {advice}")
        )
    if len(fits) > 1 and fits[1].conversations and not fits[1].usable:
        tell("none of the conversations for validation is left, so that nothing is validated.")


def _advice(longest: int, seq_len: int, context: int) -> str:
    """How to make the longest conversation fit."""
    wanted = 1 << max(0, longest - 1).bit_length()
    if wanted <= context:
        return f"Use --seq-len {wanted}."
    limit = f"The longest has {longest + 1:,} tokens and the model's context {context:,}"
    if seq_len < context:
        return f"{limit}: use --seq-len {context}, or a model with a longer context."
    return f"{limit}: use a model with a longer context, or shorter conversations."


def _holds(folder: Path, key: str) -> bool:
    try:
        return read_info(folder)["key"] == key
    except DataError:
        return False


def _pack(
    path: Path, folder: Path, key: str, tokenizer: Tokenizer, val_fraction: float, exclude: Iterable[str | os.PathLike[str]], encoding: str
) -> None:
    files, skipped = find(path, exclude)
    decodings = Decodings()
    forms: dict[str, int] = {}
    with new_folder(folder, DATA) as temporary:
        writers: list[ShardWriter] = []
        for name in SPLITS:
            (temporary / name / "answers").mkdir(parents=True)
            writers.append(ShardWriter(temporary / name, tokenizer.vocab_size, tokenizer.hash, tokenizer.eot_id))
            writers.append(ShardWriter(temporary / name / "answers", 2, "answers", None))
        try:
            for each in _conversations(files, tokenizer, val_fraction, encoding, skipped, decodings):
                forms[each.form] = forms.get(each.form, 0) + 1
                ids = np.array([i for part in each.parts for i in part.ids], dtype=np.int64)
                answers = np.array([int(part.is_answer) for part in each.parts for _ in part.ids], dtype=np.int64)
                num_bytes = int(tokenizer.byte_lengths[ids[answers == 1]].sum())
                for writer, values in zip(writers[2 * each.side : 2 * each.side + 2], (ids, answers)):
                    writer.append(values)
                    writer.end_document(each.name, num_bytes, num_bytes)
            for writer in writers:
                writer.close()
        except BaseException:
            for writer in writers:
                writer.abandon()
            raise
        if not writers[0].num_documents:
            raise DataError(_nothing(path, writers[2].num_documents, skipped))
        info = {
            "format": FORMAT, "version": VERSION, "kind": "chat", "key": key, "tokenizer": tokenizer.hash, "val_fraction": val_fraction,
            "num_files": len(files), "num_documents": writers[0].num_documents + writers[2].num_documents,
            "forms": dict(sorted(forms.items(), key=lambda item: (-item[1], item[0]))), "skipped": skipped.to_dict(),
            "decodings": decodings.to_dict(), "encoding": encoding,
        }  # fmt: skip
        tokenizer.save(temporary / "tokenizer.json")
        write_file(temporary / "dataset.json", json.dumps(info, indent=1).encode(), DATA)


def _nothing(path: Path, for_validation: int, skipped: Skipped) -> str:
    if for_validation:
        advice = "Give more, or keep none back, with cllm train --set data.val_fraction=0."
        subject = f"the only conversation of {path} falls" if for_validation == 1 else f"all {for_validation:,} conversations of {path} fall"
        return f"{subject} into the validation split. {advice}"
    found = f" Left out: {'; '.join(skipped.lines()[:5])}." if skipped.total else ""
    return f"{path} holds no conversation to learn from.{found} Expected records like {EXAMPLE}. {OTHER_FORMS}"


class _Encoded(NamedTuple):
    """A conversation in tokens: the name of its document, 0 for training or 1 for validation, and the form that it was written in."""

    name: str
    side: int
    form: str
    parts: list[Part]


def _conversations(
    files: list[SourceFile], tokenizer: Tokenizer, val_fraction: float, encoding: str, skipped: Skipped, decodings: Decodings
) -> Iterator[_Encoded]:
    """Every conversation that can be learnt. The side is the hash of what is said in it: equal ones never lie on both."""
    with ByteProgress() as bar:
        report = bar.step("Reading chats", sum(file.size for file in files))
        for file in files:
            for place, record in _records(file, encoding, skipped, decodings, report):
                name = f"{printable(file.name)}:{place}"
                try:
                    form, messages = conversation(record)
                    answered = _up_to_last_answer(messages)
                    parts = encode_conversation(tokenizer, check_messages(answered))
                except (NotAConversation, DataError) as error:
                    reason = f"record ({error})"
                    skipped.add(reason if reason in skipped.counts or len(skipped.counts) < _REASONS else "record (for other reasons)", name)
                    continue
                if len(answered) < len(messages):
                    skipped.add("question without an answer at the end of a conversation", name)
                chosen = hashlib.blake2b(json.dumps([[m["role"], m["content"]] for m in answered]).encode(), digest_size=8).digest()
                yield _Encoded(name, int(int.from_bytes(chosen, "little") < val_fraction * 2**64), form, parts)


def _up_to_last_answer(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages without those at the end that nobody answers; all of them where there is no answer at all."""
    last = next((number for number in reversed(range(len(messages))) if messages[number]["role"] == "assistant"), len(messages) - 1)
    return messages[: last + 1]


def _records(file: SourceFile, encoding: str, skipped: Skipped, decodings: Decodings, report: Callable[[int], None]) -> Iterator[tuple[str, object]]:
    """(place, record) of a file; of one that can hold none, the reason is counted."""
    try:
        if file.path.suffix.lower() not in RECORD_EXTENSIONS:
            skipped.add("file without records (no JSON, CSV or Parquet)", file.name)
            return
        charset = decoding_of(file.path, encoding)
        if isinstance(charset, Binary):
            skipped.add(charset.reason, file.name)
            return
        decodings.add(file.name, file.path, charset)
        records = Records(file.path, charset)
        yield from records.read(lambda reason, place: skipped.add(reason, f"{file.name}:{place}"), report)
    except OSError as error:
        skipped.add(f"unreadable ({(error.strerror or str(error)).lower()})", file.name)
