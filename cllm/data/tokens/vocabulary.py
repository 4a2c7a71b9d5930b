"""The vocabulary inside a tokenizer: how it is learned from text, and the bytes that its entries stand for.

What is learned is given as the content of a Hugging Face tokenizer.json.
"""

import functools
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cllm.runtime.errors import DataError, UserError

END_OF_TEXT = "<|endoftext|>"
NAMED_SPECIALS = (END_OF_TEXT, "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
# The tokens around a middle that is filled in, as our tokenizers and Qwen's call them, and as StarCoder's.
FIM_NAMES = (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))
FIM_SETTINGS = ("fim_prefix_token", "fim_suffix_token", "fim_middle_token")  # under which tokenizer_config.json names them
BPE_SPECIALS = (*NAMED_SPECIALS, *(f"<|reserved_{i}|>" for i in range(len(NAMED_SPECIALS), 16)))
VOCAB_MULTIPLE = 64  # the output layer's rows come in whole tiles

# Verbatim from Llama 3 (known to llama.cpp as "llama-bpe"); the one of GPT-2 is built into the ByteLevel pre-tokenizer.
LLAMA_BPE_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = ("gpt-2", "llama-bpe")
CHARACTER_PATTERN = r"[\s\S]"

# A merge walks through every distinct word that holds its pair, so one word of 30,000 letters (a page of Chinese without punctuation) costs as
# much in each merge as thousands of ordinary ones. Runs of one kind of character beyond _LONG_RUN, which no ordinary text has, are therefore learned
# from in parts; one pair in _RUN_PART goes uncounted. Encoding is not touched: its pattern must stay one that llama.cpp knows.
_LONG_RUN, _RUN_PART = 256, 128
_LONG_RUNS = re.compile(rf"\w{{{_LONG_RUN + 1},}}|\s{{{_LONG_RUN + 1},}}|[^\w\s]{{{_LONG_RUN + 1},}}")


class FimTokens(NamedTuple):
    """The ids of the tokens that stand before the prefix, before the suffix and before the middle of a text whose middle is filled in."""

    prefix: int
    suffix: int
    middle: int


def default_vocab_size(num_bytes: int) -> int:
    """A vocabulary that fits the amount of text: about 1.3 x sqrt(bytes), as a power of two from 512 to 32768 (1 MB 1024, 100 MB 16384)."""
    target = 1.3 * max(num_bytes, 1) ** 0.5
    return int(2 ** min(15, max(9, round(float(np.log2(target))))))


def added_token(token_id: int, content: str) -> dict[str, Any]:
    """A special token as a tokenizer.json lists it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": content, **flags}


def byte_level_steps(pattern: str | None) -> dict[str, Any]:
    """A pre-tokenizer that splits text into words by a pattern (None: GPT-2's) and writes their bytes in GPT-2's printable stand-ins."""
    if pattern is None:
        return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


def learn_characters(stream: Iterator[str], specials: tuple[str, ...]) -> dict[str, Any]:
    """One id for each character of the text, in code point order, then the special tokens. DataError when there is no text."""
    characters: set[str] = set()
    for text in stream:
        characters |= set(text)
    if not characters:
        raise DataError("There is no text to take characters from.")
    tokens = [*sorted(characters), *specials]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(len(characters) + i, name) for i, name in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": CHARACTER_PATTERN}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": "<|unk|>"},
    }


def pattern_of(pre_tokenizer: str) -> str | None:
    """The pattern that splits text into words, None for the one of GPT-2; UserError for an unknown name."""
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise UserError(f'pre_tokenizer must be one of {", ".join(PRE_TOKENIZERS)}, got "{pre_tokenizer}".')
    return LLAMA_BPE_PATTERN if pre_tokenizer == "llama-bpe" else None


def check_vocab_size(vocab_size: int, needed: int) -> None:
    """UserError for a vocabulary without room for the special tokens and the `needed` entries that are always there."""
    if vocab_size < len(BPE_SPECIALS) + needed:
        least, what = round_up(len(BPE_SPECIALS) + needed), "256 bytes" if needed == 256 else "256 bytes in two forms"
        raise UserError(f"vocab_size must be at least {least} for {what} and {len(BPE_SPECIALS)} special tokens, got {vocab_size}.")


def splits_into_words(content: dict[str, Any]) -> bool:
    """Whether the first step of this tokenizer.json splits text by GPT-2's pattern, and leaves every word as it is."""
    step = content.get("pre_tokenizer") or {}
    first = step["pretokenizers"][0] if step.get("type") == "Sequence" and step.get("pretokenizers") else step
    split = first.get("type") == "ByteLevel" and first.get("use_regex", True) and not first.get("add_prefix_space")
    return bool(split) and not content["model"].get("dropout")


def fill_up(content: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer with reserved tokens behind its last one, up to a multiple of 64."""
    model = content["model"]
    size = len(model["vocab"])
    added = [added_token(i, f"<|reserved_{len(BPE_SPECIALS) + i - size}|>") for i in range(size, round_up(size))]
    return content | {"added_tokens": [*content["added_tokens"], *added]}


def learn_bpe(stream: Iterator[str], vocab_size: int, pre_tokenizer: str) -> dict[str, Any]:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019). The vocabulary is rounded up to a multiple of 64.

    Raises UserError for an unknown pre-tokenizer or a vocabulary too small for the bytes.
    """
    pattern_of(pre_tokenizer)
    check_vocab_size(vocab_size, 256)
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    if pre_tokenizer == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    else:
        split = pre_tokenizers.Split(Regex(LLAMA_BPE_PATTERN), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=round_up(vocab_size),
        min_frequency=2,
        special_tokens=list(BPE_SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((part for text in stream for part in without_long_runs(text)), trainer)
    size = backend.get_vocab_size()
    backend.add_special_tokens([f"<|reserved_{i}|>" for i in range(len(BPE_SPECIALS), len(BPE_SPECIALS) + round_up(size) - size)])
    return json.loads(backend.to_str())


def without_long_runs(text: str) -> Iterator[str]:
    """The text in parts, cut inside runs of more than 256 letters and digits, of blanks, or of other characters; most texts come back whole."""
    start = 0
    for run in _LONG_RUNS.finditer(text):
        for cut in range(run.start() + _RUN_PART, run.end(), _RUN_PART):
            yield text[start:cut]
            start = cut
    if start < len(text):
        yield text[start:]


def round_up(size: int) -> int:
    """The next multiple of 64."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@functools.cache
def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = byte_level_alphabet()
_CHARACTER_OF = {byte: character for character, byte in _BYTE_OF.items()}


def byte_level_name(content: bytes) -> str:
    """Bytes in GPT-2's printable stand-ins."""
    return "".join(_CHARACTER_OF[byte] for byte in content)


def byte_level_bytes(token: str) -> bytes:
    """The bytes of an entry in GPT-2's printable stand-ins; of one that is written in other characters, its UTF-8."""
    if all(c in _BYTE_OF for c in token):
        return bytes(_BYTE_OF[c] for c in token)
    return token.encode("utf-8")


def inner_bytes(token: str) -> bytes:
    """The bytes of an entry of a WordPiece model over bytes: ## only says that it goes on inside a word."""
    return byte_level_bytes(token.removeprefix("##"))


def sentence_piece_bytes(token: str) -> bytes:
    """The bytes of an entry of a SentencePiece model: <0x0A> is a byte, U+2581 a blank."""
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode("utf-8")


def word_piece_bytes(token: str) -> bytes:
    """The bytes of an entry of a WordPiece model of whole characters, as BERT's: a blank stands before an entry that begins a word."""
    return (token[2:] if token.startswith("##") else f" {token}").encode("utf-8")
