"""Continuous batching: requests join and leave at every step, and each gets the tokens that it would get alone.

    engine = Engine(model, vocab_size=tokenizer.vocab_size)
    engine.submit(Request(prompt, max_tokens=100, on_token=..., on_finish=...))
    while engine.step():
        pass

A step takes the newest token of every running sequence, with guesses of the next ones, and beside them a part of the prompts that are still to be
read, so that a long prompt stalls nobody (Agrawal et al. 2023, SARATHI, arXiv 2308.16369). Keys and values lie in pages whose number is fixed at
the start. A sequence is admitted when the pages of its longest possible answer are free, so that nothing that runs is ever put back.

`submit`, `cancel` and `stats` may be called from any thread; `step` from one at a time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cllm.generate.draft_model import DraftModel, DraftText, Wanted
from cllm.generate.drafts import Drafts
from cllm.generate.prefixes import Prefixes
from cllm.generate.request import QueueFull, Request, Row, Stats, Ticket
from cllm.generate.sampler import score
from cllm.model.pages import PAGE, Part, page_bytes, pages_for
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.model.model import Model

BUSY_CHUNK = 128  # tokens in a step beside running answers for each prompt that is being read: more of them would make those answers wait
_RATE_OVER = 32  # finished answers that the rate is measured over


class Engine:
    """Continuations for many requests at once, of one model.

    vocab_size: the tokenizer's. memory: bytes for keys and values, by default what `most_rows` answers of full length take, at most a quarter of
    the free memory. most_rows: the most samples that run at once. chunk: the most prompt tokens in a step while no answer is being written.
    most_waiting: the most samples that wait. draft: a smaller model of the same tokenizer that guesses where a text does not repeat itself; its keys
    and values take as many pages as those of the model. `Model.kv_cache` says whether pages hold numbers of the compute dtype or int8. Raises
    UserError where the memory does not hold one page.
    """

    def __init__(
        self, model: Model, *, vocab_size: int, memory: int | None = None, most_rows: int = 64, chunk: int = 256, most_waiting: int = 256,
        draft: Model | None = None,
    ) -> None:  # fmt: skip
        self.model, self.vocab_size = model, vocab_size
        self.most_rows, self.chunk, self.most_waiting = most_rows, chunk, most_waiting
        self.limit = model.config.max_seq_len
        size = page_bytes(model.config, model.cache_dtype)
        if memory is None:
            memory = min(most_rows * pages_for(self.limit) * size, max(size * pages_for(self.limit), _free_memory(model) // 4))
        if memory < size:
            raise UserError(f"{memory:,} bytes for keys and values do not hold one page of {PAGE} tokens, which takes {size:,} bytes.")
        self.pool = model.make_pool(memory // size)
        self.prefixes = Prefixes(self.pool)
        self.draft = None if draft is None else DraftModel(draft, vocab_size, self.pool.num_pages)
        self._running: list[Row] = []
        self._waiting: dict[str, deque[Row]] = {}  # by client; the one whose turn it is first
        self._calls: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._work = threading.Event()
        self._finished_at: deque[float] = deque(maxlen=_RATE_OVER)
        self._steps = self._tokens_in = self._tokens_out = self._prefix_hits = self._guessed = self._guessed_right = 0

    # -- from any thread -----------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Ticket:
        """Puts a request into the queue. UserError where it can never be served, QueueFull where too many wait."""
        if not request.prompt:
            raise UserError("the prompt is empty. Give at least one token.")
        if not all(0 <= token < self.vocab_size for token in request.prompt):
            raise UserError(f"the prompt holds token ids outside 0 to {self.vocab_size - 1}.")
        if len(request.prompt) > self.limit:
            raise UserError(f"the prompt has {len(request.prompt)} tokens, the model's context holds {self.limit}. Shorten it.")
        if request.max_tokens < 1 or request.samples < 1:
            raise UserError(f"max_tokens and samples must be at least 1, got {request.max_tokens} and {request.samples}.")
        pages = pages_for(min(self.limit, len(request.prompt) + request.max_tokens))
        if pages > self.pool.num_pages:
            raise UserError(
                f"the prompt and {request.max_tokens} tokens more need {pages} pages of keys and values, the memory for them holds "
                f"{self.pool.num_pages}. Ask for fewer tokens, or start with more memory."
            )
        ticket = Ticket(request)
        ticket.rows = [Row(ticket, index, self.vocab_size, pages) for index in range(request.samples)]
        with self._lock:
            waiting = self._num_waiting()
            if waiting + request.samples > max(self.most_waiting, request.samples):
                raise QueueFull(waiting, self._retry_after(waiting))
            self._waiting.setdefault(request.client, deque()).extend(ticket.rows)
        self._work.set()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends what is unfinished of a request before the next step."""
        ticket.cancelled = True
        self._work.set()

    def call(self, function: Callable[[], None]) -> None:
        """Runs a function in the engine's thread before the next step: the model serves one thread at a time."""
        self._calls.append(function)
        self._work.set()

    def wait(self, seconds: float) -> bool:
        """Sleeps until there is work, at most so long; whether there is."""
        return self._work.wait(seconds)

    def stats(self) -> Stats:
        with self._lock:
            waiting = self._num_waiting()
        return Stats(
            len(self._running), waiting, self.pool.num_pages - self.pool.num_free, self.pool.num_pages, self._steps, self._tokens_in,
            self._tokens_out, self._prefix_hits, self._guessed, self._guessed_right,
        )  # fmt: skip

    # -- the loop ------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One step of everything that runs; False where there was nothing to do."""
        self._work.clear()
        while self._calls:
            self._calls.popleft()()
        self._end_what_is_over()
        self._admit()
        if not self._running:
            return False
        self._work.set()
        with self.model.torch_aside():
            self._guess()
            rows, parts = self._parts()
            try:
                logits = self.model.step(self.pool, parts)
            except Exception as error:
                for row in rows:
                    self._finish(row, f"error: {error}")
                return True
            self._steps += 1
            self._use(rows, parts, logits[:, : self.vocab_size].float().cpu().numpy())
        return True

    def _end_what_is_over(self) -> None:
        now = time.monotonic()
        with self._lock:
            waiting = [row for rows in self._waiting.values() for row in rows]
        for row in (*self._running, *waiting):
            if row.ticket.cancelled:
                self._finish(row, "cancelled")
            elif row.request.deadline is not None and now >= row.request.deadline:
                self._finish(row, "deadline")

    def _parts(self) -> tuple[list[Row], list[Part]]:
        """What every running row adds to this step: answers one token and guesses, prompts some of what is left of them, the first come first."""
        reading = sum(row.pending > 1 for row in self._running)
        room = min(self.chunk, BUSY_CHUNK * reading) if reading < len(self._running) else self.chunk
        rows, parts = [], []
        for row in self._running:
            count = 1
            if row.pending > 1:
                count = min(row.pending, room)
                room -= count
            if not count:
                continue
            end = row.stored + count
            tokens = row.context[row.stored : end] + row.guesses
            wanted = 1 + len(row.guesses) if end == len(row.context) else 0
            if row.scored < end and row.request.prompt_logprobs:
                wanted = len(tokens)
            while len(row.pages) < pages_for(end + len(row.guesses)):
                row.pages.append(self._take_page())
            rows.append(row)
            parts.append(Part(tokens, row.stored, row.pages, wanted))
        return rows, parts

    def _guess(self) -> None:
        """The guesses of every row whose answer is being written: from its own text, else of the draft model."""
        asked: list[tuple[Row, Wanted]] = []
        for row in self._running:
            row.guesses = []
            if row.drafts is None or not row.produced or row.pending > 1:
                continue
            # The last token of an answer is never stored, and nothing is stored behind the context or the row's pages.
            room = min(row.request.max_tokens - row.produced - 1, self.limit - len(row.context))
            row.guesses, row.trust = row.drafts.guess(row.context, room), row.drafts.trust
            if not row.guesses:
                asked.append((row, Wanted(row.drafted, row.context, room)))
        if self.draft is not None and asked:
            for (row, _), guesses in zip(asked, self.draft.guess([wanted for _, wanted in asked])):
                row.guesses, row.trust = guesses, row.drafted.trust

    def _use(self, rows: Sequence[Row], parts: Sequence[Part], logits: np.ndarray) -> None:
        """Chooses tokens from the logits (W, V) float32 of a step; what was guessed right is stored already."""
        at = 0
        for row, part in zip(rows, parts):
            own = logits[at : at + part.wanted]
            at += part.wanted
            given = len(part.tokens) - len(row.guesses)
            row.stored += given
            if not row.produced:
                self._tokens_in += given
            if row.request.prompt_logprobs:
                self._score_prompt(row, part, own)
            if row.stored < len(row.context):
                continue
            if not row.produced:
                self.prefixes.add(row.context, row.pages)
            right = 0
            for place, each in enumerate(own[len(own) - len(row.guesses) - 1 :]):
                token = self._choose(row, each)
                if row.finish_reason or place == len(row.guesses) or token != row.guesses[place]:
                    break
                right += 1
                row.stored += 1
            row.trust.learn(len(row.guesses), right)
            self._guessed += len(row.guesses)
            self._guessed_right += right
            if not row.finish_reason and len(row.context) > self.limit:
                self._slide(row)

    def _choose(self, row: Row, logits: np.ndarray) -> int:
        """The next token of a row, told to whoever asked for it. -1 where none can be chosen."""
        try:
            chosen = row.sampler.choose(logits)
            row.produced += 1
            self._tokens_out += 1
            if chosen.token in row.request.end_tokens:
                self._finish(row, "end")
                return chosen.token
            row.context.append(chosen.token)
            if not row.request.on_token(row.index, chosen):
                self._finish(row, "stop")
            elif row.sampler.finished:
                self._finish(row, "end")
            elif row.produced == row.request.max_tokens or (len(row.context) > self.limit and not row.request.slide):
                self._finish(row, "length")
            return chosen.token
        except UserError as error:  # what was asked for turns out to be impossible
            self._finish(row, f"refused: {error}")
            return -1
        except Exception as error:
            self._finish(row, f"error: {error}")
            return -1

    def _score_prompt(self, row: Row, part: Part, logits: np.ndarray) -> None:
        for place in range(part.wanted):
            token = part.start + len(part.tokens) - part.wanted + place + 1
            if row.scored == token < len(row.request.prompt):
                row.scored += 1
                if row.index == 0:
                    row.request.on_prompt_token(score(logits[place], row.request.prompt[token], row.request.logprobs or 0))

    def _slide(self, row: Row) -> None:
        """The text has outgrown the context: the row goes on as if its last half were the prompt, positions and pages anew.

        Some of its pages may stay with others, so it gives all back and waits, as the first, until as many as it may need are free again.
        """
        self._running.remove(row)
        for page in row.pages:
            self.pool.release(page)
        row.pages, row.stored = [], 0
        row.context = row.context[-max(1, self.limit // 2) :]
        row.drafts = Drafts() if row.request.speculate else None
        self._forget_draft(row)
        client = row.request.client
        with self._lock:
            self._waiting = {client: deque([row, *self._waiting.pop(client, ())]), **self._waiting}

    # -- the queue and the pages ---------------------------------------------------------------------------------------

    def _num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def _retry_after(self, waiting: int) -> float:
        """Seconds until a place is likely to be free, by the rate at which answers ended."""
        if len(self._finished_at) < 2:
            return 1.0
        rate = (len(self._finished_at) - 1) / max(1e-3, time.monotonic() - self._finished_at[0])
        return min(60.0, max(1.0, (waiting + len(self._running) - self.most_rows + 1) / rate))

    def _admit(self) -> None:
        """Lets waiting rows run while rows and pages last, the clients in turn. Whose turn it is waits until it fits, so that nobody starves."""
        while len(self._running) < self.most_rows:
            with self._lock:
                client = next((name for name, rows in self._waiting.items() if self._may_begin(rows[0])), None)
                row = None if client is None else self._waiting[client][0]
            if row is None or client is None or not self._reserve(row):
                return
            self._running.append(row)
            with self._lock:
                rows = self._waiting.pop(client)
                rows.remove(row)
                if rows:
                    self._waiting[client] = rows  # behind the others

    def _may_begin(self, row: Row) -> bool:
        """The prompt of several samples is computed by the first of them; the others find it in its pages."""
        first = row.ticket.rows[0]
        return row is first or row.produced > 0 or bool(first.produced or first.finish_reason)

    def _reserve(self, row: Row) -> bool:
        """Whether all pages that the row may ever need are there; then it has those of the beginning that others computed."""
        reuse = row.produced or not (row.request.prompt_logprobs and row.index == 0)
        pages, source, copied = self.prefixes.find(row.context[:-1] if reuse else ())  # the last token is computed again, for its logits
        needed = row.most_pages - len(pages) + sum(each.most_pages - len(each.pages) for each in self._running)
        if needed > self.pool.num_free + (0 if needed <= self.pool.num_free else self.prefixes.num_evictable()):
            for page in pages:
                self.pool.release(page)
            return False
        row.pages, row.stored = pages, len(pages) * PAGE
        if source is not None and self.pool.num_free:
            row.pages.append(self.pool.take())
            self.pool.copy(source, row.pages[-1], copied)
            row.stored += copied
        if not row.produced:
            self._prefix_hits += row.stored
            if row.index == 0:
                row.ticket.reused = row.stored
        return True

    def _take_page(self) -> int:
        if not self.pool.num_free:
            self.prefixes.evict(max(1, self.pool.num_pages // 64))
        return self.pool.take()

    def _forget_draft(self, row: Row) -> None:
        if self.draft is not None:
            self.draft.release(row.drafted)
        row.drafted = DraftText()

    def _finish(self, row: Row, reason: str) -> None:
        """Ends a row: its pages stay as long as nobody needs them, for whoever begins with the same text."""
        row.finish_reason = reason
        if row in self._running:
            self._running.remove(row)
            if row.stored and not reason.startswith(("error", "refused")):
                self.prefixes.add(row.context[: row.stored], row.pages)
            for page in row.pages:
                self.pool.release(page)
            row.pages = []
            self._forget_draft(row)
            self._finished_at.append(time.monotonic())
        else:
            with self._lock:
                rows = self._waiting.get(row.request.client, deque())
                if row in rows:
                    rows.remove(row)
                if not rows:
                    self._waiting.pop(row.request.client, None)
        try:
            row.request.on_finish(row.index, reason)
        except Exception:  # whoever asked is gone; the others go on
            pass


def _free_memory(model: Model) -> int:
    from cllm.runtime.device import free_memory

    return free_memory(model.embedding_weight.device)
