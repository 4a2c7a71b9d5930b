"""Replies of OpenAI's API: from what the engine gave to JSON objects and server-sent events. Pure functions.

Chats and completions differ in nearly every field, log-probabilities included, so each has its own functions under equal names.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

DONE = b"data: [DONE]\n\n"
_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's clients know this number for a token that cannot be drawn


class TokenShown(NamedTuple):
    """A token with its bytes, its log-probability (None: not defined, as of a prompt's first token), and the likeliest tokens in its place."""

    content: bytes
    logprob: float | None
    top: Sequence[tuple[bytes, float]] = ()


@dataclass
class Usage:
    """Tokens of one request: each prompt once, the tokens of all answers."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass
class Answer:
    """One finished answer. finish_reason: "stop", "length" or "tool_calls"."""

    index: int
    text: str
    finish_reason: str
    tokens: list[TokenShown] | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


def completion_reply(identity: str, created: int, model: str, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
    choices = [
        {
            "index": each.index,
            "text": each.text,
            "logprobs": None if each.tokens is None else completion_logprobs(each.tokens),
            "finish_reason": each.finish_reason,
        }
        for each in answers
    ]
    return {**_head(identity, "text_completion", created, model), "choices": choices, "usage": usage.to_dict()}


def completion_chunk(
    identity: str,
    created: int,
    model: str,
    index: int,
    text: str,
    finish_reason: str | None = None,
    tokens: Sequence[TokenShown] | None = None,
    offset: int = 0,
) -> dict[str, Any]:
    """A piece of a streamed completion. offset: characters of the answer before it."""
    logprobs = None if tokens is None else completion_logprobs(tokens, offset)
    choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
    return {**_head(identity, "text_completion", created, model), "choices": [choice]}


def chat_reply(identity: str, created: int, model: str, answers: Sequence[Answer], usage: Usage) -> dict[str, Any]:
    choices = []
    for each in answers:
        message: dict[str, Any] = {"role": "assistant", "content": each.text or (None if each.tool_calls else ""), "refusal": None}
        if each.tool_calls:
            message["tool_calls"] = each.tool_calls
        logprobs = None if each.tokens is None else chat_logprobs(each.tokens)
        choices.append({"index": each.index, "message": message, "logprobs": logprobs, "finish_reason": each.finish_reason})
    return {**_head(identity, "chat.completion", created, model), "choices": choices, "usage": usage.to_dict()}


def chat_chunk(
    identity: str,
    created: int,
    model: str,
    index: int,
    delta: dict[str, Any],
    finish_reason: str | None = None,
    tokens: Sequence[TokenShown] | None = None,
) -> dict[str, Any]:
    """A piece of a streamed answer; the first one's delta has the role, the last one's is empty."""
    choice = {"index": index, "delta": delta, "logprobs": None if tokens is None else chat_logprobs(tokens), "finish_reason": finish_reason}
    return {**_head(identity, "chat.completion.chunk", created, model), "choices": [choice]}


def usage_chunk(identity: str, kind: str, created: int, model: str, usage: Usage) -> dict[str, Any]:
    """The last event of a stream whose client asked for the numbers of tokens."""
    return {**_head(identity, kind, created, model), "choices": [], "usage": usage.to_dict()}


def event(value: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + encode(value) + b"\n\n"


def encode(value: Any) -> bytes:
    """JSON in one line of UTF-8: JSON itself escapes the characters that would end a line of an event."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def completion_logprobs(tokens: Sequence[TokenShown], offset: int = 0) -> dict[str, Any]:
    """The older shape: parallel lists. Several ends of a character's bytes have one name, of which the likeliest is kept."""
    names = [token_name(each.content) for each in tokens]
    offsets = []
    for each in tokens:
        offsets.append(offset)
        offset += len(each.content.decode("utf-8", "ignore"))
    top: list[dict[str, float] | None] = []
    for each in tokens:
        found: dict[str, float] = {}
        for content, logprob in each.top:
            found.setdefault(token_name(content), _finite(logprob))
        top.append(None if each.logprob is None else found)
    logprobs = [None if each.logprob is None else _finite(each.logprob) for each in tokens]
    return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": top if any(top) else None, "text_offset": offsets}


def chat_logprobs(tokens: Sequence[TokenShown]) -> dict[str, Any]:
    """The newer shape: one object for each token, with its bytes."""
    content = [
        {
            **_token(each.content, each.logprob if each.logprob is not None else 0.0),
            "top_logprobs": [_token(content, logprob) for content, logprob in each.top],
        }
        for each in tokens
    ]
    return {"content": content, "refusal": None}


def _token(content: bytes, logprob: float) -> dict[str, Any]:
    return {"token": content.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(content)}


def token_name(content: bytes) -> str:
    """A token's text; where it is only a part of a character, its bytes as OpenAI writes them."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def models_reply(models: Sequence[tuple[str, int, int]]) -> dict[str, Any]:
    """GET /v1/models of (id, when it was loaded, context)."""
    return {"object": "list", "data": [model_reply(*each) for each in models]}


def model_reply(identity: str, created: int, context: int) -> dict[str, Any]:
    return {"id": identity, "object": "model", "created": created, "owned_by": "cllm", "max_model_len": context}


def embeddings_reply(model: str, vectors: Sequence[Sequence[float]], as_base64: bool, prompt_tokens: int) -> dict[str, Any]:
    """vectors: (inputs, E) float32."""
    shown: list[Any] = [_packed(each) if as_base64 else list(each) for each in vectors]
    data = [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(shown)]
    return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}}


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


def _head(identity: str, kind: str, created: int, model: str) -> dict[str, Any]:
    return {"id": identity, "object": kind, "created": created, "model": model}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB
