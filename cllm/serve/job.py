"""One request while the engine works on it: what each of its answers has become, and what of it its client has not got yet.

The engine's thread fills it and never waits for it; the client's side reads it in the event loop. What is unread is bounded: a client that does not
read fast enough loses its answer, and nobody else waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cllm.generate.continuation import Continuation
from cllm.serve.replies import TokenShown

if TYPE_CHECKING:
    from cllm.generate.request import Ticket
    from cllm.generate.sampler import Chosen
    from cllm.serve.served import Prompt, Served

MOST_UNREAD = 4_096  # pieces of text


class Piece(NamedTuple):
    """Text that became certain. reason: why the answer has ended, in the engine's words; empty while it goes on."""

    sample: int
    text: str
    tokens: list[TokenShown]
    reason: str


class Sample:
    """One answer: its text, and where wanted the log-probabilities of its tokens."""

    def __init__(self, index: int, continuation: Continuation) -> None:
        self.index, self.continuation = index, continuation
        self.tokens: list[TokenShown] = []
        self.reason = ""

    @property
    def text(self) -> str:
        return self.continuation.text


class Job:
    """All answers to one request.

    samples: answers to each of the prompts. streamed: whether pieces are kept for the client; otherwise only the whole answers are. scored: whether
    log-probabilities are wanted. min_tokens: before so many no stop string ends an answer. keeps_nothing: whether the prompt alone is wanted
    (max_tokens 0). shows_special: whether special tokens are text, as the marks of calls may be. told: called in the engine's thread when there is
    something new.
    """

    def __init__(
        self,
        served: Served,
        prompts: Sequence[Prompt],
        samples: int,
        stop: Sequence[str],
        *,
        seed: int,
        streamed: bool,
        scored: bool,
        min_tokens: int = 0,
        keeps_nothing: bool = False,
        shows_special: bool = False,
        told: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self.served, self._tokenizer = served, served.tokenizer
        self._streamed, self._scored, self._keeps_nothing, self._told = streamed, scored, keeps_nothing, told
        tokenizer = self._tokenizer
        self.prompts, self.num_samples = prompts, samples
        self.samples = [Sample(index, Continuation(index % samples, seed, tokenizer, stop, min_tokens)) for index in range(len(prompts) * samples)]
        if shows_special:
            for each in self.samples:
                each.continuation.decoder = tokenizer.stream_decoder(skip_special=False)
        self.prompt_scores: list[list[TokenShown]] = [[TokenShown(tokenizer.token_bytes(each.tokens[0]), None)] for each in prompts]
        self.tickets: list[Ticket] = []
        self.pieces: deque[Piece] = deque()
        self.changed = asyncio.Event()
        self.started = time.monotonic()
        self.first_token: float | None = None
        self.unfinished = len(self.samples)
        self.is_too_slow = False

    @property
    def completion_tokens(self) -> int:
        return sum(len(each.continuation.tokens) for each in self.samples)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(each.tokens) for each in self.prompts)

    @property
    def is_scored(self) -> bool:
        return self._scored

    @property
    def is_finished(self) -> bool:
        return self.unfinished == 0

    # -- in the engine's thread ----------------------------------------------------------------------------------------

    def callbacks(self, prompt: int) -> dict[str, Any]:
        """What a request for one of the prompts tells the engine to call."""
        first = prompt * self.num_samples
        return {
            "on_token": lambda index, chosen: self._take(self.samples[first + index], chosen),
            "on_finish": lambda index, reason: self._end(self.samples[first + index], reason),
            "on_prompt_token": lambda chosen: self.prompt_scores[prompt].append(self._shown(chosen)),
        }

    def _take(self, sample: Sample, chosen: Chosen) -> bool:
        if self.first_token is None:
            self.first_token = time.monotonic()
        if self._keeps_nothing:
            return False
        text = sample.continuation.take(chosen.token)
        shown = [self._shown(chosen)] if self._scored else []
        sample.tokens += shown
        if text or shown:
            self._put(Piece(sample.index, text, shown, ""))
        return not (sample.continuation.stop.stopped or self.is_too_slow)

    def _end(self, sample: Sample, reason: str) -> None:
        text = sample.continuation.end(reason)
        reason = sample.continuation.finish_reason
        sample.reason = "slow reader" if self.is_too_slow and reason != "length" else reason
        if self._keeps_nothing and reason == "stop":
            sample.reason = "length"
        self._put(Piece(sample.index, text, [], sample.reason))
        self.unfinished -= 1  # last: the client's side stops looking for pieces then

    def _put(self, piece: Piece) -> None:
        if self._streamed:
            if len(self.pieces) >= MOST_UNREAD:
                self.is_too_slow = True
            if not self.is_too_slow or piece.reason:
                self.pieces.append(piece)
        elif not piece.reason:
            return
        self._told(self)

    def _shown(self, chosen: Chosen) -> TokenShown:
        of = self._tokenizer.token_bytes
        return TokenShown(of(chosen.token), chosen.logprob, [(of(token), logprob) for token, logprob in chosen.top])
