"""Guesses by a smaller model of the same tokenizer, for all texts that an engine writes at once.

Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192): the small model reads each text behind the large one and writes on, always its
likeliest token; the large one checks all guesses in one step. A guess changes nothing but speed, as in drafts.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from cllm.generate.drafts import Trust
from cllm.model.pages import Part, pages_for
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.model.model import Model

CATCH_UP = 256  # tokens of a text that are read in one step at most; others wait for them


class DraftText:
    """One text, as far as the small model has read it."""

    def __init__(self) -> None:
        self.stored: list[int] = []  # tokens whose keys and values lie in the pages, guesses among them
        self.pages: list[int] = []
        self.checked = 0  # of these, how many are known to be of the text
        self.trust = Trust()


class Wanted(NamedTuple):
    text: DraftText
    tokens: Sequence[int]
    """All of the text. It has only grown since the last call."""
    most: int
    """Guesses at most."""


class DraftModel:
    """A model that guesses for another one.

    vocab_size: the tokenizer's, which has to be that of the other model. num_pages: of keys and values; a text that finds none gets no guesses.
    Raises UserError for a model with fewer tokens than the tokenizer.
    """

    def __init__(self, model: Model, vocab_size: int, num_pages: int) -> None:
        if model.config.vocab_size < vocab_size:
            raise UserError(f"the draft model has {model.config.vocab_size} tokens and the tokenizer {vocab_size}: they do not belong together.")
        self.model, self.vocab_size = model, vocab_size
        self.limit = model.config.max_seq_len
        self.pool = model.make_pool(num_pages)

    def guess(self, wanted: Sequence[Wanted]) -> list[list[int]]:
        """For each text up to `most` tokens that may follow it."""
        found: list[list[int]] = [[] for _ in wanted]
        sizes = [self._size(each) for each in wanted]
        parts = {number: self._unread(wanted[number]) for number, size in enumerate(sizes) if size}
        while parts:
            logits = self.model.step(self.pool, list(parts.values()))
            chosen = iter(logits[:, : self.vocab_size].argmax(-1).tolist())
            following: dict[int, Part] = {}
            for number, part in parts.items():
                text = wanted[number].text
                text.stored += part.tokens
                if part.wanted:
                    found[number].append(next(chosen))
                    if len(found[number]) < sizes[number]:
                        following[number] = Part(found[number][-1:], len(text.stored), text.pages, 1)
            parts = following
        return found

    def release(self, text: DraftText) -> None:
        """The text has ended, or begins anew."""
        for page in text.pages:
            self.pool.release(page)
        text.pages, text.stored, text.checked = [], [], 0

    def _size(self, wanted: Wanted) -> int:
        """How many guesses are worth making; their pages are then there."""
        text, tokens, most = wanted
        size = text.trust.allows(min(most, self.limit - len(tokens)))
        missing = pages_for(len(tokens) + size) - len(text.pages)
        if size < 1 or missing > self.pool.num_free:
            return 0
        text.pages += [self.pool.take() for _ in range(missing)]
        return size

    def _unread(self, wanted: Wanted) -> Part:
        """What the small model has to read before it can guess: what is new in the text, instead of guesses that were wrong."""
        text, tokens, _ = wanted
        right = text.checked
        while right < min(len(text.stored), len(tokens) - 1) and text.stored[right] == tokens[right]:
            right += 1
        del text.stored[right:]
        text.checked = right
        new = list(tokens[right : right + CATCH_UP])
        return Part(new, right, text.pages, int(right + len(new) == len(tokens)))
