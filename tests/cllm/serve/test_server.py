"""A server as its clients see it: the official client, the text of the commands, errors, and clients that leave or do not read."""

import base64
import json
import re
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from command import cllm, wait_for
from served_model import TEXT, make_model, running, served_as, write_model

from cllm import save
from cllm.data.tokens.fim import fim_prompt
from cllm.generate.decoding import generate

openai = pytest.importorskip("openai")
PROMPT = "What is two"
LONG = {"prompt": PROMPT, "max_tokens": 100_000, "min_tokens": 100_000}  # ends only when it is ended
GREEDY = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models") / "tiny.cllm"


@pytest.fixture(scope="module")
def parts(place):
    return write_model(place)


@pytest.fixture(scope="module")
def server(parts):
    model, tokenizer = parts
    with running([served_as("tiny.cllm", model, tokenizer, most_rows=16, most_waiting=40)]) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0, timeout=300) as found:
        yield found


def expected(parts, prompt=PROMPT, **options):
    return generate(*parts, prompt, **options)


# -- the official client -----------------------------------------------------------------------------------------------------


def test_models_are_listed_and_found(client):
    assert [each.id for each in client.models.list()] == ["tiny.cllm"] and client.models.retrieve("tiny.cllm").object == "model"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.completions.create(model="other", prompt="a")


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "seed": 5, "top_p": 0.8}], ids=["greedy", "seeded"])
def test_text_and_usage_are_those_of_the_command(client, parts, options):
    found = client.completions.create(model="tiny.cllm", prompt=PROMPT, max_tokens=20, n=3, **options)
    ours = expected(parts, max_tokens=20, samples=3, **options)
    assert [each.text for each in found.choices] == [each.text for each in ours]
    assert found.usage.prompt_tokens == ours[0].prompt_tokens and found.usage.completion_tokens == sum(len(each.tokens) for each in ours)
    alone = client.completions.create(model="tiny.cllm", prompt=PROMPT, max_tokens=20, **options)
    assert alone.choices[0].text == found.choices[0].text and alone.choices[0].finish_reason == "length"


MIDDLE = {"prompt": "What is", "suffix": "It is <|fim_middle|> four."}


@pytest.fixture(scope="module")
def filling(parts, tmp_path_factory):
    """(the file of a model that counts as one which has learnt to fill in, a server of it)."""
    model, tokenizer = parts
    place = tmp_path_factory.mktemp("filling") / "fim.cllm"
    save(model, place, tokenizer=tokenizer.with_fim())
    with running([served_as("fim.cllm", model, tokenizer.with_fim())]) as found:
        yield place, found


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "seeded"])
def test_the_middle_of_a_text_is_that_of_the_command(filling, parts, options):
    model, tokenizer = parts
    place, server = filling
    status, found, _ = server.ask("/v1/completions", MIDDLE | options | {"max_tokens": 20})
    around = [tokenizer.encode(MIDDLE[each]) for each in ("prompt", "suffix")]
    ours = generate(model, tokenizer, fim_prompt(tokenizer.with_fim(), *around), max_tokens=20, **options)[0]
    assert status == 200 and found["choices"][0]["text"] == ours.text and found["usage"]["prompt_tokens"] == sum(map(len, around)) + 3
    flags = [each for name, value in (MIDDLE | options | {"max-tokens": 20, "threads": 1}).items() for each in (f"--{name}", value)]
    if options["temperature"]:
        ran = cllm("generate", place, *flags, "--json")
        assert ran.json["texts"] == [ours.text] and ran.json["suffix"] == MIDDLE["suffix"], ran.err
    else:
        assert cllm("generate", place, *flags).out == f"{ours.text}\n", "the middle alone"


def test_a_middle_ends_with_the_context_and_only_what_is_next_to_it_is_read_if_that_is_asked_for(filling, parts):
    model, tokenizer = parts
    place, server = filling
    long = {"prompt": PROMPT * 100, "suffix": TEXT * 100, "temperature": 0, "max_tokens": 5}
    status, found, _ = server.ask("/v1/completions", long)
    assert status == 400 and "suffix has at least" in found["error"]["message"] and found["error"]["code"] == "context_length_exceeded"
    together = {"prompt": tokenizer.encode(TEXT) * 20, "suffix": TEXT}
    assert "prompt with suffix has" in server.ask("/v1/completions", together)[1]["error"]["message"]
    status, found, _ = server.ask("/v1/completions", long | {"truncation": "auto"})
    assert (status, found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (200, 251, 5)
    ran = cllm("generate", place, *(each for name, value in long.items() for each in (f"--{name.replace('_', '-')}", value)), "--json")
    assert ran.json["texts"] == [found["choices"][0]["text"]] and ran.json["prompt_tokens"] == 251
    assert "The context of 256 tokens does not hold the prompt" in ran.err
    text = {"prompt": PROMPT * 3, "suffix": TEXT, "temperature": 0, "min_tokens": 300, "max_tokens": 300}
    usage = server.ask("/v1/completions", text)[1]["usage"]
    assert usage["total_tokens"] == model.config.max_seq_len + 1
    tokens = tokenizer.encode(PROMPT)
    by_ids, by_text = (server.ask("/v1/completions", MIDDLE | {"temperature": 0, "prompt": each})[1] for each in (tokens, PROMPT))
    assert by_ids["choices"][0]["text"] == by_text["choices"][0]["text"]


def test_a_model_that_has_not_learnt_it_refuses_to_fill_in(server, filling, place):
    status, found, _ = server.ask("/v1/completions", MIDDLE)
    assert status == 400 and found["error"]["param"] == "suffix" and "has not learnt to fill in the middle" in found["error"]["message"]
    assert server.ask("/v1/completions", MIDDLE | {"suffix": "", "max_tokens": 2})[0] == 200
    ran = cllm("generate", place, "--prompt", "a", "--suffix", "b")
    assert ran.status == 2 and ran.err.count("error: ") == 1 and "cllm train DATA --fim-rate 0.5" in ran.err


def test_a_text_that_outgrows_the_context_goes_on_as_in_the_command(client, parts):
    options = {"max_tokens": 400, "seed": 3, "temperature": 1.0}
    assert client.completions.create(model="tiny.cllm", prompt=PROMPT, **options).choices[0].text == expected(parts, **options)[0].text


def test_only_the_end_of_a_longer_prompt_is_read_if_that_is_asked_for(client, parts):
    model, tokenizer = parts
    long = PROMPT * 100 + "ä"
    for prompt in (long, tokenizer.encode(long)):
        with pytest.raises(openai.BadRequestError, match="Shorten it"):
            client.completions.create(**GREEDY | {"model": "tiny.cllm", "prompt": prompt})
        options = GREEDY | {"model": "tiny.cllm", "prompt": prompt, "extra_body": {"truncation": "auto"}}
        found = client.completions.create(**options)
        assert found.choices[0].text == expected(parts, long, max_tokens=12, temperature=0, truncate_prompt=True)[0].text
        assert found.usage.prompt_tokens == model.config.max_seq_len
        echoed = client.completions.create(**options, echo=True).choices[0].text
        assert echoed == tokenizer.decode(tokenizer.encode(long)[-model.config.max_seq_len :]) + found.choices[0].text


def test_streams_are_the_same_text(client, parts):
    events = list(
        client.completions.create(model="tiny.cllm", prompt=PROMPT, max_tokens=20, seed=5, n=2, stream=True, stream_options={"include_usage": True})
    )
    texts = ["", ""]
    for event in events[:-1]:
        for choice in event.choices:
            texts[choice.index] += choice.text
    ours = expected(parts, max_tokens=20, seed=5, samples=2)
    assert texts == [each.text for each in ours]
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == sum(len(each.tokens) for each in ours)
    assert {choice.finish_reason for event in events for choice in event.choices} == {None, "length"}


def test_a_chat_is_that_of_the_command_streamed_or_not(client, parts, place):
    asked = ("--max-tokens", 10, "--seed", 4, "--threads", 1)
    ours = cllm("chat", place, "--system", "Be brief.", *asked, "--json", stdin="What is two?\nAnd four?\n").json
    messages = ours["messages"]
    for number, answer in zip((2, 4), ours["answers"]):
        options = {"model": "tiny.cllm", "messages": messages[:number], "max_tokens": 10, "seed": 4}
        found = client.chat.completions.create(**options)
        assert found.choices[0].message.content == messages[number]["content"]
        assert found.usage.prompt_tokens == answer["prompt_tokens"]
        assert found.choices[0].finish_reason == {"end": "stop"}.get(answer["finish_reason"], answer["finish_reason"])
        events = list(client.chat.completions.create(**options, stream=True))
        assert events[0].choices[0].delta.role == "assistant" and events[-1].choices[0].finish_reason == found.choices[0].finish_reason
        assert "".join(event.choices[0].delta.content or "" for event in events) == messages[number]["content"]


def test_a_conversation_longer_than_the_context_is_refused_or_begins_later_if_that_is_asked_for(client):
    messages = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}] * 40 + [{"role": "user", "content": "And?"}]
    with pytest.raises(openai.BadRequestError, match="holds 256 tokens") as caught:
        client.chat.completions.create(model="tiny.cllm", messages=messages, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"
    found = client.chat.completions.create(model="tiny.cllm", messages=messages, max_tokens=5, extra_body={"truncation": "auto"})
    assert found.usage.prompt_tokens <= 251


def test_an_answer_that_has_begun_goes_on_from_there(server, client, parts):
    asked = {"model": "tiny.cllm", "temperature": 0, "max_tokens": 7}
    question, begun = {"role": "user", "content": "What is two?"}, {"role": "assistant", "content": "It is four"}
    prompt = server.service.models["tiny.cllm"].read_chat([question], [], None, False).tokens + parts[1].encode("It is four")
    expected_text = client.completions.create(prompt=prompt, **asked).choices[0].text
    for truncation in ("disabled", "auto"):
        more = {"continue_final_message": True, "truncation": truncation}
        answer = client.chat.completions.create(messages=[question, begun], extra_body=more, **asked)
        assert answer.choices[0].message.content == expected_text and answer.usage.prompt_tokens == len(prompt)
    for messages in ([question], [begun]):
        with pytest.raises(openai.BadRequestError, match="continue_final_message needs a last message of the assistant"):
            client.chat.completions.create(messages=messages, extra_body={"continue_final_message": True}, **asked)


def test_log_probabilities_are_the_models_own(client, parts):
    model, tokenizer = parts
    found = client.completions.create(model="tiny.cllm", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=3, echo=True)
    shown = found.choices[0].logprobs
    ids = tokenizer.encode(PROMPT) + expected(parts, max_tokens=4, temperature=0)[0].tokens
    with torch.no_grad():
        scores = model(torch.tensor([ids]))[0, :, : tokenizer.vocab_size].double().log_softmax(-1)
    assert shown.token_logprobs[0] is None and len(shown.tokens) == len(ids) and found.choices[0].text.startswith(PROMPT)
    for place in range(1, len(ids)):
        assert shown.token_logprobs[place] == pytest.approx(float(scores[place - 1, ids[place]]), abs=1e-4)
        assert max(shown.top_logprobs[place].values()) == pytest.approx(float(scores[place - 1].max()), abs=1e-4)
    messages = [{"role": "user", "content": "Hi"}]
    chat = client.chat.completions.create(model="tiny.cllm", messages=messages, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2)
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens and all(len(each.top_logprobs) == 2 for each in content)
    assert content[0].logprob == content[0].top_logprobs[0].logprob


def test_a_prompt_alone_is_scored_without_a_new_token(client, parts):
    found = client.completions.create(model="tiny.cllm", prompt=PROMPT, max_tokens=0, logprobs=1, echo=True)
    assert found.choices[0].text == PROMPT and found.usage.completion_tokens == 0 and found.choices[0].finish_reason == "length"
    assert len(found.choices[0].logprobs.tokens) == found.usage.prompt_tokens == len(parts[1].encode(PROMPT))


def test_several_prompts_in_every_form(client, parts):
    tokenizer = parts[1]
    prompts = ["What", "two plus"]
    ours = [expected(parts, each, max_tokens=6, temperature=0)[0].text for each in prompts]
    for form in (prompts, [tokenizer.encode(each) for each in prompts]):
        found = client.completions.create(model="tiny.cllm", prompt=form, max_tokens=6, temperature=0)
        assert [each.text for each in found.choices] == ours and [each.index for each in found.choices] == [0, 1]
    assert client.completions.create(model="tiny.cllm", prompt=tokenizer.encode("What"), max_tokens=6, temperature=0).choices[0].text == ours[0]


def test_usage_says_how_much_of_a_prompt_was_known_already(client):
    asked = {"model": "tiny.cllm", "prompt": "Two and two are four, not five, and be brief about that which is four.", "max_tokens": 1}
    known = [client.completions.create(**asked).usage.prompt_tokens_details.cached_tokens for _ in range(2)]
    assert known[0] == 0 and 0 < known[1] < len(asked["prompt"])


def test_stops_across_tokens_and_stop_tokens(client, parts):
    text = expected(parts, max_tokens=30, temperature=0)[0]
    stop = text.text[4:7]
    found = client.completions.create(model="tiny.cllm", prompt=PROMPT, max_tokens=30, temperature=0, stop=[stop])
    assert found.choices[0].text == text.text[: text.text.index(stop)] and found.choices[0].finish_reason == "stop"
    later = client.completions.create(
        model="tiny.cllm", prompt=PROMPT, max_tokens=30, temperature=0, stop=[text.text[:1], text.text[-1:]], extra_body={"min_tokens": 20}
    )
    assert later.usage.completion_tokens >= 20 and text.text.startswith(later.choices[0].text)
    body = {"stop_token_ids": [text.tokens[0]]}
    ended = client.completions.create(model="tiny.cllm", prompt=PROMPT, max_tokens=30, temperature=0, extra_body=body)
    assert ended.choices[0].text == "" and ended.choices[0].finish_reason == "stop" and ended.usage.completion_tokens == 0


def test_embeddings_are_the_mean_of_the_last_states(client, parts):
    model, tokenizer = parts
    found = client.embeddings.create(model="tiny.cllm", input=["What is", "two"], encoding_format="float")
    with torch.no_grad():
        states = model.hidden(torch.tensor([tokenizer.encode("What is")]))[0].double().mean(0)
    assert found.data[0].embedding == pytest.approx(states.tolist(), abs=1e-5)
    assert found.usage.prompt_tokens == sum(len(tokenizer.encode(each)) for each in ("What is", "two"))
    packed = client.embeddings.with_raw_response.create(model="tiny.cllm", input="What is", encoding_format="base64").http_response.json()
    values = struct.unpack("<32f", base64.b64decode(packed["data"][0]["embedding"]))
    assert list(values) == pytest.approx(found.data[0].embedding, abs=1e-6)


def test_many_clients_at_once_each_get_the_text_that_they_get_alone(server, parts):
    prompts = [f"What is {number}" for number in range(64)]

    def ask(number):
        body = {"prompt": prompts[number], "max_tokens": 8, "seed": number, "user": f"u{number % 7}"}
        while True:
            status, answer, headers = server.ask(COMPLETIONS, body)
            if status != 429:
                return status, answer
            assert answer["error"]["type"] == "rate_limit_error" and int(headers["Retry-After"]) >= 1
            time.sleep(0.2)

    with ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(ask, range(64)))
    for number, (status, answer) in enumerate(answers):
        assert status == 200, answer
        if number % 8 == 0:
            assert answer["choices"][0]["text"] == expected(parts, prompts[number], max_tokens=8, seed=number)[0].text


# -- tokens, health, errors ---------------------------------------------------------------------------------------------------


def test_tokens_and_health(server, parts):
    tokens = parts[1].encode(PROMPT)
    assert server.ask("/tokenize", {"model": "tiny.cllm", "prompt": PROMPT})[1]["tokens"] == tokens
    assert server.ask("/detokenize", {"model": "tiny", "tokens": tokens})[1] == {"prompt": PROMPT}
    assert server.ask("/health")[0] == server.ask("/ready")[0] == 200
    text = server.ask("/metrics")[1]
    assert re.search(r"^cllm_requests_running \d+$", text, re.M) and re.search(r"^cllm_requests_waiting \d+$", text, re.M)
    assert re.search(r'^cllm_time_to_first_token_seconds_bucket\{le="\+Inf"\} [1-9]', text, re.M)


COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "f"}}
BAD = [
    (COMPLETIONS, b"", 400), (COMPLETIONS, b"{", 400), (COMPLETIONS, b"[" * 100_000, 400), (COMPLETIONS, b'{"prompt": NaN}', 400),
    (COMPLETIONS, rb'{"prompt": "\ud800"}', 400), (COMPLETIONS, b'{"prompt": "a", "prompt": "b"}', 400), (COMPLETIONS, b"\xff\xfe", 400),
    (COMPLETIONS, {"prompt": "a" * 3_000_000}, 400), (COMPLETIONS, {"prompt": [0] * 300}, 400), (COMPLETIONS, {"prompt": [10**9]}, 400),
    (COMPLETIONS, {"prompt": [-1]}, 400), (COMPLETIONS, {"prompt": "a", "n": 1_000_000}, 400), (COMPLETIONS, {"prompt": 7}, 400),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**9}, 400), (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 10_000}, 400),
    (COMPLETIONS, {"prompt": "a", "logprobs": 10**6}, 400), (COMPLETIONS, {"prompt": "a", "guided_json": {"enum": ["x" * 1_000_000]}}, 400),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"999999": 1}}, 400), (COMPLETIONS, {"prompt": "a", "stop_token_ids": [999999]}, 400),
    ("/v1/embeddings", {"input": ""}, 400), ("/v1/embeddings", {"input": ["a", ""]}, 400), ("/v1/embeddings", {"input": [[]]}, 400),
    (COMPLETIONS, {"prompt": "a", "guided_json": {"type": "nonsense"}}, 400),
    (CHATS, {"messages": "Hi"}, 400), (CHATS, {"messages": [{"role": "user", "content": "a" * 9000}]}, 400),
    (CHATS, {"messages": [{"role": "user", "content": "a"}], "tools": [TOOL]}, 400),
    ("/v1/embeddings", {"input": "a" * 100_000}, 400), ("/tokenize", {}, 400), ("/detokenize", {"tokens": [10**9]}, 400),
    (COMPLETIONS, b"x" * 10_000_000, 413), ("/v1/models/..%2f..%2fetc%2fpasswd", None, 404), ("/%2e%2e/%2e%2e/etc/passwd", None, 404),
    (COMPLETIONS, None, 405), ("/docs", None, 404), ("/openapi.json", None, 404), ("/nothing", {}, 404),
]  # fmt: skip


@pytest.mark.parametrize("path, body, status", BAD, ids=lambda value: str(value)[:40])
def test_bad_requests_are_answered_with_an_error_of_four_fields(server, path, body, status):
    found, answer, headers = server.ask(path, body)
    assert found == status and headers["Content-Type"] == "application/json"
    assert set(answer["error"]) == {"message", "type", "param", "code"} and len(answer["error"]["message"]) < 600
    assert answer["error"]["message"].endswith((".", "?", "'.")) and "Traceback" not in answer["error"]["message"]


def test_requests_of_other_sites_are_refused_and_no_answer_allows_them(server):
    for wrong in ({"Host": "evil.com"}, {"Origin": "null"}, {"Origin": "https://evil.com"}, {"Sec_Fetch_Site": "cross-site"}):
        for path, body in ((COMPLETIONS, GREEDY), ("/v1/models", None), ("/nothing", None), ("/health", None)):
            status, answer, headers = server.ask(path, body, **wrong)
            assert status in (400, 403) and answer["error"]["code"] in ("invalid_host", "invalid_origin")
            assert not [name for name in headers if name.lower().startswith("access-control")]
    status, _, headers = server.ask(COMPLETIONS, method="OPTIONS", Access_Control_Request_Method="POST")
    assert status == 405 and not [name for name in headers if name.lower().startswith("access-control")]
    assert server.ask(COMPLETIONS, b"prompt=a", Content_Type="application/x-www-form-urlencoded")[0] == 415


def test_headers_that_are_too_long_are_refused_in_words(server):
    with server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 200_000)
        answer = b"".join(iter(lambda: connection.recv(65536), b"")).decode()
    assert answer.startswith("HTTP/1.1 400") and json.loads(answer.split("\r\n\r\n")[1])["error"]["code"] == "invalid_http"


# -- clients that leave, or do not read ----------------------------------------------------------------------------------------


def given_up(server):
    """How many answers were ended because nobody took them. That nothing runs says less: a row that has outgrown its context waits for a moment."""
    return sum(line.get("finish") in ("client left", "slow reader") for line in server.log)


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
def test_a_client_that_leaves_frees_its_row(server, streamed):
    before = server.metric("generation_tokens_total")
    connection = server.connect()
    server.send(connection, "/v1/completions", {**LONG, "stream": streamed, "n": 4})
    wait_for(lambda: server.metric("generation_tokens_total") > before + 8)
    wait_for(lambda: server.metric("requests_running") == 4)
    ended = given_up(server)
    connection.close()
    wait_for(lambda: given_up(server) > ended)
    wait_for(lambda: server.metric("requests_running") == server.metric("requests_waiting") == 0)
    assert server.metric("generation_tokens_total") < before + 100_000


def test_a_client_that_does_not_read_holds_up_nobody(server, monkeypatch):
    monkeypatch.setattr("cllm.serve.stream.SEND_SECONDS", 1.0)
    ended = given_up(server)
    with server.connect() as connection:
        server.send(connection, "/v1/completions", {**LONG, "stream": True, "n": 8, "logprobs": 20})
        wait_for(lambda: server.metric("requests_running") == 8 or given_up(server) > ended)
        status, answer, _ = server.ask(COMPLETIONS, GREEDY)
        assert status == 200 and answer["usage"]["completion_tokens"] == 12
        wait_for(lambda: given_up(server) > ended)


def test_a_request_that_takes_too_long_ends(server):
    status, answer, _ = server.ask(COMPLETIONS, {**LONG, "timeout": 0.3})
    assert status == 504 and answer["error"]["type"] == "timeout_error"
    text = server.ask(COMPLETIONS, {**LONG, "timeout": 0.3, "stream": True})[1]
    assert '"code":"timeout"' in text.splitlines()[-2] and "[DONE]" not in text


def test_beyond_the_queue_requests_are_told_when_to_come_again(server):
    """16 samples run and 32 wait, of at most 40: for 16 more there is no place until one of these clients has left."""
    holding = []
    for number in range(1, 4):
        holding.append(server.connect())
        server.send(holding[-1], COMPLETIONS, {**LONG, "n": 16})
        wait_for(lambda number=number: server.metric("requests_waiting") == 16 * number - 16 and server.metric("requests_running") == 16)
    status, answer, headers = server.ask(COMPLETIONS, {**LONG, "n": 16})
    assert status == 429 and answer["error"]["code"] == "rate_limit_exceeded" and 1 <= int(headers["Retry-After"]) <= 60
    for connection in holding:
        connection.close()
    assert server.ask(COMPLETIONS, GREEDY)[0] == 200


def test_the_log_has_a_line_for_each_request_and_no_contents(server, parts):
    secret = "a very private question"
    tokens = len(parts[1].encode(secret))  # no other prompt here has as many, and lines of earlier requests may still come
    assert tokens > 8
    server.ask(COMPLETIONS, {"prompt": secret, "max_tokens": 1, "user": "private user"}, Authorization="Bearer private-key")
    lines = []

    def is_there():
        lines[:] = [each for each in server.log if each.get("prompt_tokens") == tokens]
        return lines

    wait_for(is_there)
    [line] = lines
    assert (line["status"], line["finish"], line["completion_tokens"]) == (200, "length", 1)
    assert line["route"] == COMPLETIONS and line["model"] == "tiny.cllm"
    assert not [each for each in server.lines if "private" in each or PROMPT in each]


# -- constrained output --------------------------------------------------------------------------------------------------------


def test_answers_keep_to_a_schema_and_an_expression(client):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    messages = [{"role": "user", "content": "Hi"}]
    for stream in (False, True):
        found = client.chat.completions.create(model="tiny.cllm", messages=messages, response_format=form, seed=1, max_tokens=60, stream=stream)
        text = "".join(each.choices[0].delta.content or "" for each in found) if stream else found.choices[0].message.content
        assert json.loads(text)["a"] in ("x", "y")
    found = client.completions.create(model="tiny.cllm", prompt="a", max_tokens=30, n=3, seed=2, extra_body={"guided_regex": "[ab]{3}c"})
    assert all(re.fullmatch("[ab]{3}c", each.text) and each.finish_reason == "stop" for each in found.choices)


CALLING = (  # Hermes' way
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}\n<call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</call>{% endfor %}<|end|>{% endfor %}'
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_tool_is_called_where_the_client_says_so():
    pytest.importorskip("llguidance")
    model, tokenizer = make_model(context=1024)
    unit = {"type": "object", "properties": {"unit": {"$ref": "#/$defs/U"}}, "required": ["unit"], "additionalProperties": False}
    tools = [
        {"type": "function", "function": {"name": "heat", "parameters": unit | {"$defs": {"U": {"enum": ["C", "F"]}}}}},
        {"type": "function", "function": {"name": "stop", "parameters": {"properties": {}, "additionalProperties": False}}},
    ]
    asked = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": tools, "max_tokens": 200}
    with (
        running([served_as("m", model, tokenizer.with_chat_template(CALLING))]) as server,
        openai.OpenAI(base_url=f"{server.address}/v1", api_key="any", max_retries=0) as client,
    ):
        ask = client.chat.completions.create
        free = ask(**asked | {"max_tokens": 1})
        for choice, names in (("required", {"heat", "stop"}), ({"type": "function", "function": {"name": "heat"}}, {"heat"})):
            found = ask(**asked, tool_choice=choice, n=4, seed=1)
            for each in found.choices:
                (call,) = each.message.tool_calls
                assert each.finish_reason == "tool_calls" and each.message.content is None and call.function.name in names
                assert json.loads(call.function.arguments) in ([{"unit": "C"}, {"unit": "F"}] if call.function.name == "heat" else [{}])
            assert {each.message.tool_calls[0].function.name for each in found.choices} == names  # each of them somewhere in four answers
            *_, last = ask(**asked, tool_choice=choice, seed=1, stream=True)
            (call,) = last.choices[0].delta.tool_calls
            whole = found.choices[0].message.tool_calls[0].function
            assert last.choices[0].finish_reason == "tool_calls"
            assert (call.function.name, call.function.arguments) == (whole.name, whole.arguments)
        # The tools are a part of the prompt, also where the oldest turns may be left out.
        shortened = ask(**asked | {"max_tokens": 1}, extra_body={"truncation": "auto"})
        assert shortened.usage.prompt_tokens == free.usage.prompt_tokens > ask(**asked | {"max_tokens": 1, "tools": []}).usage.prompt_tokens + 100
        wrong = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
        with pytest.raises(openai.BadRequestError) as caught:
            ask(**asked | {"tools": [wrong]}, tool_choice="required")
        assert caught.value.param == "tools"


def test_a_form_that_cannot_be_compiled_is_refused_in_words(server):
    pytest.importorskip("llguidance")
    status, answer, _ = server.ask("/v1/completions", {"prompt": "a", "guided_grammar": 'start: a{100000}\na: "x"'})  # shows after the first tokens
    assert status == 400 and "cannot be followed further" in answer["error"]["message"]
    for wrong in ({"guided_regex": "("}, {"guided_grammar": "start"}, {"guided_json": {"type": "nonsense"}}):
        status, answer, _ = server.ask("/v1/completions", {"prompt": "a", **wrong})
        assert status == 400 and answer["error"]["param"] == next(iter(wrong)) and answer["error"]["message"].endswith(".")
