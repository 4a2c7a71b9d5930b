"""Requests of OpenAI's API: every form that clients send, and for every wrong one an error that names its field."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.config.sampling import SAMPLING, Sampling
from cllm.serve.errors import Refused
from cllm.serve.openai import (
    MOST_CHOICES,
    Form,
    chat_request,
    completion_request,
    detokenize_request,
    embedding_request,
    tokenize_request,
)

USER = [{"role": "user", "content": "Hi"}]


def test_what_is_not_given_is_as_in_the_commands():
    asked = completion_request({"model": "m", "prompt": "a"})
    assert asked.prompts == ("a",) and not asked.echo
    options = asked.options
    assert (options.n, options.max_tokens, options.seed, options.stop, options.logprobs, options.stream) == (1, None, None, (), None, False)
    assert Sampling(**options.sampling) == Sampling()
    assert chat_request({"messages": USER}).options.sampling["temperature"] == 0.7  # as `cllm chat`


def test_null_counts_as_absent_in_every_field():
    names = "temperature top_p top_k n stop seed max_tokens stream stream_options logprobs echo suffix user logit_bias best_of response_format model"
    assert completion_request({"prompt": "a"} | dict.fromkeys(names.split())) == completion_request({"prompt": "a"})


@pytest.mark.parametrize(
    "prompt, prompts",
    [("text", ("text",)), ("", ("",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_prompts_are_text_texts_tokens_or_lists_of_tokens(prompt, prompts):
    assert completion_request({"prompt": prompt}).prompts == prompts
    if all(prompts):
        assert embedding_request({"input": prompt}).inputs == prompts
    else:
        with pytest.raises(Refused, match="without a token"):
            embedding_request({"input": prompt})


@pytest.mark.parametrize("prompt", [None, 7, [], [1, "a"], [[1], "a"], [[1, "a"]], [True], {"a": 1}, [None], [[1.5]]])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(Refused, match="prompt") as caught:
        completion_request({"prompt": prompt})
    assert caught.value.status == 400 and caught.value.param == "prompt"


def test_both_names_of_the_number_of_tokens_are_taken():
    assert completion_request({"prompt": "a", "max_tokens": 3}).options.max_tokens == 3
    assert chat_request({"messages": USER, "max_completion_tokens": 4}).options.max_tokens == 4
    assert chat_request({"messages": USER, "max_completion_tokens": 4, "max_tokens": 4}).options.max_tokens == 4
    with pytest.raises(Refused, match="differ"):
        chat_request({"messages": USER, "max_completion_tokens": 4, "max_tokens": 5})


def test_no_tokens_are_asked_for_only_with_echo():
    assert completion_request({"prompt": "a", "max_tokens": 0, "echo": True, "logprobs": 1}).options.max_tokens == 0
    with pytest.raises(Refused, match="max_tokens must be a whole number from 1"):
        completion_request({"prompt": "a", "max_tokens": 0})


@pytest.mark.parametrize("stop, stops", [("x", ("x",)), (["x", "yz"], ("x", "yz")), (None, ()), ([], ())])
def test_stop_is_a_text_a_list_or_null(stop, stops):
    assert completion_request({"prompt": "a", "stop": stop}).options.stop == stops


def test_the_options_beside_openais():
    body = {"prompt": "a", "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "stop_token_ids": [7], "seed": -1, "timeout": 3}
    options = completion_request(body).options
    assert options.sampling | {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2} == options.sampling
    assert (options.min_tokens, options.stop_token_ids, options.seed, options.timeout) == (2, (7,), -1, 3.0)
    assert completion_request({"prompt": "a", "top_k": -1}).options.sampling["top_k"] is None
    assert completion_request({"prompt": "a", "truncation": "auto"}).may_leave_out and not completion_request(body).may_leave_out


WRONG = [
    ("n", 1_000_000), ("n", 0), ("n", "2"), ("n", True), ("n", 1.5), ("n", MOST_CHOICES + 1),
    ("temperature", "hot"), ("temperature", -1), ("temperature", True), ("temperature", [0.5]),
    ("top_p", 0), ("top_p", 2), ("top_k", 1.5), ("min_p", -0.1), ("repetition_penalty", 0),
    ("max_tokens", 10**9), ("max_tokens", -1), ("max_tokens", "10"), ("min_tokens", -1),
    ("stop", 7), ("stop", [1]), ("stop", ""), ("stop", ["a"] * 10_000), ("stop", "a" * 10_000), ("stop", {"a": 1}),
    ("stop_token_ids", ["a"]), ("stop_token_ids", [-1]), ("stop_token_ids", [1] * 1000),
    ("logprobs", 10**6), ("logprobs", True), ("logprobs", -1), ("seed", 2**64), ("seed", "a"),
    ("stream", "yes"), ("stream", 1), ("stream_options", {"include_usage": True}), ("echo", "no"), ("suffix", 3), ("suffix", ["end"]), ("best_of", 3),
    ("user", 7), ("user", "u" * 1000), ("model", ["m"]), ("timeout", 0), ("timeout", "soon"),
    ("response_format", "json"), ("response_format", {"type": "xml"}), ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": 7}}), ("response_format", {"type": "regex"}),
    ("guided_json", "{"), ("guided_json", {"enum": ["x" * 1_000_000]}), ("guided_regex", "a" * 100_000), ("guided_grammar", 7),
    ("logit_bias", [1]), ("logit_bias", {"1": "a"}), ("logit_bias", dict.fromkeys(map(str, range(5000)), 1)), ("logit_bias", {"a": 1}),
    ("logit_bias", {"1": 101}), ("logit_bias", {"1": None}), ("suffix", []), ("suffix", 0), ("response_format", {}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": 1, "schema": {}}}),
    ("response_format", {"type": "json_schema", "json_schema": {"strict": "yes", "schema": {}}}),
    ("metadata", "a"), ("store", "yes"), ("service_tier", 1), ("safety_identifier", 1), ("prompt_cache_key", {}), ("verbosity", []),
    ("temprature", 0.1), ("nothing_like_this", 1), ("x" * 1000, 1),
]  # fmt: skip


@pytest.mark.parametrize("name, value", WRONG, ids=lambda value: str(value)[:20])
def test_a_wrong_value_is_refused_with_its_field_and_a_sentence(name, value):
    with pytest.raises(Refused) as caught:
        completion_request({"model": "m", "prompt": "a", name: value})
    error = caught.value.body()["error"]
    assert caught.value.status == 400 and error["type"] == "invalid_request_error" and error["code"]
    assert name[:50] in error["message"] and len(error["message"]) < 400, error
    assert error["param"].startswith(name[:20])


def test_a_suffix_asks_for_what_stands_before_it_and_an_empty_one_for_nothing():
    assert completion_request({"prompt": ["a", "b"], "suffix": "end"}).suffix == "end"
    assert completion_request({"prompt": "a", "suffix": ""}) == completion_request({"prompt": "a"})
    with pytest.raises(Refused, match="echo and suffix exclude each other"):
        completion_request({"prompt": "a", "suffix": "end", "echo": True})


def test_a_misspelt_option_is_refused_with_the_name_that_was_meant():
    with pytest.raises(Refused, match="Did you mean temperature"):
        completion_request({"prompt": "a", "temprature": 0})


def test_answers_are_counted_over_all_prompts():
    with pytest.raises(Refused, match=r"at most 128 answers"):
        completion_request({"prompt": ["a"] * 20, "n": 10})


def test_forms_of_constrained_output():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for body in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}},
        {"guided_json": schema},
        {"guided_json": json.dumps(schema)},
    ):
        assert chat_request({"messages": USER, **body}).options.form == Form("json_schema", json.dumps(schema))
    assert chat_request({"messages": USER, "response_format": {"type": "json_object"}}).options.form == Form("json_object")
    assert chat_request({"messages": USER, "response_format": {"type": "text"}}).options.form is None
    assert completion_request({"prompt": "a", "guided_regex": "[ab]+"}).options.form == Form("regex", "[ab]+")
    assert completion_request({"prompt": "a", "response_format": {"type": "grammar", "grammar": "start: /a/"}}).options.form == Form(
        "grammar", "start: /a/"
    )
    with pytest.raises(Refused, match="exclude each other"):
        completion_request({"prompt": "a", "guided_regex": "a", "guided_grammar": "b"})


def test_messages_in_all_forms_that_clients_send():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}], "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    found = chat_request({"messages": messages}).messages
    assert found[0] == {"role": "system", "content": "Be brief."} and found[1] == {"role": "user", "content": "Hi there", "name": "ann"}
    assert found[2]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}} and found[3]["tool_call_id"] == "c1"


@pytest.mark.parametrize(
    "messages",
    [
        None, [], "hi", [7], [{}], [{"role": "user"}], [{"role": "robot", "content": "a"}], [{"role": "user", "content": 7}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}], [{"role": "assistant", "tool_calls": [{"function": {}}]}],
        USER * 5000,
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_wrong_messages_are_refused_with_their_place(messages):
    with pytest.raises(Refused) as caught:
        chat_request({"messages": messages})
    assert caught.value.status == 400 and caught.value.param.startswith("messages")


def test_tools_and_log_probabilities_of_chats():
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert chat_request({"messages": USER, "tools": [tool]}).tools == [tool]
    assert chat_request({"messages": USER, "tools": [tool], "tool_choice": "none"}).tools == []
    other = {"type": "function", "function": {"name": "g"}}
    for choice, called in ((None, []), ("auto", []), ("none", []), ("required", [tool, other]), (other, [other])):
        assert chat_request({"messages": USER, "tools": [tool, other], "tool_choice": choice}).must_call == called
    assert chat_request({"messages": USER, "logprobs": True}).options.logprobs == 0
    assert chat_request({"messages": USER, "logprobs": True, "top_logprobs": 3}).options.logprobs == 3
    assert chat_request({"messages": USER, "logprobs": False}).options.logprobs is None
    for wrong in ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 10**6}, {"tools": [{}]}, {"tool_choice": "required"}):
        with pytest.raises(Refused):
            chat_request({"messages": USER, **wrong})
    for wrong in ("any", 1, [], {}, {"type": "function"}, {"type": "function", "function": "f"}, {"type": "function", "function": {"name": "h"}}):
        with pytest.raises(Refused, match="tool_choice"):
            chat_request({"messages": USER, "tools": [tool], "tool_choice": wrong})
    for wrong in ({"parameters": [1]}, {"description": 1}):
        with pytest.raises(Refused, match="tools"):
            chat_request({"messages": USER, "tools": [{"type": "function", "function": {"name": "f", **wrong}}]})
    for name, value in (("parallel_tool_calls", "yes"), ("reasoning_effort", 1), ("store", 1)):
        with pytest.raises(Refused, match=name):
            chat_request({"messages": USER, name: value})
    assert chat_request({"messages": USER, "parallel_tool_calls": False, "reasoning_effort": "low", "metadata": {"a": "b"}})


def test_tokenize_and_detokenize():
    assert tokenize_request({"model": "m", "prompt": "a"}) == ("m", "a") and detokenize_request({"tokens": [1, 2]}) == (None, (1, 2))
    for wrong in ({}, {"prompt": 7}, {"prompt": "a", "x": 1}):
        with pytest.raises(Refused):
            tokenize_request(wrong)
    for wrong in ({}, {"tokens": "a"}, {"tokens": [True]}, {"tokens": [1.0]}):
        with pytest.raises(Refused):
            detokenize_request(wrong)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
NAMES = [*SAMPLING, "model", "prompt", "messages", "input", "n", "stop", "stream", "stream_options", "logprobs", "top_logprobs", "seed", "echo",
         "max_tokens", "max_completion_tokens", "response_format", "logit_bias", "tools", "tool_choice", "tokens", "user", "guided_json"]  # fmt: skip


READERS = {
    completion_request: "prompt",
    chat_request: "messages",
    embedding_request: "input",
    tokenize_request: "prompt",
    detokenize_request: "tokens",
}


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=10), JSON, max_size=6), st.booleans())
def test_any_object_is_a_request_or_an_error_with_a_sentence(body, with_needed):
    for read, needed in READERS.items():
        given = {**body, needed: {"messages": USER, "tokens": [1]}.get(needed, "a")} if with_needed else body
        try:
            read(given)
        except Refused as error:
            assert error.status == 400 and error.message.endswith((".", "?")) and len(error.message) < 500
