"""The text that `cllm evaluate` scores, packed into tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cllm.cli.console import Console

if TYPE_CHECKING:
    from cllm.data import TokenSplit
    from cllm.data.documents.scan import Reading
    from cllm.data.tokens.tokenizer import Tokenizer


def scored_text(console: Console, tokenizer: Tokenizer, data: str, scratch: str, reading: Reading) -> TokenSplit:
    """All of the text or of the conversations, or of packed tokens the validation split where there is one."""
    from cllm.data import Dataset, is_packed
    from cllm.data.pipeline import prepare
    from cllm.data.tokens.chat import is_chat, prepare_chat
    from cllm.data.tokens.dataset import split_words

    if is_packed(data):
        dataset = Dataset.open(data, tokenizer_hash=tokenizer.hash)
        if dataset.val.num_tokens > 1:
            console.print(f"tokens: {split_words(dataset.val)}, the validation part of {data}")
            return dataset.val
        console.print(f"tokens: {split_words(dataset.train)}, all of {data}, which has no validation part")
        return dataset.train
    if not reading.text_field and is_chat(data):
        return prepare_chat(data, scratch, tokenizer, val_fraction=0.0, encoding=reading.encoding, log=console.print).train
    return prepare(data, scratch, tokenizer=tokenizer, val_fraction=0.0, reading=reading, log=console.print).train
