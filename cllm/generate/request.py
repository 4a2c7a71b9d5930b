"""What somebody asks an engine for, and each sample of it while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cllm.config.sampling import Sampling
from cllm.generate.draft_model import DraftText
from cllm.generate.drafts import Drafts
from cllm.generate.sampler import Chosen, Sampler
from cllm.runtime.errors import CLLMError

if TYPE_CHECKING:
    from cllm.generate.constraint import Constraint

_DEFAULT = Sampling()


class QueueFull(CLLMError):
    """As many requests wait as the engine lets wait."""

    def __init__(self, most: int, retry_after: float) -> None:
        super().__init__(f"{most} requests are waiting already. Try again in {retry_after:.0f} s.")
        self.retry_after = retry_after


def _go_on(sample: int, chosen: Chosen) -> bool:
    return True


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Request:
    """What somebody asks for: tokens in, `samples` continuations out. The callbacks run in the engine's thread and must not wait."""

    prompt: Sequence[int]
    """At least one token."""
    max_tokens: int
    sampling: Sampling = _DEFAULT
    seed: int = 0
    """With the same seed sample i has the same tokens, however many samples there are and whatever else runs."""
    samples: int = 1
    end_tokens: frozenset[int] = frozenset()
    """Tokens that end a sample and belong to none."""
    min_tokens: int = 0
    """No end token is chosen before so many others. Stop strings are the business of whoever reads the text."""
    logprobs: int | None = None
    """Log-probabilities of the chosen token and of so many of the likeliest; None: of none."""
    prompt_logprobs: bool = False
    """Also of the prompt's own tokens but the first, to `on_prompt_token`."""
    constraint: Callable[[], Constraint] | None = None
    """Makes what restricts one sample."""
    slide: bool = False
    """Whether a sample whose text outgrows the model's context goes on, seeing the last half of the context; else it ends there."""
    speculate: bool = True
    """Whether tokens are guessed ahead. They are the same either way."""
    client: str = ""
    """Clients take turns."""
    deadline: float | None = None
    """`time.monotonic()` at which what is unfinished ends."""
    on_token: Callable[[int, Chosen], bool] = _go_on
    """(sample, token) -> whether to go on; without, the sample ends with "stop"."""
    on_prompt_token: Callable[[Chosen], None] = _ignore
    on_finish: Callable[[int, str], None] = _ignore
    """(sample, reason), once for each sample: "length", "stop", "end", "cancelled", "deadline", "refused: ..." or "error: ..."."""


@dataclass
class Ticket:
    """A request on its way, for `Engine.cancel`."""

    request: Request
    rows: list[Row] = field(default_factory=list)
    cancelled: bool = False
    reused: int = 0
    """Tokens of the prompt that lay in pages already when its first sample began."""

    @property
    def finished(self) -> bool:
        return all(row.finish_reason for row in self.rows)


@dataclass(frozen=True)
class Stats:
    """What an engine does and did."""

    running: int
    waiting: int
    pages_used: int
    """By running sequences and kept beginnings."""
    pages_total: int
    steps: int
    tokens_in: int
    """Prompt tokens that were computed."""
    tokens_out: int
    prefix_hits: int
    """Prompt tokens that lay in pages already."""
    guessed: int
    guessed_right: int


class Row:
    """One sample of a request."""

    def __init__(self, ticket: Ticket, index: int, vocab_size: int, most_pages: int) -> None:
        request = ticket.request
        self.ticket, self.request, self.index, self.most_pages = ticket, request, index, most_pages
        self.context = list(request.prompt)  # what the model sees
        self.stored = 0  # of these, how many lie in pages
        self.pages: list[int] = []
        self.produced = 0
        self.scored = 1  # tokens of the prompt whose log-probability was told or is not asked for
        self.finish_reason = ""
        self.drafts = Drafts() if request.speculate else None
        self.drafted = DraftText()  # the text as an engine's draft model knows it
        self.guesses: list[int] = []
        self.trust = self.drafted.trust  # of whoever made these guesses
        self.sampler = Sampler(
            request.sampling, prompt=request.prompt, vocab_size=vocab_size, seed=request.seed, index=index, end_tokens=request.end_tokens,
            min_tokens=request.min_tokens, logprobs=request.logprobs, constraint=None if request.constraint is None else request.constraint(),
        )  # fmt: skip

    @property
    def pending(self) -> int:
        return len(self.context) - self.stored
