"""Beam search: the likeliest texts that a search of a given width finds, without random numbers.

Each step extends the `beams` likeliest unfinished texts by every token and keeps the likeliest; a text that ends among the best `beams` of a step is
finished and scored: the sum of its tokens' log-probabilities (the end token's too) over its number of tokens to the power of the length penalty.
What is kept, and when the search stops, is what Hugging Face's `generate(num_beams=...)` does. Sums are in float64; ties go to the better beam,
then to the lower token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from cllm.generate.decoding import Generation, prompt_tokens
from cllm.generate.sampling import check_finite
from cllm.model.pages import PAGE, Part, pages_for
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.model.model import Model

MOST_BEAMS = 256
EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class Beam:
    """One text of a search."""

    tokens: list[int]
    """Without the end token."""
    log_probability: float
    """Of the tokens and the end token together, in nats."""
    score: float
    finish_reason: str
    """ "end", "stop" or "length"."""


@dataclass(frozen=True)
class BeamGeneration(Generation):
    """One text of `generate_beams`. `seconds` is the time of the whole search."""

    score: float
    log_probability: float


class Rows(Protocol):
    """Unfinished texts, whose next tokens a model predicts."""

    def advance(self, rows: Sequence[tuple[int, int]]) -> Tensor:
        """(row of the last call, its next token) for each row that goes on; a row may go on several times or not at all -> logits (rows, V) of the
        tokens after those."""


@torch.no_grad()
def search(
    rows: Rows,
    first: Tensor,
    *,
    beams: int,
    max_tokens: int,
    end_tokens: frozenset[int] = frozenset(),
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    stopped: Callable[[list[int]], bool] = lambda tokens: False,
) -> list[Beam]:
    """At most `beams` texts, the best first.

    first: logits (1, V) of the first token, row 0 of the first `advance`. early_stopping: True ends the search with the first `beams` finished
    texts; False when the best unfinished one, at its present length, is no better than the worst finished one; "never" when it cannot become better
    at any length (with a positive length penalty: at the greatest). stopped: whether a text ends with its last token.
    """
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[Beam] = []
    logits = first
    for length in range(1, max_tokens + 1):
        for each in logits:
            check_finite(each)
        total = torch.log_softmax(logits.to("cpu", torch.float64), -1) + torch.tensor([[value] for value, _ in running], dtype=torch.float64)
        going: list[tuple[float, list[int]]] = []
        chosen: list[tuple[int, int]] = []
        ended: list[Beam] = []
        for place, (value, parent, token) in enumerate(_likeliest(total, max(2, 1 + len(end_tokens)) * beams)):
            tokens = [*running[parent][1], token]
            is_end = token in end_tokens
            reason = "end" if is_end else "stop" if stopped(tokens) else "length" if length == max_tokens else ""
            if not reason and len(going) < beams:
                going.append((value, tokens))
                chosen.append((parent, token))
            elif reason and place < beams:
                ended.append(Beam(tokens[:-1] if is_end else tokens, value, value / length**length_penalty, reason))
        finished = sorted([*finished, *ended], key=lambda beam: -beam.score)[:beams]
        if not going:
            break
        if len(finished) == beams:
            best_length = max_tokens if early_stopping == "never" and length_penalty > 0 else length
            if early_stopping is True or going[0][0] / best_length**length_penalty <= finished[-1].score:
                break
        running = going
        logits = rows.advance(chosen)
    return finished


def _likeliest(total: Tensor, count: int) -> list[tuple[float, int, int]]:
    """(value, row, token) of the largest values of (rows, V), the largest first, ties by row and token; -inf is never among them."""
    flat = total.flatten()
    least = flat.topk(min(count, len(flat))).values[-1]
    places = ((flat >= least) & (flat > -torch.inf)).nonzero()[:, 0]
    order = torch.sort(flat[places], descending=True, stable=True).indices[:count]
    found = places[order]
    return [(value, place // total.shape[1], place % total.shape[1]) for value, place in zip(flat[found].tolist(), found.tolist())]


class PagedRows:
    """Unfinished texts after one prompt, their keys and values in pages: full pages are shared by all that go on from them.

    `first` are the logits (1, V) after the prompt. V is cut to the `vocab_size` tokens of a tokenizer.
    """

    def __init__(self, model: Model, prompt: Sequence[int], vocab_size: int, beams: int, max_tokens: int) -> None:
        self._model, self._vocab_size = model, vocab_size
        self._length = len(prompt)
        # At worst no two texts share a page behind the prompt; while texts fork, the pages of both generations are held.
        self._pool = model.make_pool(pages_for(len(prompt)) + beams * (pages_for(len(prompt) + max_tokens) - len(prompt) // PAGE + 1))
        self._pages = [[self._pool.take() for _ in range(pages_for(len(prompt)))]]
        self.first = self._step([Part(prompt, 0, self._pages[0], 1)])

    def advance(self, rows: Sequence[tuple[int, int]]) -> Tensor:
        """As `Rows.advance`."""
        filled = self._length % PAGE  # places of a page that is not full
        pages: list[list[int]] = []
        gone_on: set[int] = set()
        for parent, _ in rows:
            own = list(self._pages[parent])
            if filled and parent in gone_on:  # another text writes into its last page
                last = own.pop()
            for page in own:
                self._pool.hold(page)
            if filled and parent in gone_on:
                own.append(self._pool.take())
                self._pool.copy(last, own[-1], filled)
            elif not filled:
                own.append(self._pool.take())
            gone_on.add(parent)
            pages.append(own)
        for old in self._pages:
            for page in old:
                self._pool.release(page)
        self._pages = pages
        logits = self._step([Part([token], self._length, own, 1) for (_, token), own in zip(rows, pages)])
        self._length += 1
        return logits

    @torch.no_grad()
    def _step(self, parts: Sequence[Part]) -> Tensor:
        return self._model.step(self._pool, parts)[:, : self._vocab_size]


def generate_beams(
    model: Model,
    tokenizer: Any,
    prompt: str | Sequence[int],
    *,
    beams: int,
    max_tokens: int = 200,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    stop: str | Sequence[str] = (),
) -> list[BeamGeneration]:
    """The likeliest continuations of a prompt (text or token ids) that a search of this width finds, the best first; see `search`.

    A text ends with the end-of-text token, a stop string, `max_tokens` tokens or the end of the model's context. Raises UserError as `generate` does.
    """
    if not 1 <= beams <= MOST_BEAMS:
        raise UserError(f"beams must be from 1 to {MOST_BEAMS}, got {beams}.")
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, got {max_tokens}.")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise UserError("a stop string must not be empty. Leave it out, or give the text to stop at.")
    tokens = prompt_tokens(model, tokenizer, prompt)
    most = min(max_tokens, model.config.max_seq_len - len(tokens) + 1)
    started = time.perf_counter()
    rows = PagedRows(model, tokens, tokenizer.vocab_size, beams, most)
    ends = frozenset() if tokenizer.eot_id is None else frozenset({tokenizer.eot_id})

    def stopped(found: list[int]) -> bool:
        return bool(stop) and _stop_at(tokenizer.decode(found), stop) is not None

    results = search(
        rows, rows.first, beams=beams, max_tokens=most, end_tokens=ends, length_penalty=length_penalty, early_stopping=early_stopping, stopped=stopped
    )
    seconds = time.perf_counter() - started
    return [_generation(tokenizer, beam, stop, len(tokens), seconds) for beam in results]


def _stop_at(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string of a text begins."""
    return min((place for place in map(text.find, stop) if place >= 0), default=None)


def _generation(tokenizer: Any, beam: Beam, stop: Sequence[str], prompt_tokens: int, seconds: float) -> BeamGeneration:
    text = tokenizer.decode(beam.tokens)
    rate = len(beam.tokens) / seconds if seconds > 0 else 0.0
    return BeamGeneration(
        text[: _stop_at(text, stop)], beam.tokens, beam.finish_reason, prompt_tokens, seconds, rate, beam.score, beam.log_probability
    )
