"""`cllm chat`: a model answers line by line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cllm.cli.console import Console, open_console, standard_input
from cllm.cli.generate import MaxTokens, Seed
from cllm.cli.options import (
    Checkpoint,
    Context,
    Device,
    Draft,
    Json,
    KvCache,
    Stretch,
    Threads,
    Weights,
    check_model,
    examples,
    load_draft,
    load_model,
    read_settings,
    text_option,
    with_settings,
)
from cllm.config.sampling import SAMPLING
from cllm.runtime.errors import UserError
from cllm.runtime.progress import say
from cllm.shell import command

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.generate.chat_context import Seen
    from cllm.generate.engine import Engine
    from cllm.model.model import Model

CHAT_SAMPLING = SAMPLING | {"temperature": replace(SAMPLING["temperature"], default=0.7)}

app = typer.Typer()


@app.command(epilog=examples("cllm chat runs/helper", "cllm chat runs/helper --system 'Answer in one sentence.'"))
@with_settings(CHAT_SAMPLING)
def chat(
    checkpoint: Checkpoint,
    system: Annotated[str | None, text_option("--system", "System message, which the model sees before the conversation.")] = None,
    max_tokens: MaxTokens = 200,
    seed: Seed = 0,
    context: Context = None,
    stretch: Stretch = None,
    weights: Weights = None,
    kv_cache: KvCache = None,
    draft: Draft = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Talk with a model that was trained on chats. Each line of standard input gets an answer, until the input ends (Ctrl-D)."""
    console = open_console(as_json)
    options = {"max_tokens": max_tokens, "seed": seed, **read_settings(CHAT_SAMPLING, settings)}
    check_model(checkpoint)
    from cllm import runtime

    with runtime.use(threads=threads):
        model, tokenizer = load_model(
            checkpoint, weights=weights, device=device, generating=True, context=context, stretch=stretch, kv_cache=kv_cache
        )
        guesser = load_draft(draft, tokenizer, weights, device, kv_cache)
        talk = converse(console, model, tokenizer, standard_input(), system, draft=guesser, **options)
    console.result(talk.to_dict())


@dataclass
class Talk:
    """A conversation, and for each answer what of it the model saw."""

    messages: list[dict[str, str]]
    seen: list[Seen] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        answers = [
            {
                "prompt_tokens": len(each.tokens),
                "turns_left_out": each.turns_left_out,
                "question_tokens_left_out": each.question_tokens_left_out,
                "finish_reason": reason,
            }
            for each, reason in zip(self.seen, self.finish_reasons)
        ]
        return {"messages": self.messages, "answers": answers, "last_prompt": self.seen[-1].messages if self.seen else []}


def converse(
    console: Console, model: Model, tokenizer: Tokenizer, lines: Iterable[str], system: str | None, *, draft: Model | None = None,
    max_tokens: int = 200, **options: Any,
) -> Talk:  # fmt: skip
    """Answers each line; draft: a model that guesses tokens ahead; options as in `cllm.generate.decoding`. What the model no longer sees of the
    conversation is told once.

    Raises UserError for a model without a chat template, and for a system message that leaves no room in the model's context.
    """
    from cllm.data.tokens.chat_template import end_of_turn
    from cllm.generate.chat_context import check_system, fit_to_context
    from cllm.generate.decoding import generate

    if tokenizer.chat_template is None:
        taught = command("train", "CHATS.jsonl", "--from", "MODEL")
        raise UserError(
            f"this model has no chat template: it was not taught to chat, and goes on with a text instead (cllm generate). Teach it with: {taught}"
        )
    context = model.config.max_seq_len
    end = end_of_turn(tokenizer)
    speaker = tokenizer if end is None else tokenizer.with_end(end)
    talk = Talk([] if system is None else [{"role": "system", "content": system}])
    check_system(tokenizer, talk.messages, context)
    told: set[str] = set()
    by_graph = model.embedding_weight.device.type == "cuda" and draft is None and model.kv_cache is None
    engine = None if by_graph else _engine_of(model, tokenizer, draft)
    for line in lines:
        if not line.strip():
            continue
        talk.messages.append({"role": "user", "content": line.strip()})
        seen = fit_to_context(tokenizer, talk.messages, context, max_tokens)
        _tell_left_out(seen, context, told)
        most = min(max_tokens, seen.answer_room)
        answer = generate(model, speaker, seen.tokens, max_tokens=most, engine=engine, on_piece=lambda _, piece: console.write(piece), **options)[0]
        console.print()
        if answer.finish_reason == "length" and most < max_tokens and "room" not in told:
            told.add("room")
            say(f"The answer ends here because the model's context of {context:,} tokens is full.")
        talk.messages.append({"role": "assistant", "content": answer.text})
        talk.seen.append(seen)
        talk.finish_reasons.append(answer.finish_reason)
    return talk


def _engine_of(model: Model, tokenizer: Tokenizer, draft: Model | None) -> Engine:
    """One that remembers the conversation, so that each answer computes only what is new in it."""
    from cllm.generate.engine import Engine
    from cllm.model.pages import page_bytes, pages_for

    pages = 2 * pages_for(model.config.max_seq_len)
    return Engine(model, vocab_size=tokenizer.vocab_size, memory=pages * page_bytes(model.config, model.cache_dtype), most_rows=1, draft=draft)


def _tell_left_out(seen: Seen, context: int, told: set[str]) -> None:
    """Says what the model does not see, each kind once in a conversation; a question that is cut, each time."""
    if seen.turns_left_out and "turns" not in told:
        told.add("turns")
        count = seen.turns_left_out
        turns = "turn no longer fits" if count == 1 else f"{count} turns no longer fit"
        stays = ", and the system message stays" if seen.messages[0]["role"] == "system" else ""
        say(f"The first {turns} in the model's context of {context:,} tokens. From here on the oldest turns are left out{stays}.")
    if seen.question_tokens_left_out:
        say(
            f"The question is too long for the model's context of {context:,} tokens: "
            f"its first {seen.question_tokens_left_out:,} tokens are left out, and its end is kept."
        )
