"""What of a conversation a model sees when it has grown longer than the model's context: the system message and the newest turns, whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cllm.data.tokens.chat_template import Draw, encode_prompt
from cllm.data.tokens.jinja import render
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer

Messages = Sequence[dict[str, str]]
Tools = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Seen:
    """The part of a conversation that a model sees, and what it takes from the context."""

    messages: list[dict[str, str]]
    tokens: list[int]
    turns_left_out: int  # a turn is what the user says and everything up to the next thing that the user says
    question_tokens_left_out: int  # from the beginning of the last question, where it alone is too long
    answer_room: int  # the most tokens of an answer for which the model goes on seeing all of it


def prompt_room(context: int, max_tokens: int) -> int:
    """The tokens of a prompt that leaves room for an answer of `max_tokens` tokens, or of half the context if that is less."""
    return context - min(max_tokens, context // 2)


def fit_to_context(
    tokenizer: Tokenizer, messages: Messages, context: int, max_tokens: int, *, tools: Tools = (), draw: Draw = render
) -> Seen:  # fmt: skip
    """The most of a conversation that leaves room for an answer of `max_tokens` tokens, or of half the context if that is less.

    The oldest turns go first, and the system messages at the beginning stay. Where the last question alone is too long, its end is kept. Raises
    UserError where the system messages leave no room for a question. tools, draw: as of `encode_prompt`.
    """
    room = prompt_room(context, max_tokens)
    system, turns = _turns(messages)
    for first in range(len(turns)):
        kept = [*system, *(message for turn in turns[first:] for message in turn)]
        tokens = encode_prompt(tokenizer, kept, tools=tools, draw=draw)
        if len(tokens) <= room:
            return Seen(kept, tokens, first, 0, context - len(tokens) + 1)
    return _with_end_of_question(tokenizer, system, turns, context, room, tools, draw)


def check_system(tokenizer: Tokenizer, system: Messages, context: int, *, tools: Tools = (), draw: Draw = render) -> None:
    """UserError where the system messages leave no room for a question and its answer."""
    fixed = len(encode_prompt(tokenizer, [*system, {"role": "user", "content": "?"}], tools=tools, draw=draw))
    if fixed > context // 2:
        raise UserError(
            f"the system message leaves no room: with the shortest question it has {fixed:,} tokens, and at most half of the model's context of "
            f"{context:,} tokens can be used for it. Shorten --system."
        )


def _turns(messages: Messages) -> tuple[list[dict[str, str]], list[list[dict[str, str]]]]:
    """The system messages at the beginning, and the rest in turns."""
    begin = next((number for number, message in enumerate(messages) if message["role"] != "system"), len(messages))
    turns: list[list[dict[str, str]]] = []
    for message in messages[begin:]:
        if not turns or message["role"] == "user":
            turns.append([])
        turns[-1].append(message)
    return list(messages[:begin]), turns


def _with_end_of_question(
    tokenizer: Tokenizer, system: list[dict[str, str]], turns: list[list[dict[str, str]]], context: int, room: int, tools: Tools, draw: Draw
) -> Seen:  # fmt: skip
    """The last turn alone, its first message cut until it fits."""
    question, *others = turns[-1]
    ids = tokenizer.encode(question["content"])
    keep = len(ids)
    tokens = encode_prompt(tokenizer, [*system, *turns[-1]], tools=tools, draw=draw)
    while len(tokens) > room:
        keep -= max(1, len(tokens) - room)
        if keep < 1:
            check_system(tokenizer, system, context, tools=tools, draw=draw)
            raise UserError(f"the chat template leaves no room for a question in the model's context of {context:,} tokens.")
        cut = {**question, "content": tokenizer.decode(ids[-keep:]).lstrip("\ufffd").lstrip()}
        tokens = encode_prompt(tokenizer, [*system, cut, *others], tools=tools, draw=draw)
    return Seen([*system, cut, *others], tokens, len(turns) - 1, len(ids) - keep, context - len(tokens) + 1)
