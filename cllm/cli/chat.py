"""`cllm chat`: a conversation, line by line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from cllm.data.tokens.chat_template import encode_prompt, end_of_turn
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.cli.console import Console
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model


def converse(console: Console, model: Model, tokenizer: Tokenizer, lines: Iterable[str], system: str | None, **options: Any) -> list[dict[str, str]]:
    """Answers each line and returns the whole conversation; options as in `cllm.generate.decoding`. UserError for a model without a chat template."""
    from cllm.generate.decoding import stream

    if tokenizer.chat_template is None:
        raise UserError("this model has no chat template: it was not taught to chat. Teach it with: cllm train CHATS.jsonl --from MODEL")
    end = end_of_turn(tokenizer)
    speaker = tokenizer if end is None else tokenizer.with_end(end)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for line in lines:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        answer = ""
        for piece in stream(model, speaker, encode_prompt(tokenizer, messages), truncate_prompt=True, **options):
            console.print(piece, end="")
            answer += piece
        console.print()
        messages.append({"role": "assistant", "content": answer})
    return messages
