"""Text from a model: continuations of one prompt, by the engine that serves many.

    for piece in stream(model, tokenizer, "def ", max_tokens=100):
        print(piece, end="", flush=True)
    best = generate(model, tokenizer, "def ", samples=3, seed=1)[0].text

The same seed gives the same text, sample i of a call does not depend on how many samples were asked for, and greedy
text (temperature 0) is the same with and without the cache. When the text outgrows the model's context, the model goes
on seeing its last half context (positions start anew, so the cache is filled again): with and without the cache alike.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cllm.config.sampling import Sampling
from cllm.generate.constraint import Constraint
from cllm.generate.continuation import Continuation
from cllm.generate.device_decoding import DeviceDecoding
from cllm.generate.engine import Engine
from cllm.generate.request import Request
from cllm.generate.sampler import Chosen, Sampler
from cllm.model.model import Model
from cllm.model.pages import page_bytes, pages_for
from cllm.runtime.errors import CLLMError, UserError

MOST_ROWS = 64  # samples that are decoded together; more of them follow as these end


@dataclass(frozen=True)
class Generation:
    """One continuation of the prompt."""

    text: str
    """The new text, without the prompt and without a stop string."""
    tokens: list[int]
    """Every token that was generated, those of a stop string included, the end-of-text token not."""
    finish_reason: str
    """"length" (max_tokens reached), "stop" (a stop string appeared) or "end" (the model wrote the end-of-text
    token)."""
    prompt_tokens: int
    """Number of prompt tokens that the model saw."""
    seconds: float
    """From the call to the end of this continuation, prefill included."""
    tokens_per_second: float
    """Generated tokens over seconds."""


def generate(
    model: Model,
    tokenizer: Any,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 200,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    samples: int = 1,
    use_cache: bool = True,
    truncate_prompt: bool = False,
    on_piece: Callable[[int, str], None] | None = None,
    constraint: Callable[[], Constraint] | None = None,
    engine: Engine | None = None,
    draft: Model | None = None,
    on_slide: Callable[[], None] | None = None,
    **sampling: Any,
) -> list[Generation]:
    """`samples` continuations of `prompt` (text or token ids), decoded together.

    `sampling` are the settings of `cllm.config.sampling.Sampling`: temperature, top_k, top_p, min_p, typical_p, the penalties and logit_bias. A
    prompt longer than the model's context is refused, or with `truncate_prompt` only its end is seen. `on_piece(sample, text)` is called as text
    becomes certain. `constraint` makes what each sample must keep to (`cllm.generate.constraint.compile_constraint`). An `engine` that is kept from
    call to call remembers the beginnings of earlier texts; by default each call has its own, in which a smaller `draft` model of the same tokenizer
    may guess tokens ahead: the text is the same. `on_slide()` is called when a text outgrows the model's context, so that from there on the model
    sees its last half context.

    Raises UserError for wrong settings, an empty prompt, or a tokenizer with more tokens than the model.
    """
    run = _Run(
        model,
        tokenizer,
        prompt,
        max_tokens,
        Sampling(**sampling),
        stop,
        seed,
        samples,
        use_cache,
        truncate_prompt,
        constraint,
        engine,
        draft,
        on_slide,
    )
    for index, piece in run.pieces():
        if on_piece is not None:
            on_piece(index, piece)
    return [run.result(continuation) for continuation in run.continuations]


def stream(
    model: Model,
    tokenizer: Any,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 200,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    use_cache: bool = True,
    truncate_prompt: bool = False,
    constraint: Callable[[], Constraint] | None = None,
    draft: Model | None = None,
    on_slide: Callable[[], None] | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """The text of `generate(..., samples=1)` piece by piece, as soon as it is certain: whole characters, never a part
    of a stop string.

    Wrong settings raise at the call, not at the first piece.
    """
    run = _Run(
        model, tokenizer, prompt, max_tokens, Sampling(**sampling), stop, seed, 1, use_cache, truncate_prompt, constraint, None, draft, on_slide
    )
    return (piece for _, piece in run.pieces())


def prompt_tokens(model: Model, tokenizer: Any, prompt: str | Sequence[int], truncate: bool = False) -> list[int]:
    """The tokens that the model sees of a prompt (text or token ids), at least one.

    Raises UserError for an empty prompt where nothing can start a text, for one that is longer than the model's context and not to be cut, for ids
    that the tokenizer does not have, and for a tokenizer with more tokens than the model.
    """
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {model.config.vocab_size}: "
            "they do not belong together. Use the tokenizer that the model was trained with."
        )
    tokens = list(tokenizer.encode(prompt)) if isinstance(prompt, str) else [int(token) for token in prompt]
    if not tokens and tokenizer.eot_id is not None:
        tokens = [tokenizer.eot_id]  # the start of a document follows the end of another
    if not tokens:
        raise UserError("the prompt is empty and the tokenizer has no end-of-text token to start from. Give at least one character.")
    if not all(0 <= token < tokenizer.vocab_size for token in tokens):
        raise UserError(f"the prompt holds token ids outside 0 to {tokenizer.vocab_size - 1}.")
    limit = model.config.max_seq_len
    if len(tokens) > limit and not truncate:
        raise UserError(
            f"the prompt has {len(tokens)} tokens, the model's context holds {limit}. "
            "Shorten it. (From Python, truncate_prompt=True lets the model see its end alone.)"
        )
    return tokens[-limit:]


class _Run:
    """One call of generate or stream: checked inputs, then the text of each sample as it grows."""

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        prompt: str | Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        stop: str | Sequence[str],
        seed: int,
        samples: int,
        use_cache: bool,
        truncate_prompt: bool,
        constraint: Callable[[], Constraint] | None,
        engine: Engine | None,
        draft: Model | None,
        on_slide: Callable[[], None] | None,
    ) -> None:
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop:
            raise UserError("a stop string must not be empty. Leave it out, or give the text to stop at.")
        if max_tokens < 1 or samples < 1:
            raise UserError(f"max_tokens and samples must be at least 1, got {max_tokens} and {samples}.")
        self.model, self.sampling, self.max_tokens, self.seed = model, sampling, max_tokens, seed
        self.use_cache, self.constraint, self.engine, self.draft, self.on_slide = use_cache, constraint, engine, draft, on_slide
        self.vocab_size = tokenizer.vocab_size
        self.eot = tokenizer.eot_id
        self.prompt = prompt_tokens(model, tokenizer, prompt, truncate_prompt)
        self.continuations = [Continuation(index, seed, tokenizer, stop) for index in range(samples)]

    def pieces(self) -> Iterator[tuple[int, str]]:
        """(sample, new text), in the order in which they are generated."""
        started = time.perf_counter()
        for index, piece in self._device_pieces() if self._runs_as_a_graph() else self._engine_pieces() if self.use_cache else self._slow_pieces():
            continuation = self.continuations[index]
            if continuation.finish_reason:
                continuation.seconds = time.perf_counter() - started
            if piece:
                yield index, piece
            if self.on_slide is not None and len(self.prompt) + len(continuation.tokens) > self.model.config.max_seq_len:
                if not continuation.finish_reason:
                    self.on_slide()
                    self.on_slide = None

    def result(self, continuation: Continuation) -> Generation:
        tokens, seconds = continuation.tokens, continuation.seconds
        rate = len(tokens) / seconds if seconds > 0 else 0.0
        return Generation(continuation.text, tokens, continuation.finish_reason, len(self.prompt), seconds, rate)

    def _runs_as_a_graph(self) -> bool:
        if not self.use_cache or not _computes_on_a_gpu(self.model):
            return False
        return self.constraint is None and self.draft is None and self.model.kv_cache is None

    def _engine_pieces(self) -> Iterator[tuple[int, str]]:
        told: list[tuple[int, str]] = []
        failure = ""

        def on_token(index: int, chosen: Chosen) -> bool:
            continuation = self.continuations[index]
            told.append((index, continuation.take(chosen.token)))
            return not continuation.stop.stopped

        def on_finish(index: int, reason: str) -> None:
            nonlocal failure
            failure = reason.partition(": ")[2] if reason.startswith(("error: ", "refused: ")) else failure
            told.append((index, self.continuations[index].end(reason)))

        engine = self._own_engine() if self.engine is None else self.engine
        engine.submit(
            Request(
                self.prompt, self.max_tokens, self.sampling, self.seed, len(self.continuations), constraint=self.constraint, slide=True,
                end_tokens=frozenset(() if self.eot is None else (self.eot,)), on_token=on_token, on_finish=on_finish,
            )
        )  # fmt: skip
        while engine.step():
            yield from told
            told.clear()
            if failure:
                raise CLLMError(failure)

    def _own_engine(self) -> Engine:
        """With room for these samples alone."""
        config, samples = self.model.config, len(self.continuations)
        rows = min(samples, MOST_ROWS)
        pages = rows * pages_for(min(config.max_seq_len, len(self.prompt) + self.max_tokens))
        memory = pages * page_bytes(config, self.model.cache_dtype)
        return Engine(self.model, vocab_size=self.vocab_size, memory=memory, most_rows=rows, most_waiting=samples, draft=self.draft)

    def _device_pieces(self) -> Iterator[tuple[int, str]]:
        """On a GPU: all samples together, one token after the other, as one CUDA graph."""
        state = DeviceDecoding(self.model, self.prompt, len(self.continuations), self.max_tokens, self.sampling, self.vocab_size)
        active = self.continuations
        while active:
            for continuation, token in zip(active, state.next_tokens(active), strict=True):
                yield continuation.index, continuation.add(token, self.eot, self.max_tokens)
            unfinished = [row for row, continuation in enumerate(active) if not continuation.finish_reason]
            if len(unfinished) < len(active):
                active = [active[row] for row in unfinished]
                state.select(unfinished)

    @torch.no_grad()
    def _slow_pieces(self) -> Iterator[tuple[int, str]]:
        """Each sample by itself, everything computed again for each token: a check."""
        limit = self.model.config.max_seq_len
        for continuation in self.continuations:
            constraint = None if self.constraint is None else self.constraint()
            sampler = Sampler(
                self.sampling, prompt=self.prompt, vocab_size=self.vocab_size, seed=self.seed, index=continuation.index, constraint=constraint
            )
            seen = list(self.prompt)
            while not continuation.finish_reason:
                if len(seen) > limit:
                    seen = seen[-max(1, limit // 2) :]
                logits = self.model(torch.tensor([seen], device=self.model.embedding_weight.device), last_only=True)[0, 0]
                seen.append(sampler.choose(logits.float().cpu().numpy()).token)
                piece = continuation.add(seen[-1], self.eot, self.max_tokens)
                if sampler.finished and not continuation.finish_reason:  # nothing can follow, so the model need not be asked
                    piece += continuation.end("end")
                elif sampler.finished and continuation.finish_reason == "length":
                    continuation.finish_reason = "end"
                yield continuation.index, piece


def _computes_on_a_gpu(model: Model) -> bool:
    return model.embedding_weight.device.type == "cuda"
