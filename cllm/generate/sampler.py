"""One continuation's choice of tokens: what occurred so far, its random numbers, what it may not choose, and how likely its tokens were.

Greedy choices and draws are those of `cllm.generate.sampling`, token for token; draws are made by compiled_draw.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from cllm.config.sampling import Sampling
from cllm.generate.compiled_draw import UNDECIDED, draw_token, likeliest, log_of_sum
from cllm.generate.sampling import NOT_FINITE, check_bias, draw_at, filtered, uniform
from cllm.runtime.errors import CLLMError, UserError

if TYPE_CHECKING:
    from cllm.generate.constraint import Constraint


class Chosen(NamedTuple):
    """A token, with log-probabilities in nats of the model's own distribution (before bias, penalties, temperature and filters)."""

    token: int
    logprob: float | None
    """Of the token; None where no log-probabilities were asked for."""
    top: list[tuple[int, float]]
    """The likeliest tokens with theirs, the likeliest first, ties by id."""


class Sampler:
    """Chooses the tokens of one continuation, one after the other; a continuation chooses the same whatever others are computed beside it.

    prompt: its token ids, which the repetition penalty counts. index: the number of the sample, for its own random numbers from the same `seed`.
    end_tokens cannot be chosen before `min_tokens` tokens were, unless the constraint allows nothing else. logprobs: how many of the likeliest
    tokens are told with each choice; 0 tells the chosen one's log-probability alone, None nothing.

    Raises UserError for a logit bias of tokens that the vocabulary does not have, and for more log-probabilities than it has tokens.
    """

    def __init__(
        self,
        sampling: Sampling,
        *,
        prompt: Sequence[int],
        vocab_size: int,
        seed: int,
        index: int = 0,
        end_tokens: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        check_bias(sampling, vocab_size)
        if logprobs is not None and not 0 <= logprobs <= vocab_size:
            raise UserError(f"logprobs must be from 0 to the {vocab_size} tokens of the vocabulary, got {logprobs}.")
        self._sampling, self._vocab_size, self._min_tokens, self._logprobs, self._constraint = sampling, vocab_size, min_tokens, logprobs, constraint
        # One generator per sample, far apart for neighbouring seeds: adding samples does not change the earlier ones.
        self._generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index) % 2**63)
        self._end_tokens = np.array(sorted(token for token in end_tokens if token < vocab_size), dtype=np.int64)
        self._bias_tokens = np.array(list(sampling.logit_bias), dtype=np.int64)
        self._bias = np.array(list(sampling.logit_bias.values()), dtype=np.float64)
        self._penalises = sampling.repetition_penalty != 1.0 or bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._occurred = _Occurrences(prompt if sampling.repetition_penalty != 1.0 else ())
        self._chosen = 0

    @property
    def finished(self) -> bool:
        """Whether the constraint lets nothing but an end token follow, so that the model need not be asked."""
        return self._constraint is not None and self._constraint.finished

    def choose(self, logits: np.ndarray) -> Chosen:
        """logits (V',) float32, V' >= vocab_size (the rest is ignored) -> the next token.

        Raises CLLMError where they are not finite, before anything has changed.
        """
        row = logits[: self._vocab_size]
        best = int(row.argmax())  # the first of equal ones; the first NaN where there is one
        if not math.isfinite(row[best]):
            raise CLLMError(NOT_FINITE)
        adjusted = self._adjusted(row)
        if adjusted is not None:
            best = int(adjusted.argmax())
        if self._sampling.temperature == 0:
            token = best
        else:
            token = self._drawn(row.astype(np.float64) if adjusted is None else adjusted, best)
        if self._constraint is not None:
            self._constraint.advance(token)
        if self._penalises:
            self._occurred.add(token)
        self._chosen += 1
        return Chosen(token, *self._likelihoods(row, token))

    def _adjusted(self, row: np.ndarray) -> np.ndarray | None:
        """The logits in float64 with bias and penalties and without what is not allowed; None where nothing changes."""
        too_early = self._chosen < self._min_tokens and len(self._end_tokens) > 0
        if not (too_early or self._penalises or len(self._bias) or self._constraint is not None):
            return None
        x = row.astype(np.float64)
        x[self._bias_tokens] += self._bias
        if self._penalises:
            self._penalise(x)
        allowed = np.ones(self._vocab_size, dtype=bool) if self._constraint is None else self._constraint.mask()[: self._vocab_size].copy()
        if too_early and allowed.sum() > allowed[self._end_tokens].sum():
            allowed[self._end_tokens] = False
        x[~allowed] = -np.inf
        if x.max() == -np.inf:
            raise CLLMError("the model gives no chance to any token that is allowed here, so the text cannot go on. Loosen what it may say.")
        return x

    def _penalise(self, x: np.ndarray) -> None:
        """As `sampling.adjust` does."""
        sampling, tokens, counts = self._sampling, self._occurred.tokens, self._occurred.counts
        values = x[tokens]
        penalty = sampling.repetition_penalty
        values = np.where(values > 0, values / penalty, values * penalty)
        values = values - sampling.frequency_penalty * counts
        x[tokens] = values - np.where(counts > 0, sampling.presence_penalty, 0.0)

    def _drawn(self, x: np.ndarray, best: int) -> int:
        sampling, number = self._sampling, uniform(self._generator)
        if sampling.typical_p is None or sampling.typical_p == 1:
            top_p = 1.0 if sampling.top_p is None else sampling.top_p
            token = int(draw_token(x, x[best], sampling.temperature, sampling.top_k or 0, top_p, sampling.min_p or 0.0, number))
            if token != UNDECIDED:
                return token
        return draw_at(filtered(torch.from_numpy(x), sampling), number)

    def _likelihoods(self, row: np.ndarray, token: int) -> tuple[float | None, list[tuple[int, float]]]:
        return (None, []) if self._logprobs is None else _likelihoods(row, token, self._logprobs)


def score(logits: np.ndarray, token: int, num_top: int) -> Chosen:
    """How likely a token that stands in the text already is, for logits (V,) float32 where it was to be chosen; beside it the `num_top` likeliest."""
    return Chosen(token, *_likelihoods(logits, token, num_top))


def _likelihoods(row: np.ndarray, token: int, num_top: int) -> tuple[float, list[tuple[int, float]]]:
    x = row.astype(np.float64)
    total = log_of_sum(x)
    return float(x[token] - total), [(int(each), float(x[each] - total)) for each in likeliest(x, num_top)]


class _Occurrences:
    """The different tokens that occurred, and how often each was generated; both as arrays that grow."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._places = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._tokens = np.array([*self._places, *[0] * 16], dtype=np.int64)
        self._counts = np.zeros(len(self._tokens), dtype=np.float64)

    @property
    def tokens(self) -> np.ndarray:
        return self._tokens[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: len(self._places)]

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[place] = token
        self._counts[place] += 1
