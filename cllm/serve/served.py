"""A model that is served: its engine, its words for tokens, and how it reads a conversation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from cllm.config.sampling import Sampling
from cllm.data.tokens.chat_template import encode_prompt, encode_written, end_of_turn
from cllm.data.tokens.fim import fim_prompt
from cllm.generate.chat_context import fit_to_context, prompt_room
from cllm.generate.request import Request
from cllm.runtime.errors import DataError, UserError
from cllm.serve.errors import Refused
from cllm.serve.templates import PLAIN, PLAIN_STOP, TemplateProcess
from cllm.serve.tools import CallForm, call_form

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.generate.engine import Engine
    from cllm.model.model import Model


class Prompt(NamedTuple):
    """Tokens to go on from, and the text that they are. room: the most tokens of an answer; None: any number, seen through a sliding window."""

    tokens: list[int]
    text: str
    room: int | None = None


class Served:
    """One version of a model under its id. Raises UserError where model and tokenizer do not belong together."""

    def __init__(self, identity: str, model: Model, tokenizer: Tokenizer, engine: Engine) -> None:
        self.identity, self.model, self.tokenizer, self.engine = identity, model, tokenizer, engine
        self.created = int(time.time())
        self.context = model.config.max_seq_len
        self.users = 0  # requests on their way to the engine
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(f"{identity}: the tokenizer has {tokenizer.vocab_size} tokens but the model only {model.config.vocab_size}.")
        self._templates = TemplateProcess()
        self.has_template = tokenizer.chat_template is not None
        self.speaker = tokenizer if self.has_template else tokenizer.with_chat_template(PLAIN)

    @cached_property
    def answerer(self) -> Tokenizer:
        """The tokenizer whose end is that of an answer in a conversation: what the template writes behind one."""
        name = end_of_turn(self.speaker, self._templates.draw) if self.has_template else None
        return self.tokenizer if name is None else self.tokenizer.with_end(name)

    @property
    def chat_stops(self) -> tuple[str, ...]:
        return () if self.has_template else (PLAIN_STOP,)

    @cached_property
    def call_form(self) -> CallForm | None:
        """How the template writes a call of a tool; None where it has no place for tools."""
        source = self.tokenizer.chat_template
        if source is None or "tools" not in source:
            return None
        return call_form(lambda messages, ask: self._templates.draw(source, {"messages": messages, "add_generation_prompt": ask}))

    def warm_up(self) -> None:
        """Computes a few tokens, so that no client waits for kernels to be compiled. Before anybody else uses the engine."""
        for sampling in (Sampling(temperature=0.0), Sampling()):
            self.engine.submit(Request([0] * min(40, self.context), max_tokens=2, sampling=sampling, samples=2, speculate=False))
        while self.engine.step():
            pass
        _ = self.answerer, self.call_form

    def close(self) -> None:
        self._templates.close()

    def read(self, prompt: str | Sequence[int], may_leave_out: bool = False) -> Prompt:
        """Tokens of a text, or checked ones; with `may_leave_out` the last ones that the context holds. Raises Refused."""
        if isinstance(prompt, str):
            if may_leave_out:
                prompt = prompt[-self.context * self._longest_token :]  # no token is longer, so nothing that is read is lost
            self._check_length(prompt, "prompt")
            tokens, text = self._encode(prompt), prompt
        else:
            tokens = self._checked(prompt)
            text = self.tokenizer.decode(tokens[: self.context])
        if not tokens:
            if self.tokenizer.eot_id is None:
                words = "prompt is empty, and the tokenizer has no end-of-text token to start from. Give at least one character."
                raise Refused(400, words, param="prompt", code="invalid_value")
            tokens = [self.tokenizer.eot_id]  # the start of a document follows the end of another
        if may_leave_out and len(tokens) > self.context:
            tokens = tokens[-self.context :]
            text = self.tokenizer.decode(tokens)
        self._check_tokens(len(tokens), "prompt")
        return Prompt(tokens, text)

    def read_around(self, prefix: str | Sequence[int], suffix: str, max_tokens: int, may_leave_out: bool = False) -> Prompt:
        """The tokens after which the text between two others is written; with `may_leave_out` those next to it that the context holds beside the
        answer. Raises Refused."""
        longest = self.context * self._longest_token  # characters that a context holds at most
        if may_leave_out:
            prefix, suffix = prefix[-longest:], suffix[:longest]
        self._check_length(suffix, "suffix")
        if isinstance(prefix, str):
            self._check_length(prefix, "prompt")
            before = self._encode(prefix)
        else:
            before = self._checked(prefix)
        after = self._encode(suffix, "suffix")
        try:
            tokens = fim_prompt(self.tokenizer, before, after, prompt_room(self.context, max_tokens) if may_leave_out else None)
        except UserError as error:
            raise Refused(400, str(error), param="suffix", code="unsupported_value") from None
        self._check_tokens(len(tokens), "prompt with suffix")
        return Prompt(tokens, "", self.context - len(tokens) + 1)

    def read_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        max_tokens: int | None,
        may_leave_out: bool,
        begun: str = "",
        begins_call: bool = False,
    ) -> Prompt:
        """The tokens after which the assistant answers, or goes on with the answer that has begun, or with a call of a tool. Raises Refused."""
        if tools and self.call_form is None:
            raise Refused(
                400, f"the chat template of {self.identity!r} has no place for tools. Leave tools out.", param="tools", code="unsupported_value"
            )
        self._check_length("".join([begun, *(message["content"] for message in messages)]), "messages", may_leave_out)
        begins = self._encode(begun) if begun else []
        if begins_call and self.call_form is not None:
            begins += encode_written(self.speaker, self.call_form.opening)
        try:
            if may_leave_out and len(begins) < self.context:
                context = self.context - len(begins)
                most = context if max_tokens is None else max_tokens
                seen = fit_to_context(self.speaker, messages, context, most, tools=tools, draw=self._templates.draw)
                return Prompt(seen.tokens + begins, "", seen.answer_room)
            tokens = encode_prompt(self.speaker, messages, tools=tools, draw=self._templates.draw)
        except (UserError, DataError) as error:
            raise Refused(400, str(error), param="messages", code="invalid_value") from None
        if not tokens:
            raise Refused(400, "the chat template makes no text of this conversation.", param="messages", code="invalid_value")
        tokens = tokens + begins
        self._check_tokens(len(tokens), "messages")
        return Prompt(tokens, "", self.context - len(tokens) + 1)

    def tokenize(self, text: str) -> list[int]:
        return self._encode(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        if not all(0 <= token < self.tokenizer.vocab_size for token in tokens):
            raise Refused(400, f"tokens holds ids outside 0 to {self.tokenizer.vocab_size - 1}.", param="tokens", code="invalid_value")
        return self.tokenizer.decode(tokens, skip_special=False)

    def _encode(self, text: str, param: str = "prompt") -> list[int]:
        try:
            return self.tokenizer.encode(text)
        except UserError as error:
            raise Refused(400, str(error), param=param, code="invalid_value") from None

    def _checked(self, prompt: Sequence[int]) -> list[int]:
        if not all(0 <= token < self.tokenizer.vocab_size for token in prompt):
            raise Refused(400, f"prompt holds token ids outside 0 to {self.tokenizer.vocab_size - 1}.", param="prompt", code="invalid_value")
        return list(prompt)

    @cached_property
    def _longest_token(self) -> int:
        return max(1, int(self.tokenizer.byte_lengths.max()))

    def _check_length(self, text: str, param: str, may_leave_out: bool = False) -> None:
        """A text that no choice of tokens could bring into the context is refused before any work on it."""
        least = -(-len(text) // self._longest_token)
        if least > self.context * (16 if may_leave_out else 1):
            raise self._too_long(f"at least {least:,}", param)

    def _check_tokens(self, count: int, param: str) -> None:
        if count > self.context:
            raise self._too_long(f"{count:,}", param)

    def _too_long(self, count: str, param: str) -> Refused:
        words = f"the context of {self.identity!r} holds {self.context:,} tokens, and {param} has {count}. Shorten it."
        return Refused(400, words, param=param, code="context_length_exceeded")
