"""Text from a model: prefill the prompt, then decode one token at a time.

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
from torch import Tensor

from cllm.config.sampling import Sampling
from cllm.generate.constraint import Constraint
from cllm.generate.continuation import Continuation
from cllm.generate.device_decoding import DeviceDecoding
from cllm.generate.sampler import Sampler
from cllm.model.cache import KVCache
from cllm.model.model import Model
from cllm.runtime.errors import UserError


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


@torch.no_grad()
def prefill(model: Model, tokens: Tensor, cache: KVCache) -> Tensor:
    """tokens (B, T) into an empty cache -> logits (B, V) of the next token."""
    return model(tokens, cache=cache, last_only=True)[:, 0]


@torch.no_grad()
def decode_one(model: Model, tokens: Tensor, cache: KVCache) -> Tensor:
    """The newest tokens (B,) into the cache -> logits (B, V) of the next token."""
    return model(tokens[:, None], cache=cache, last_only=True)[:, 0]


@torch.no_grad()
def recompute(model: Model, tokens: Tensor) -> Tensor:
    """tokens (B, T), all again and no cache -> logits (B, V) of the next token."""
    return model(tokens, last_only=True)[:, 0]


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
    **sampling: Any,
) -> list[Generation]:
    """`samples` continuations of `prompt` (text or token ids), decoded together.

    `sampling` are the settings of `cllm.config.sampling.Sampling`: temperature, top_k, top_p, min_p, typical_p, the penalties and logit_bias. A
    prompt longer than the model's context is refused, or with `truncate_prompt` only its end is seen. `on_piece(sample, text)` is called as text
    becomes certain. `constraint` makes what each sample must keep to (`cllm.generate.constraint.compile_constraint`).

    Raises UserError for wrong settings, an empty prompt, or a tokenizer with more tokens than the model.
    """
    run = _Run(model, tokenizer, prompt, max_tokens, Sampling(**sampling), stop, seed, samples, use_cache, truncate_prompt, constraint)
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
    **sampling: Any,
) -> Iterator[str]:
    """The text of `generate(..., samples=1)` piece by piece, as soon as it is certain: whole characters, never a part
    of a stop string.

    Wrong settings raise at the call, not at the first piece.
    """
    run = _Run(model, tokenizer, prompt, max_tokens, Sampling(**sampling), stop, seed, 1, use_cache, truncate_prompt, constraint)
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
    """One call of generate or stream: checked inputs, then a loop of logits -> sample -> append over the unfinished
    samples."""

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
    ) -> None:
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop:
            raise UserError("a stop string must not be empty. Leave it out, or give the text to stop at.")
        if max_tokens < 1 or samples < 1:
            raise UserError(f"max_tokens and samples must be at least 1, got {max_tokens} and {samples}.")
        self.model = model
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.use_cache = use_cache
        self.vocab_size = tokenizer.vocab_size
        self.eot = tokenizer.eot_id
        self.prompt = prompt_tokens(model, tokenizer, prompt, truncate_prompt)
        self.continuations = [Continuation(index, seed, tokenizer, stop) for index in range(samples)]
        self.constraints = None if constraint is None else [constraint() for _ in range(samples)]
        self.samplers = [
            Sampler(
                sampling, prompt=self.prompt, vocab_size=self.vocab_size, seed=seed, index=index,
                constraint=None if self.constraints is None else self.constraints[index],
            )
            for index in range(samples)
        ]  # fmt: skip

    def pieces(self) -> Iterator[tuple[int, str]]:
        """(sample, new text), in the order in which they are generated."""
        started = time.perf_counter()
        state = self._state()
        active = self.continuations
        while active:
            for continuation, token in zip(active, state.next_tokens(active), strict=True):
                piece = continuation.add(token, self.eot, self.max_tokens)
                if self.constraints is not None and self.constraints[continuation.index].finished and not continuation.finish_reason:
                    piece += continuation.end("end")  # nothing can follow, so the model need not be asked
                if continuation.finish_reason:
                    continuation.seconds = time.perf_counter() - started
                if piece:
                    yield continuation.index, piece
            unfinished = [row for row, continuation in enumerate(active) if not continuation.finish_reason]
            if len(unfinished) < len(active):
                active = [active[row] for row in unfinished]
                state.select(unfinished)

    def result(self, continuation: Continuation) -> Generation:
        tokens, seconds = continuation.tokens, continuation.seconds
        rate = len(tokens) / seconds if seconds > 0 else 0.0
        return Generation(continuation.text, tokens, continuation.finish_reason, len(self.prompt), seconds, rate)

    def _state(self) -> "_HostDecoding | DeviceDecoding":
        if self.use_cache and self.constraints is None and _computes_on_a_gpu(self.model):
            return DeviceDecoding(self.model, self.prompt, len(self.continuations), self.max_tokens, self.sampling, self.vocab_size)
        return _HostDecoding(self.model, self.prompt, self.samplers, self.max_tokens, self.use_cache)


def _computes_on_a_gpu(model: Model) -> bool:
    return model.embedding_weight.device.type == "cuda"


class _HostDecoding:
    """Decoding in which the host chooses the tokens: what the model sees of each sample (equally many tokens), and the cache of it."""

    def __init__(self, model: Model, prompt: list[int], samplers: list[Sampler], max_tokens: int, use_cache: bool) -> None:
        self.model, self.samplers = model, samplers
        self.windows = [list(prompt) for _ in samplers]
        self.capacity = min(model.config.max_seq_len, len(prompt) + max_tokens)
        self.use_cache = use_cache
        self.cache: KVCache | None = None
        self.is_first = True

    def next_tokens(self, active: Sequence[Continuation]) -> list[int]:
        """One token for each unfinished sample."""
        tokens = []
        for row, logits in enumerate(self._next_logits().float().cpu()):
            tokens.append(self.samplers[active[row].index].choose(logits).token)
            self.windows[row].append(tokens[-1])
        return tokens

    def _next_logits(self) -> Tensor:
        """(rows, V) for the token after each window."""
        limit = self.model.config.max_seq_len
        if len(self.windows[0]) > limit:
            self.windows = [window[-max(1, limit // 2) :] for window in self.windows]
            self.cache = None
        if not self.use_cache:
            return recompute(self.model, self._tensor(self.windows))
        if self.cache is not None:
            newest = self._tensor([window[-1:] for window in self.windows])[:, 0]
            return decode_one(self.model, newest, self.cache)
        if self.is_first:  # all rows are the prompt: compute it once
            self.is_first = False
            self.cache = self.model.make_cache(1, self.capacity)
            logits = prefill(self.model, self._tensor(self.windows[:1]), self.cache)
            rows = [0] * len(self.windows)
            self.cache.select(rows)
            return logits[rows]
        self.cache = self.model.make_cache(len(self.windows), self.capacity)
        return prefill(self.model, self._tensor(self.windows), self.cache)

    def select(self, rows: list[int]) -> None:
        """Keeps the rows of unfinished samples."""
        self.windows = [self.windows[row] for row in rows]
        if self.cache is not None and rows:
            self.cache.select(rows)

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.model.embedding_weight.device)
