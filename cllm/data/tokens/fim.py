"""Fill in the middle (Bavarian et al. 2022, arXiv 2207.14255): a text is cut in three at random places and learnt in another order, so that the model
writes what stands between a beginning and an end.

    <fim_prefix> PREFIX <fim_suffix> SUFFIX <fim_middle> MIDDLE <end of text>

Training rearranges the pieces of documents in a window (the paper's context level), when the window is made. Whole documents, rearranged when they
are packed, would mostly be longer than a window and lose their parts to its edges; here every example is complete, and each epoch cuts a text at
other places. Of a piece that the window cuts off, a beginning of any length is rearranged and the rest follows as it is: were it the whole piece,
middles would always end with the window, and the model would fill whatever room there is.

A piece keeps its number of tokens: to make room for the special ones the suffix loses its end, or the prefix its beginning. Places are those between
characters and not between tokens, because whoever asks for a middle may stand inside a word; the three parts are therefore encoded anew, as a
prompt's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.data.tokens.vocabulary import FimTokens


def check_fim(tokenizer: Tokenizer) -> FimTokens:
    """The tokens for filling in the middle. Raises UserError for a tokenizer without them, or without an end of text, which ends a middle."""
    if tokenizer.fim_tokens is None or tokenizer.eot_id is None:
        raise UserError(
            "fim_rate needs a tokenizer with the special tokens <|fim_prefix|>, <|fim_suffix|>, <|fim_middle|> and <|endoftext|>, and this one does "
            "not have all of them. Let cllm train make one (--tokenizer bpe, wordpiece, unigram or char), or leave out --fim-rate."
        )
    return tokenizer.fim_tokens


def fim_prompt(tokenizer: Tokenizer, prefix: Sequence[int], suffix: Sequence[int], most: int | None = None) -> list[int]:
    """The tokens behind which a model writes the middle between two others.

    most: the length that the result keeps to, at least 4. The prefix then loses its beginning and the suffix its end, which keeps at least a quarter
    of the room. Raises UserError where the model of the tokenizer has not learnt to fill in a middle.
    """
    tokens = tokenizer.fim
    if tokens is None:
        raise UserError(
            "this model has not learnt to fill in the middle of a text. Train one with cllm train DATA --fim-rate 0.5, or leave out the suffix."
        )
    if most is not None:
        room = most - len(tokens)
        suffix = suffix[: max(room // 4, room - len(prefix))]
        prefix = prefix[max(0, len(prefix) - (room - len(suffix))) :]
    return [tokens.prefix, *prefix, tokens.suffix, *suffix, tokens.middle]


class FillInTheMiddle:
    """Rearranges a share `rate` of the pieces of documents. Raises UserError as `check_fim` does."""

    def __init__(self, tokenizer: Tokenizer, rate: float) -> None:
        self.tokenizer, self.rate = tokenizer, rate
        self._tokens = check_fim(tokenizer)

    def rearranged(self, tokens: np.ndarray, begins: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """(n,) int64: as many tokens, each document at its place.

        begins: (k,) the places above 0 at which another document begins. numbers: (k + 1, 4) random numbers of 64 bits, four for each piece.
        """
        pieces = np.split(tokens, begins)
        for place, (chance, length, one, other) in enumerate(numbers.tolist()):
            if chance < self.rate * 2**64:
                piece = pieces[place]
                cut = len(piece) if self._is_whole(piece) else length % (len(piece) + 1)
                pieces[place] = np.concatenate([self._rearranged(piece[:cut], one, other), piece[cut:]])
        return np.concatenate(pieces)

    def _is_whole(self, piece: np.ndarray) -> bool:
        """Whether it goes up to the end of its document."""
        return len(piece) > 0 and bool(piece[-1] == self.tokenizer.eot_id)

    def _rearranged(self, piece: np.ndarray, one: int, other: int) -> np.ndarray:
        """The piece as it is where it is too short for the special tokens."""
        tokenizer, end = self.tokenizer, self.tokenizer.eot_id
        # A window may cut a character in two, whose bytes at the edge are left out.
        text = tokenizer.decode_bytes(piece[:-1] if self._is_whole(piece) else piece).decode("utf-8", errors="ignore")
        first, last = sorted((one % (len(text) + 1), other % (len(text) + 1)))
        prefix, middle, suffix = tokenizer.encode_arrays([text[:first], text[first:last], text[last:]])
        extra = len(prefix) + len(middle) + len(suffix) + len(self._tokens) + 1 - len(piece)
        if 0 <= extra <= len(suffix):
            suffix = suffix[: len(suffix) - extra]
        elif 0 <= extra <= len(prefix):
            prefix = prefix[extra:]
        else:
            return piece
        before, between, behind = ([token] for token in self._tokens)
        return np.concatenate([before, prefix, between, suffix, behind, middle, [end]])
