"""Conversations as tokens: chat templates in Jinja, as Hugging Face's, and what of a conversation is an answer.

    parts = render(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}])

Words in a message are never read as a special token: a user who writes "<|end|>" has written seven characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cllm.data.tokens.jinja import render
from cllm.runtime.errors import DataError, UserError

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
# For tokenizers made here, which have a token for each role.
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_NEEDED = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
Draw = Callable[[str, dict[str, Any]], str]  # (template, its variables) -> text; raises DataError
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode keeps them for a program's own use


class Part(NamedTuple):
    """A piece of a rendered conversation: its ids, and whether the assistant wrote it."""

    ids: list[int]
    is_answer: bool


def with_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a chat template: its own, or ours where it has the tokens for it; UserError otherwise."""
    if tokenizer.chat_template is not None:
        return tokenizer
    if not all(name in tokenizer.special_tokens for name in _NEEDED):
        raise UserError(
            f"this tokenizer has no chat template and lacks the tokens of ours ({', '.join(_NEEDED)}). "
            "Start from a model with a BPE tokenizer made here, or one whose tokenizer_config.json has a chat_template."
        )
    return tokenizer.with_chat_template(TEMPLATE)


def check_messages(messages: Any) -> list[dict[str, str]]:
    """The messages of one conversation, or a DataError that says what is wrong with them."""
    if not isinstance(messages, list) or not messages:
        raise DataError("messages must be a list that is not empty")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or message.get("role") not in ROLES:
            raise DataError(f"each message needs a role ({', '.join(ROLES)}) and its content as text")
    if messages[-1]["role"] != "assistant":
        raise DataError("the last message is not the assistant's, so there is nothing to learn after it")
    return messages


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> list[Part]:
    """A conversation cut where the assistant begins and ends, each piece encoded by itself, as it is when the model is asked.

    The template must write a conversation so that each further message only adds to it; DataError where it does not.
    """
    written = _renderer(tokenizer)
    parts, done = [], ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = written(messages[:number], True), written(messages[: number + 1], False)
        if not before.startswith(done) or not after.startswith(before):
            raise DataError("the chat template rewrites earlier messages when later ones come, so answers cannot be told apart")
        parts += [Part(encode_written(tokenizer, before[len(done) :]), False), Part(encode_written(tokenizer, after[len(before) :]), True)]
        done = after
    return parts


def encode_prompt(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]] = (), draw: Draw = render
) -> list[int]:  # fmt: skip
    """The ids after which the assistant answers. tools: functions that it may call, in OpenAI's form; draw: what renders the template."""
    return encode_written(tokenizer, _renderer(tokenizer, draw, tools)(messages, True))


def end_of_turn(tokenizer: Tokenizer, draw: Draw = render) -> str | None:
    """The special token that the template writes after an answer; None where there is none."""
    if tokenizer.chat_template is None or not tokenizer.special_tokens:
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    written = _renderer(tokenizer, draw)
    rest = written(messages, False)[len(written(messages[:1], True)) :].partition("b")[2]
    found = re.search("|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True))), rest)
    return None if found is None else found[0]


def _renderer(
    tokenizer: Tokenizer, draw: Draw = render, tools: Sequence[dict[str, Any]] = ()
) -> Callable[[Sequence[dict[str, Any]], bool], str]:  # fmt: skip
    """written(messages, ask for an answer) -> text in which names of special tokens that stood in a message are broken by a character that
    `encode_written` takes out again."""
    source = tokenizer.chat_template
    assert source is not None
    mark = _NONCHARACTERS[0]
    names = "|".join(re.escape(name) for name in sorted(tokenizer.special_tokens, key=len, reverse=True))

    def guarded(value: Any) -> Any:
        if isinstance(value, dict):
            return {guarded(key): guarded(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [guarded(each) for each in value]
        if not isinstance(value, str):
            return value
        text = value.replace(mark, "\ufffd")
        return re.sub(names, lambda found: found[0][0] + mark + found[0][1:], text) if names else text

    end = tokenizer.eot_token or ""
    called = guarded(tools) or None

    def written(some: Sequence[dict[str, Any]], ask: bool) -> str:
        variables = {"messages": guarded(some), "add_generation_prompt": ask, "bos_token": end, "eos_token": end, "tools": called}
        return draw(source, variables)

    return written


def encode_written(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text that a template wrote, its special tokens read as such; marks in names that stood in a message are taken out before."""
    mark = _NONCHARACTERS[0]
    names = "|".join(re.escape(name) for name in sorted(tokenizer.special_tokens, key=len, reverse=True))
    ids: list[int] = []
    for piece in re.split(f"({names})", text) if names else [text]:
        if piece:
            ids += [tokenizer.special_tokens[piece]] if piece in tokenizer.special_tokens else tokenizer.encode(piece.replace(mark, ""))
    return ids
