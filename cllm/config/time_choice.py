"""Which model is trained on how many tokens in a given time: the one for which the scaling law predicts the lowest loss. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cllm.config import recipe
from cllm.config.scaling_law import ERRORS, LAW, Errors, ScalingLaw


@dataclass(frozen=True)
class Speed:
    """Seconds of an update: `overhead`, and `per_token` for each of its tokens."""

    overhead: float
    per_token: float

    def update(self, tokens: int) -> float:
        """Seconds of an update of so many tokens."""
        return self.overhead + self.per_token * tokens


@dataclass(frozen=True)
class Candidate:
    """A model that might be trained. memory: bytes that training takes with microbatches of so many sequences."""

    name: str
    parameters: int
    block_parameters: int
    speed: Speed
    memory: Callable[[int], int]


@dataclass(frozen=True)
class Text:
    """What a choice needs to know of the training text: its tokens, and bits per byte of n-grams (`ScalingLaw.text_order`)."""

    tokens: int
    bits: float


@dataclass(frozen=True)
class Limits:
    """seconds: for updates and evaluations. aside: the share of them for evaluations. memory: bytes. seq_len: tokens of a sequence.

    batch_size: sequences of an update where they are given. passes: over the text, at most.
    """

    seconds: float
    memory: float
    aside: float = 0.05
    seq_len: int = 256
    batch_size: int | None = None
    passes: float | None = None


@dataclass(frozen=True)
class Choice:
    """What is to be trained. An update has grad_accum microbatches of batch_size sequences. low, high: of `bits_per_byte`, in 8 of 10 runs."""

    candidate: Candidate
    batch_size: int
    grad_accum: int
    steps: int
    tokens: int
    passes: float
    most_passes: float
    seconds: float
    bits_per_byte: float
    low: float
    high: float
    limited_by_text: bool
    """Whether the text has been read as often as it is worth before the time is over."""
    with_more_text: float
    """bits_per_byte that is predicted with four times as much text."""


def choose(candidates: Iterable[Candidate], text: Text, limits: Limits, law: ScalingLaw = LAW, errors: Errors = ERRORS) -> Choice:
    """The candidate with the lowest predicted loss."""
    return min(plans(candidates, text, limits, law, errors), key=lambda choice: choice.bits_per_byte)


def plans(candidates: Iterable[Candidate], text: Text, limits: Limits, law: ScalingLaw = LAW, errors: Errors = ERRORS) -> list[Choice]:
    """What each candidate that fits into the memory comes to; of none that does, the one that takes the least. There is at least one candidate."""
    each_one = list(candidates)
    fitting = [each for each in each_one if each.memory(1) <= limits.memory] or [min(each_one, key=lambda each: each.memory(1))]
    return [_plan(each, text, limits, law, errors) for each in fitting]


def _plan(candidate: Candidate, text: Text, limits: Limits, law: ScalingLaw, errors: Errors) -> Choice:
    """What one candidate comes to."""
    most_passes = law.most_passes if limits.passes is None else limits.passes
    batch, tokens = _most_tokens(candidate.speed, limits)
    limited = tokens > most_passes * text.tokens
    if limited:
        batch = limits.batch_size or min(batch, recipe.batch_size(most_passes * text.tokens, limits.seq_len))
        tokens = min(most_passes * text.tokens, _tokens_in(limits, candidate.speed, batch))
    micro = batch
    while micro > 1 and candidate.memory(micro) > limits.memory:
        micro //= 2
    accumulated = -(-batch // micro)
    update = micro * accumulated * limits.seq_len
    steps = max(1, int(tokens / update))
    predicted = _predicted(candidate, steps * update, text, law)
    factor = errors.factor(candidate.parameters, steps * update)
    return Choice(
        candidate,
        batch_size=micro,
        grad_accum=accumulated,
        steps=steps,
        tokens=steps * update,
        passes=steps * update / text.tokens,
        most_passes=most_passes,
        seconds=steps * candidate.speed.update(update) / (1 - limits.aside),
        bits_per_byte=predicted,
        low=predicted / factor,
        high=predicted * factor,
        limited_by_text=limited,
        with_more_text=_predicted(candidate, tokens, Text(4 * text.tokens, text.bits), law),
    )


def _predicted(candidate: Candidate, tokens: float, text: Text, law: ScalingLaw) -> float:
    return law.bits_per_byte(candidate.block_parameters if law.of_blocks else candidate.parameters, tokens, text.tokens, text.bits)


def _most_tokens(speed: Speed, limits: Limits) -> tuple[int, float]:
    """(sequences in an update, tokens) of a run that fills the time: the largest batch for which the recipe takes no smaller one.

    A larger batch has more tokens in the same time, and the recipe's batch grows with the tokens. So more time never gives fewer tokens.
    """
    if limits.batch_size is not None:
        return limits.batch_size, _tokens_in(limits, speed, limits.batch_size)
    batch = 1
    while recipe.batch_size(_tokens_in(limits, speed, 2 * batch), limits.seq_len) >= 2 * batch:
        batch *= 2
    return batch, _tokens_in(limits, speed, batch)


def _tokens_in(limits: Limits, speed: Speed, batch: int) -> float:
    """Tokens that the time suffices for, with so many sequences in an update."""
    update = batch * limits.seq_len
    return limits.seconds * (1 - limits.aside) / speed.update(update) * update
