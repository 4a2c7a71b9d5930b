"""Between the engines, which one thread steps, and the clients, which an event loop serves."""

from __future__ import annotations

import asyncio
import json
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cllm import runtime
from cllm.config.sampling import Sampling
from cllm.generate.request import QueueFull, Request
from cllm.runtime.errors import UserError
from cllm.serve.constrained import constraint_for
from cllm.serve.errors import Refused
from cllm.serve.job import Job
from cllm.serve.metrics import Metrics
from cllm.serve.openai import ChatRequest, CompletionRequest, EmbeddingRequest, Form, Options
from cllm.serve.served import Prompt, Served
from cllm.serve.tools import call_schema

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer

COMPLETION_TOKENS = 200  # where max_tokens is not given, as in `cllm generate`
_IDLE = 0.25  # seconds between two looks at deadlines while there is nothing to compute


class Service:
    """The models by their ids, and the thread that computes.

    threads: of the kernels; None: all cores. deadline: seconds that one request may take.
    """

    def __init__(self, models: Sequence[Served], *, threads: int | None = None, deadline: float = 600.0) -> None:
        self.models: dict[str, Served] = {each.identity: each for each in models}
        self.metrics = Metrics()
        self.deadline = deadline
        self.is_draining = False
        self.failure = ""
        self._is_over = False
        self._threads = threads
        self._stepped = list(models)  # also those that were replaced and still have somebody to answer
        self._lock = threading.Lock()
        self._told: set[Job] = set()
        self._wake = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="cllm-engine", daemon=True)

    # -- for the server ------------------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begins to compute, for clients in this event loop."""
        self._loop = loop
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step that it is in; what is unfinished is not finished any more."""
        self.is_draining = self._is_over = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(30)
        for served in self._stepped:
            served.close()

    @property
    def is_alive(self) -> bool:
        """Whether answers go on."""
        return self._thread.is_alive() and not self._is_over and not self.failure

    @property
    def is_ready(self) -> bool:
        """Whether new requests are taken."""
        return self.is_alive and not self.is_draining

    def find(self, identity: str | None) -> Served:
        """The model of this id; the only one where no id is given. Raises Refused."""
        if identity is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if identity is None:
            raise Refused(400, f"model is missing: one of {', '.join(self.models)}.", param="model", code="missing_required_parameter")
        found = self.models.get(identity) or self.models.get(f"{identity}.cllm")
        if found is None:
            words = f"there is no model {identity[:100]!r} here. There is {', '.join(self.models)}."
            raise Refused(404, words, param="model", code="model_not_found")
        return found

    def replace(self, new: Served) -> None:
        """New requests get this version of a model; those that run are answered by the one that they began with."""
        with self._lock:
            self._stepped = [*self._stepped, new]
            self.models = self.models | {new.identity: new}
        self._wake.set()

    def remove(self, identity: str) -> None:
        """No new requests get this model; those that run are answered, and then its memory is free."""
        with self._lock:
            self.models = {name: served for name, served in self.models.items() if name != identity}
        self._wake.set()

    def is_busy(self, identity: str) -> bool:
        """Whether somebody is being answered by this model."""
        served = self.models.get(identity)
        if served is None:
            return False
        stats = served.engine.stats()
        return bool(served.users or stats.running or stats.waiting)

    def stats(self) -> list[Any]:
        return [each.engine.stats() for each in self._stepped]

    # -- requests: called in threads of the pool, because a prompt may be long ------------------------------------------

    def complete(self, asked: CompletionRequest, client: str) -> Job:
        """Begins to answer. Raises Refused."""
        options = asked.options
        most = COMPLETION_TOKENS if options.max_tokens is None else options.max_tokens
        with self._using(options.model) as served:
            prompts = [
                served.read_around(each, asked.suffix, most, asked.may_leave_out) if asked.suffix else served.read(each, asked.may_leave_out)
                for each in asked.prompts
            ]
            return self._submit(served, options, prompts, most, served.tokenizer, options.stop, client, echo=asked.echo)

    def chat(self, asked: ChatRequest, client: str) -> Job:
        """Begins to answer. Raises Refused."""
        options = asked.options
        with self._using(options.model) as served:
            must_call = bool(asked.must_call)
            prompt = served.read_chat(asked.messages, asked.tools, options.max_tokens, asked.may_leave_out, asked.begun, must_call)
            if must_call and served.call_form is not None:
                schema = call_schema(asked.must_call, served.call_form)
                options = replace(options, form=Form("json_schema", json.dumps(schema, ensure_ascii=False), "tools"))
            assert prompt.room is not None
            most = prompt.room if options.max_tokens is None else options.max_tokens
            stop = (*options.stop, *served.chat_stops)
            return self._submit(served, options, [prompt], most, served.answerer, stop, client, shows_special=bool(asked.tools))

    def embed(self, asked: EmbeddingRequest) -> tuple[Served, list[list[float]], int]:
        """(model, the mean of the last hidden states over the tokens of each input (inputs, E), tokens). Raises Refused."""
        with self._using(asked.model) as served:
            prompts = [served.read(each) for each in asked.inputs]
            vectors = [self._in_engine(served, partial(_mean_state, served, each.tokens)) for each in prompts]
            return served, vectors, sum(len(each.tokens) for each in prompts)

    def cancel(self, job: Job) -> None:
        """Ends what is unfinished of a request before the next step."""
        for ticket in job.tickets:
            job.served.engine.cancel(ticket)
        self._wake.set()

    @contextmanager
    def _using(self, identity: str | None) -> Iterator[Served]:
        """A model, which is not let go of meanwhile. Raises Refused."""
        if not self.is_ready:
            raise Refused(503, "the server is about to end." if not self.failure else f"the server has failed: {self.failure}.", code="unavailable")
        with self._lock:
            served = self.find(identity)
            served.users += 1
        try:
            yield served
        finally:
            with self._lock:
                served.users -= 1

    def _submit(
        self,
        served: Served,
        options: Options,
        prompts: list[Prompt],
        max_tokens: int,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        client: str,
        *,
        echo: bool = False,
        shows_special: bool = False,
    ) -> Job:
        if not all(token < tokenizer.vocab_size for token in options.stop_token_ids):
            words = f"stop_token_ids holds token ids outside 0 to {tokenizer.vocab_size - 1}."
            raise Refused(400, words, param="stop_token_ids", code="invalid_value")
        seed = random.getrandbits(62) if options.seed is None else options.seed
        constraint = None if options.form is None else constraint_for(options.form, tokenizer)
        job = Job(
            served, prompts, options.n, stop, seed=seed, streamed=options.stream, scored=options.logprobs is not None,
            min_tokens=options.min_tokens, keeps_nothing=max_tokens == 0, shows_special=shows_special, told=self._note,
        )  # fmt: skip
        end_tokens = {*options.stop_token_ids, *(() if tokenizer.eot_id is None else (tokenizer.eot_id,))}
        deadline = time.monotonic() + min(self.deadline, options.timeout or math.inf)
        try:
            sampling = Sampling(**options.sampling)
            for number, prompt in enumerate(prompts):
                request = Request(
                    prompt.tokens,
                    max_tokens=max(1, max_tokens if prompt.room is None else min(max_tokens, prompt.room)),
                    sampling=sampling,
                    seed=seed,
                    samples=options.n,
                    end_tokens=frozenset(end_tokens),
                    min_tokens=options.min_tokens,
                    logprobs=options.logprobs,
                    prompt_logprobs=echo and options.logprobs is not None,
                    constraint=constraint,
                    slide=prompt.room is None,
                    client=client,
                    deadline=deadline,
                    **job.callbacks(number),
                )
                job.tickets.append(served.engine.submit(request))
        except QueueFull as error:
            self.cancel(job)
            words = f"the server is busy: {error}"
            raise Refused(429, words, code="rate_limit_exceeded", headers={"Retry-After": str(math.ceil(error.retry_after))}) from None
        except UserError as error:
            self.cancel(job)
            raise Refused(400, str(error), code="invalid_value") from None
        self._wake.set()
        return job

    # -- the thread that computes --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with runtime.use(threads=self._threads), torch.no_grad():
                while not self._is_over:
                    self._wake.clear()
                    busy = [served.engine.step() for served in self._stepped]
                    self._tell()
                    if not any(busy):
                        self._retire()
                        self._wake.wait(_IDLE)
        except Exception as error:  # without its thread the server answers nothing, and says so
            self.failure = f"{type(error).__name__}: {error}"
            raise

    def _note(self, job: Job) -> None:
        self._told.add(job)

    def _tell(self) -> None:
        """Wakes the clients that have something to read: once for a step, because that costs the same for one and for many."""
        told, self._told = self._told, set()
        if told and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_wake_up, told)

    def _retire(self) -> None:
        """Lets go of models that were replaced and have answered everybody."""
        with self._lock:
            current = set(map(id, self.models.values()))
            kept = [each for each in self._stepped if id(each) in current or each.users or each.engine.stats().running or each.engine.stats().waiting]
            gone = [each for each in self._stepped if each not in kept]
            self._stepped = kept
        for each in gone:
            self.metrics.retire(each.engine.stats())
            each.close()

    def _in_engine(self, served: Served, function: Callable[[], Any]) -> Any:
        """What a function returns in the thread that computes, between two steps."""
        done = threading.Event()
        found: list[Any] = []

        def call() -> None:
            try:
                found.append(function())
            except Exception as error:
                found.append(error)
            done.set()

        served.engine.call(call)
        self._wake.set()
        while not done.wait(1.0):
            if not self.is_alive:
                raise Refused(503, "the server is about to end.", code="unavailable")
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]


def _wake_up(jobs: set[Job]) -> None:
    for job in jobs:
        job.changed.set()


def _mean_state(served: Served, tokens: list[int]) -> list[float]:
    device = served.model.embedding_weight.device
    states = served.model.hidden(torch.tensor([tokens], dtype=torch.int64, device=device))
    return states[0].float().mean(0).cpu().tolist()
