"""Replies as the official client reads them, in both shapes of log-probabilities."""

import base64
import json
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.serve.errors import Refused
from cllm.serve.replies import (
    Answer,
    TokenShown,
    Usage,
    chat_chunk,
    chat_reply,
    completion_chunk,
    completion_reply,
    embeddings_reply,
    encode,
    event,
    models_reply,
    usage_chunk,
)

types = pytest.importorskip("openai.types")
TOKENS = [
    TokenShown(b"a", -0.5, [(b"a", -0.5), (b"\xe2\x82", -1.0)]),
    TokenShown(b"\xe2\x82", -math.inf),
    TokenShown(b"\xac", -2.0, [(b"\xac", -2.0)]),
]
HEAD = ("cmpl-1", 1_700_000_000, "m")


def read(kind, value):
    """What the client makes of a reply, every field checked against its type."""
    return kind.model_validate(json.loads(encode(value)), strict=True)


def test_a_completion():
    answers = [Answer(0, "a\u20ac", "stop", TOKENS), Answer(1, "b", "length")]
    found = read(types.Completion, completion_reply(*HEAD, answers, Usage(3, 4, 2)))
    assert [(each.index, each.text, each.finish_reason) for each in found.choices] == [(0, "a\u20ac", "stop"), (1, "b", "length")]
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (3, 4, 7)
    assert found.usage.prompt_tokens_details.cached_tokens == 2 and found.choices[1].logprobs is None
    logprobs = found.choices[0].logprobs
    assert logprobs.tokens == ["a", r"bytes:\xe2\x82", r"bytes:\xac"] and logprobs.token_logprobs == [-0.5, -9999.0, -2.0]
    assert logprobs.text_offset == [0, 1, 1] and logprobs.top_logprobs[0] == {"a": -0.5, r"bytes:\xe2\x82": -1.0}


def test_the_first_token_of_an_echoed_prompt_has_no_probability():
    reply = completion_reply(*HEAD, [Answer(0, "ab", "stop", [TokenShown(b"a", None), TokenShown(b"b", -1.0, [(b"b", -1.0)])])], Usage())
    logprobs = read(types.Completion, {**reply, "choices": [reply["choices"][0] | {"logprobs": None}]}) and reply["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [None, -1.0] and logprobs["top_logprobs"] == [None, {"b": -1.0}]


def test_a_chat_and_its_tool_calls():
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    answers = [Answer(0, "a", "stop", TOKENS), Answer(1, "", "tool_calls", tool_calls=[call])]
    found = read(types.chat.ChatCompletion, chat_reply(*HEAD, answers, Usage(1, 2)))
    assert found.choices[0].message.content == "a" and found.choices[1].message.content is None
    assert found.choices[1].message.tool_calls[0].function.name == "f"
    tokens = found.choices[0].logprobs.content
    assert [each.bytes for each in tokens] == [[97], [0xE2, 0x82], [0xAC]] and tokens[0].top_logprobs[1].logprob == -1.0
    assert tokens[1].logprob == -9999.0 and tokens[1].top_logprobs == []


def test_streams():
    first = read(types.chat.ChatCompletionChunk, chat_chunk(*HEAD, 0, {"role": "assistant", "content": ""}))
    assert first.choices[0].delta.role == "assistant" and first.choices[0].finish_reason is None
    last = read(types.chat.ChatCompletionChunk, chat_chunk(*HEAD, 0, {}, "length", TOKENS))
    assert last.choices[0].finish_reason == "length" and last.choices[0].logprobs.content[0].token == "a"
    usage = read(types.chat.ChatCompletionChunk, usage_chunk("x", "chat.completion.chunk", 1, "m", Usage(1, 2)))
    assert usage.choices == [] and usage.usage.total_tokens == 3
    chunk = completion_chunk(*HEAD, 1, "b", None, TOKENS[:1], 5)["choices"][0]
    assert chunk["logprobs"]["text_offset"] == [5] and chunk["finish_reason"] is None


@given(st.text())
def test_an_event_is_one_line_whatever_a_model_wrote(text):
    content = event(completion_chunk(*HEAD, 0, text))
    assert content.startswith(b"data: {") and content.endswith(b"}\n\n") and content.count(b"\n") == 2 and b"\r" not in content
    assert json.loads(content[6:])["choices"][0]["text"] == text


def test_models_and_embeddings():
    found = models_reply([("a", 1, 64), ("b", 2, 128)])
    assert [read(types.Model, each).id for each in found["data"]] == ["a", "b"] and found["object"] == "list"
    vectors = [[0.5, -1.25], [3.0, 0.0]]
    assert read(types.CreateEmbeddingResponse, embeddings_reply("m", vectors, False, 7)).data[1].embedding == [3.0, 0.0]
    packed = embeddings_reply("m", vectors, True, 7)
    assert [struct.unpack("<2f", base64.b64decode(each["embedding"])) for each in packed["data"]] == [(0.5, -1.25), (3.0, 0.0)]
    assert packed["usage"] == {"prompt_tokens": 7, "total_tokens": 7}


@pytest.mark.parametrize(
    "status, kind", [(400, "invalid_request_error"), (401, "authentication_error"), (429, "rate_limit_error"), (503, "server_error")]
)
def test_errors_have_their_four_fields(status, kind):
    error = Refused(status, "words", param="n", code="c").body()["error"]
    assert error == {"message": "words", "type": kind, "param": "n", "code": "c"}
