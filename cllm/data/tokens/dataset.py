"""A packed data set on disk: two splits of tokens, the tokenizer they were made with, and where they came from.

    FOLDER/tokens/train/   tokens/val/   tokens/tokenizer.json   tokens/dataset.json (written last)

`tokens` alone can be moved anywhere; `Dataset.open` takes it or the folder that holds it. In the folder of a run it is called tokens-DIGEST.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cllm.data.documents.files import Skipped
from cllm.data.tokens.split import TokenSplit
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.runtime.errors import DataError
from cllm.runtime.quantities import counted
from cllm.shell import command

FORMAT = "cllm-dataset"
VERSION = 1


@dataclass(frozen=True)
class Dataset:
    """What training reads. `info` says how it was made; `steps` what `prepare` did for it: (step, "done" or "cached", in words)."""

    folder: Path
    train: TokenSplit
    val: TokenSplit
    tokenizer: Tokenizer
    info: dict[str, Any]
    steps: list[tuple[str, str, str]] = field(default_factory=list)

    @classmethod
    def open(cls, path: str | os.PathLike[str], tokenizer_hash: str | None = None) -> "Dataset":
        """The data set at `path`; DataError when it is missing, damaged, or packed with another tokenizer than `tokenizer_hash`."""
        folder = _folder(Path(path))
        if folder is None:
            raise DataError(
                f"{path} holds no packed tokens (no dataset.json). Make some with: {command('pack', 'DATA', '--tokenizer', 'T', '--out', Path(path))}"
            )
        info = read_info(folder)
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        if tokenizer.hash != info["tokenizer"]:
            raise DataError(f"{folder / 'tokenizer.json'} is not the tokenizer of these tokens. Pack the data again (`cllm pack`).")
        wanted = tokenizer.hash if tokenizer_hash is None else tokenizer_hash
        kind = TokenSplit
        if info.get("kind") == "chat":  # only the answers are predicted
            from cllm.data.tokens.conversations import ChatSplit

            kind = ChatSplit
        return cls(folder, kind(folder / "train", wanted), kind(folder / "val", wanted), tokenizer, info)

    def verify(self) -> None:
        """Compare every byte of both splits with the checksums; DataError names the damaged file."""
        self.train.verify()
        self.val.verify()

    def unigram_nats(self) -> float:
        """The baseline of the validation split: nats per token when only the token frequencies of the training split are known."""
        return self.val.unigram_nats(self.train) if self.val.num_tokens else self.train.unigram_nats()


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether there is a packed data set at this path."""
    return _folder(Path(path)) is not None


def read_info(folder: Path) -> dict[str, Any]:
    """The content of dataset.json; DataError when it is damaged, foreign or newer than this program."""
    path = folder / "dataset.json"
    try:
        info = json.loads(path.read_text("utf-8"))
        if not isinstance(info, dict) or info.get("format") != FORMAT:
            raise ValueError(f'format must be "{FORMAT}"')
        if not isinstance(info.get("version"), int) or info["version"] > VERSION:
            raise ValueError(f"version {info.get('version')} is not one that this program reads (up to {VERSION})")
        if not isinstance(info.get("tokenizer"), str) or not isinstance(info.get("key"), str):
            raise ValueError("the tokenizer hash or the key is missing")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a data set: {error}. Pack the data again (`cllm pack`).") from None
    return info


def folder_for(out: Path, name: str, key: str, keep_others: bool) -> Path:
    """Where in `out` the packed tokens with this key are or belong: the folder `name`, or with `keep_others` one that no other key shares.

    Runs of older versions have the folder without a key; where it holds these very tokens it is used on.
    """
    if not keep_others:
        return out / name
    try:
        if read_info(out / name)["key"] == key:
            return out / name
    except DataError:
        pass  # there is none, or a damaged one: it is left alone
    return out / f"{name}-{key[:16]}"


def token_words(train: TokenSplit, val: TokenSplit) -> str:
    """How much a data set holds, for people; without a word about validation where nothing is kept for it."""
    if not val.num_tokens:
        return f"{split_words(train)}{_bytes_a_token(train)}"
    return f"train {split_words(train)}, val {split_words(val)}{_bytes_a_token(train, val)}"


def _bytes_a_token(*splits: TokenSplit) -> str:
    if not all(split.counts_all_bytes and split.num_tokens for split in splits):
        return ""
    return f", {sum(split.num_bytes for split in splits) / sum(split.num_tokens for split in splits):.2f} bytes a token"


def split_words(split: TokenSplit) -> str:
    """How much a split holds, for people."""
    return f"{split.num_tokens:,} in {counted(split.num_documents, split.document_noun)}"


def left_out(info: dict[str, Any]) -> list[str]:
    """What was left out when a data set was packed, for people; nothing where dataset.json does not say."""
    try:
        return Skipped.from_dict(info["skipped"]).report()
    except (KeyError, TypeError, AttributeError, ValueError):
        return []


def left_out_briefly(info: dict[str, Any]) -> str:
    """The same on one line."""
    try:
        return Skipped.from_dict(info["skipped"]).brief()
    except (KeyError, TypeError, AttributeError, ValueError):
        return ""


def _folder(path: Path) -> Path | None:
    return next((folder for folder in (path, path / "tokens") if (folder / "dataset.json").is_file()), None)
