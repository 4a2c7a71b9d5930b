"""A conversation longer than the model's context: what the model still sees, and what is said about the rest."""

import pytest
from command import cllm
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import save
from cllm.config.model import ModelConfig
from cllm.data.tokens.chat_template import encode_prompt, with_template
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.generate.chat_context import check_system, fit_to_context
from cllm.model.model import Model
from cllm.runtime.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def tokenizer():
    return with_template(Tokenizer.train(["What is two plus two? It is four. Be brief. " * 20], vocab_size=320))


def turns(sizes):
    messages = []
    for question, answer in sizes:
        messages += [{"role": "user", "content": "q" * question}, {"role": "assistant", "content": "a" * answer}]
    return messages


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=6),
    last=st.integers(1, 60),
    context=st.integers(40, 90),
    max_tokens=st.integers(1, 60),
    system=st.booleans(),
)
def test_the_newest_turns_that_fit_are_seen_whole_behind_the_system_message(tokenizer, sizes, last, context, max_tokens, system):
    begin = [SYSTEM] if system else []
    question = {"role": "user", "content": "q" * last}
    old = turns(sizes)
    seen = fit_to_context(tokenizer, [*begin, *old, question], context, max_tokens)
    room = context - min(max_tokens, context // 2)
    assert seen.messages[: len(begin)] == begin and seen.tokens == encode_prompt(tokenizer, seen.messages) and len(seen.tokens) <= room
    assert len(seen.tokens) + seen.answer_room == context + 1
    kept = seen.messages[len(begin) :]
    assert kept[:-1] == old[2 * seen.turns_left_out :]
    if seen.question_tokens_left_out:
        assert kept[:-1] == [] and question["content"].endswith(kept[-1]["content"]) and len(kept[-1]["content"]) < last
    else:
        assert kept[-1] == question
        if seen.turns_left_out:
            assert len(encode_prompt(tokenizer, [*begin, *old[2 * seen.turns_left_out - 2 :], question])) > room, "one more would have fitted"


def test_a_question_of_many_byte_characters_is_cut_between_them(tokenizer):
    question = {"role": "user", "content": "\U0001f600" * 40}
    seen = fit_to_context(tokenizer, [question], 64, 20)
    assert set(seen.messages[0]["content"]) == {"\U0001f600"} and seen.question_tokens_left_out > 0


def test_a_system_message_that_leaves_no_room_is_refused(tokenizer):
    check_system(tokenizer, [SYSTEM], 64)
    with pytest.raises(UserError, match=r"leaves no room: with the shortest question it has \d+ tokens.*context of 64 tokens.*Shorten --system"):
        check_system(tokenizer, [{"role": "system", "content": "Never be brief. " * 20}], 64)


def test_the_command_keeps_the_system_message_and_says_once_what_it_leaves_out(tokenizer, tmp_path):
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=16, num_layers=1, num_heads=1, max_seq_len=64))
    save(model, tmp_path / "m.cllm", tokenizer=tokenizer)
    lines = ["What is two?", "And four?", "And two plus two?", "What is " * 40, "And then?"]
    given = ("--system", SYSTEM["content"], "--max-tokens", 12, "--seed", 1, "--threads", 1)
    ran = cllm("chat", tmp_path / "m.cllm", *given, "--json", stdin="\n".join(lines))
    assert ran.status == 0, ran.err
    said = [line for line in ran.err.splitlines() if "no longer fit" in line]
    assert len(said) == 1 and "and the system message stays" in said[0] and "context of 64 tokens" in said[0]
    found = ran.json
    assert [m["content"] for m in found["messages"] if m["role"] == "user"] == [line.strip() for line in lines]
    assert found["last_prompt"][0] == SYSTEM and found["last_prompt"][-1] == {"role": "user", "content": "And then?"}
    assert found["answers"][0]["turns_left_out"] == 0 < found["answers"][-1]["turns_left_out"]
    assert [each["question_tokens_left_out"] > 0 for each in found["answers"]] == [False, False, False, True, False]
    assert "The question is too long" in ran.err and all(each["prompt_tokens"] <= 52 for each in found["answers"])
    ran = cllm("chat", tmp_path / "m.cllm", "--system", "x " * 200, stdin="Hi\n")
    assert ran.status == 2 and "Shorten --system" in ran.err
