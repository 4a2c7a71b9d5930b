"""What a suite is measured on: documents that the model has not seen, each with its tokens and its text, and who else is measured on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cllm.evaluate.continuations import continue_all

if TYPE_CHECKING:
    from cllm.data import TokenSplit
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.evaluate.ngram import NGrams
    from cllm.model.model import Model

TEMPERATURE = 0.8  # of everything that is sampled
_TOGETHER = 1 << 20  # tokens whose n-grams are looked up at a time

# (prompts, the most tokens, temperature, whether to end, given all tokens written so far) -> the continuation of each prompt
Writer = Callable[[Sequence[Sequence[int]], int, float, Callable[[Sequence[int]], bool]], list[list[int]]]


@dataclass(frozen=True)
class Document:
    """tokens (n,) int64, without an end-of-text token."""

    name: str
    tokens: np.ndarray
    text: str


def documents(split: TokenSplit, tokenizer: Tokenizer) -> Iterator[Document]:
    """Every document of a split, in order."""
    for name, start, length in zip(split.iter_names(), split.document_starts, split.document_lengths):
        tokens = split.read(int(start), int(length))
        if len(tokens) and tokens[-1] == tokenizer.eot_id:
            tokens = tokens[:-1]
        yield Document(name, tokens, tokenizer.decode(tokens))


def ngram_bits_per_byte(ngrams: NGrams, split: TokenSplit, tokenizer: Tokenizer) -> float:
    """Of the same targets as `cllm.evaluate.documents.score_documents`: all tokens but the first of each document."""
    bits = num_bytes = 0.0
    starts, ends = split.document_starts, np.append(split.document_starts[1:], split.num_tokens)
    first = 0
    while first < split.num_documents:
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + _TOGETHER, side="right")))
        low, high = int(starts[first]), int(ends[last - 1])
        tokens, begins = split.read(low, high - low), np.asarray(starts[first:last]) - low
        found = ngrams.bits(tokens, begins)
        bits += float(found.sum() - found[begins].sum())
        lengths = tokenizer.byte_lengths[tokens]
        num_bytes += float(lengths.sum() - lengths[begins].sum())
        first = last
    return bits / max(1.0, num_bytes)


def model_writer(model: Model, tokenizer: Tokenizer, progress: Callable[[int], None] | None = None) -> Writer:
    """Continuations by the model."""

    def write(prompts: Sequence[Sequence[int]], most: int, temperature: float, ends: Callable[[Sequence[int]], bool]) -> list[list[int]]:
        return continue_all(model, tokenizer, prompts, most, temperature=temperature, ends=ends, progress=progress)

    return write


def ngram_writer(ngrams: NGrams, tokenizer: Tokenizer) -> Writer:
    """Continuations by an n-gram model, chosen as those of a model are: the likeliest token, or a draw at a temperature."""

    def write(prompts: Sequence[Sequence[int]], most: int, temperature: float, ends: Callable[[Sequence[int]], bool]) -> list[list[int]]:
        written = []
        for number, prompt in enumerate(prompts):
            generator = np.random.Philox(key=number)
            tokens: list[int] = []
            while len(tokens) < most:
                shares = ngrams.shares([*prompt, *tokens][-len(ngrams.orders) :])
                if temperature:
                    total = np.cumsum(shares ** (1 / temperature))
                    token = int(np.searchsorted(total, total[-1] * ((int(generator.random_raw()) >> 11) / 2**53), side="right"))
                else:
                    token = int(np.argmax(shares))
                if token == tokenizer.eot_id:
                    break
                tokens.append(token)
                if ends(tokens):
                    break
            written.append(tokens)
        return written

    return write
