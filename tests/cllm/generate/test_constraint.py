"""Constrained output: whatever a model's logits are, the text keeps to its form; forms that are wrong or too much are refused in time."""

import json
import re
import sys
import time

import numpy as np
import pytest
import torch
from command import cllm
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import Model, ModelConfig, save
from cllm.config.sampling import Sampling
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.generate import constraint
from cllm.generate.decoding import generate, stream
from cllm.generate.sampler import Sampler
from cllm.runtime.errors import UserError

TEXT = [
    '{"name": "Ada", "age": 36, "tags": ["a", "b"], "ok": true, "none": null}\n',
    "yes no maybe 0123456789-()!? äöü 日本\n",
    "the quick brown fox\n",
] * 20
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "unigram", "char"])
def tokenizer(request):
    return Tokenizer.train(TEXT, vocab_size=640, kind=request.param)


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train(TEXT, vocab_size=420)


def written(tokenizer, new, seed=0, max_tokens=600, temperature=1.0):
    """(text, finish reason) of a model that has learned nothing."""
    rule = new()
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(Sampling(temperature=temperature), prompt=(), vocab_size=tokenizer.vocab_size, seed=seed, constraint=rule)
    tokens = []
    for _ in range(max_tokens):
        token = sampler.choose(2 * torch.randn(tokenizer.vocab_size, generator=generator).numpy()).token
        if token == tokenizer.eot_id:
            return tokenizer.decode(tokens), "end"
        tokens.append(token)
        if rule.finished:
            return tokenizer.decode(tokens), "end"
    return tokenizer.decode(tokens), "length"


def fits(schema, value):
    """Whether a value fits a schema of the keywords that `schemas` makes."""
    if "enum" in schema:
        return any(type(each) is type(value) and each == value for each in schema["enum"])
    if "anyOf" in schema:
        return any(fits(each, value) for each in schema["anyOf"])
    match schema["type"]:
        case "object":
            known = schema["properties"]
            return (
                isinstance(value, dict) and set(schema["required"]) <= set(value) <= set(known) and all(fits(known[k], v) for k, v in value.items())
            )
        case "array":
            return isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"] and all(fits(schema["items"], v) for v in value)
        case "string":
            return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None


names = st.text('abcé "\\\n_-1', min_size=1, max_size=6)
simple = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.tuples(st.integers(-1000, 1000), st.integers(0, 500)).map(lambda x: {"type": "integer", "minimum": x[0], "maximum": x[0] + x[1]}),
    st.tuples(st.integers(0, 3), st.integers(0, 4)).map(lambda x: {"type": "string", "minLength": x[0], "maxLength": x[0] + x[1]}),
    st.lists(st.one_of(names, st.integers(-5, 5), st.booleans(), st.none()), min_size=1, max_size=4).map(lambda x: {"enum": x}),
)
schemas = st.recursive(
    simple,
    lambda inner: st.one_of(
        st.tuples(st.dictionaries(names, inner, max_size=4), st.randoms(use_true_random=False)).map(
            lambda x: {
                "type": "object", "properties": x[0], "required": [name for name in x[0] if x[1].random() < 0.6], "additionalProperties": False,
            }
        ),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda x: {"type": "array", "items": x[0], "minItems": x[1], "maxItems": x[1] + x[2]}
        ),
        st.lists(inner, min_size=1, max_size=3).map(lambda x: {"anyOf": x}),
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=80, derandomize=True, deadline=None)
@given(schema=schemas, seed=st.integers(0, 1000))
def test_any_schema_gives_json_that_fits_it_or_says_that_the_length_was_too_short(bpe, schema, seed):
    text, reason = written(bpe, constraint.compile_constraint(bpe, "json_schema", schema), seed)
    if reason == "end":
        assert fits(schema, json.loads(text)), text
    else:
        assert len(bpe.encode(text)) > 100


def test_blanks_do_not_use_up_the_tokens_of_an_answer(bpe):
    schema = {"type": "object", "properties": {"a": {"enum": [1]}, "b": {"enum": [2]}}, "required": ["a", "b"], "additionalProperties": False}
    form, text = constraint.compile_constraint(bpe, "json_schema", schema)(), b""
    while not form.finished and len(text) < 200:
        allowed = np.flatnonzero(form.mask()).tolist()
        token = next((each for each in allowed if bpe.token_bytes(each).isspace()), allowed[0])
        form.advance(token)
        text += bpe.token_bytes(token)
    assert json.loads(text) == {"a": 1, "b": 2} and len(text) < 30


def test_every_kind_of_tokenizer_keeps_to_every_kind_of_form(tokenizer):
    for seed in range(3):
        text, reason = written(tokenizer, constraint.compile_constraint(tokenizer, "json_schema", json.dumps(PERSON)), seed)
        assert reason == "end" and 0 <= json.loads(text)["age"] <= 150 and set(json.loads(text)) == {"name", "age"}
        text, reason = written(tokenizer, constraint.compile_constraint(tokenizer, "regex", "[0-9]{3}-(yes|no)x?"), seed)
        assert reason == "end" and re.fullmatch("[0-9]{3}-(yes|no)x?", text)
        text, reason = written(tokenizer, constraint.compile_constraint(tokenizer, "grammar", 'start: "(" start ")" | "no" | "yes"'), seed)
        assert reason == "end" and re.fullmatch(r"(\(*)(no|yes)(\)*)", text) and text.count("(") == text.count(")")
        text, reason = written(tokenizer, constraint.compile_constraint(tokenizer, "json_object"), seed, 2000)
        assert reason == "length" or isinstance(json.loads(text), dict)


def test_special_tokens_are_never_text_and_the_end_comes_where_it_may(bpe):
    rule = constraint.compile_constraint(bpe, "regex", "a*")()
    special = list(bpe.special_tokens.values())
    assert [token for token in special if rule.mask()[token]] == [bpe.eot_id] and not rule.finished
    rule.advance(bpe.encode("a")[0])
    assert [token for token in special if rule.mask()[token]] == [bpe.eot_id]
    rule = constraint.compile_constraint(bpe, "regex", "ab")()
    assert not any(rule.mask()[special])
    for token in bpe.encode("ab"):
        rule.advance(token)
    assert rule.finished and rule.mask().nonzero()[0].tolist() == [bpe.eot_id]
    rule.advance(bpe.eot_id)
    assert rule.finished


def test_the_end_of_a_turn_is_another_end(bpe):
    """Tokenizers that differ in their end alone are equal, and must not share what was prepared for the other."""
    name = next(each for each in bpe.special_tokens if each != bpe.eot_token)
    other = bpe.with_end(name)
    ends = [constraint.compile_constraint(each, "regex", "a?")().mask()[[bpe.eot_id, other.eot_id]].tolist() for each in (bpe, other)]
    assert other == bpe and ends == [[True, False], [False, True]]


def test_a_tokenizer_without_an_end_finishes_where_nothing_can_follow():
    plain = Tokenizer.train(["abc \n"], kind="char")
    assert plain.eot_id is None
    rule = constraint.compile_constraint(plain, "regex", "ab")()
    assert rule.mask().tolist() == [character == "a" for character in plain.decode(range(plain.vocab_size))]
    for character in "ab":
        rule.advance(plain.encode(character)[0])
    assert rule.finished and not rule.mask().any()


def test_continuations_of_one_form_do_not_share_their_place(bpe):
    new = constraint.compile_constraint(bpe, "regex", "(yes|no)")
    one, other = new(), new()
    one.advance(bpe.encode("y")[0])
    assert other.mask()[bpe.encode("n")[0]] and not one.mask()[bpe.encode("n")[0]]


TOO_MUCH = [
    ("json_schema", '{"type": "integer", "multipleOf": 999983}', "cannot be compiled in 0.5 seconds"),  # 40 s
    ("json_schema", json.dumps({"enum": ["x" * 200_000]}), "at most 128 KB"),
    ("json_schema", {"enum": [f"{number:05}" * 10 for number in range(4000)]}, "at most 128 KB"),
    ("json_schema", '{"items":' * 65 + "{}" + "}" * 65, "too deep"),
    ("json_schema", '{"items":' * 50_000 + "{}" + "}" * 50_000, "at most 128 KB"),
    ("json_schema", "[" * 100_000, "too deep"),
    ("json_schema", '{"type": ', "no JSON"),
    ("json_schema", "3", "must be a JSON object"),
    ("json_schema", True, "must be a JSON object"),
    ("json_schema", '{"type": "strin"}', "strin"),
    ("json_schema", '{"not": {"type": "string"}}', "not"),
    ("json_schema", '{"enum": []}', "Unsatisfiable"),
    ("json_schema", '{"$ref": "https://example.com/x.json"}', "example.com"),
    ("json_schema", {"enum": ["\ud800"]}, "surrogate"),
    ("regex", "(", "unclosed group"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", "x" * 200_000, "at most 128 KB"),
    ("regex", "  ", "is empty"),
    ("regex", "(a{1000}){1000}", "its repetitions come to more than"),
    ("regex", "b|((xa{2}){30,100}){,5}{9}[)]c{99999999999}", "its repetitions come to more than"),
    ("regex", "[" * 60_000, "cannot be used"),
    ("grammar", "start: /((a{50}){50}){50}/", "its repetitions come to more than"),
    ("grammar", "start: foo", "foo"),
    ("grammar", "", "is empty"),
    ("xml", "", "must be one of json_schema, json_object, regex, grammar"),
]


@pytest.mark.parametrize(("kind", "text", "message"), TOO_MUCH)
def test_a_form_that_is_wrong_or_too_much_is_refused_in_time(bpe, monkeypatch, kind, text, message):
    monkeypatch.setattr(constraint, "MOST_SECONDS", 0.5)
    started = time.monotonic()
    with pytest.raises(UserError, match=re.escape(message)):
        constraint.compile_constraint(bpe, kind, text)
    assert time.monotonic() - started < 25  # of a machine that has much else to do


def test_repetitions_are_counted_as_they_are_written_out():
    for expression, count in (
        ("abc", 3),
        ("a{3}", 3),
        (r"(ab){2,5}c?", 11),
        (r"[a){9}]{2}\\{7}", 9),
        ("(a(bc){3}){10}", 70),
        ("a{0}b", 1),
        ("))a{2}", 4),
    ):
        assert constraint._written_out(expression) == count, expression


def test_a_form_that_gets_too_difficult_on_the_way_is_the_fault_of_whoever_gave_it(bpe):
    with pytest.raises(UserError, match=r"cannot be followed further: .* Make it simpler"):
        written(bpe, constraint.compile_constraint(bpe, "grammar", 'start: a{100000}\na: "x"'))


def test_after_a_form_that_took_too_long_the_next_one_is_compiled(bpe, monkeypatch):
    monkeypatch.setattr(constraint, "MOST_SECONDS", 0.3)
    with pytest.raises(UserError, match="cannot be compiled"):
        constraint.compile_constraint(bpe, "json_schema", '{"type": "integer", "multipleOf": 999979}')
    monkeypatch.setattr(constraint, "MOST_SECONDS", 20.0)
    assert written(bpe, constraint.compile_constraint(bpe, "regex", "after that"))[0] == "after that"


def test_without_llguidance_the_extra_is_named(bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=re.escape("pip install 'cllm[serve]'")):
        constraint.compile_constraint(bpe, "json_object")


@pytest.fixture(scope="module")
def model(bpe):
    return Model(ModelConfig(vocab_size=448, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=64), seed=1)


def test_generate_keeps_every_sample_to_the_form(model, bpe):
    new = constraint.compile_constraint(bpe, "json_schema", PERSON)
    results = generate(model, bpe, "name", max_tokens=150, samples=3, seed=4, temperature=1.0, constraint=new)
    for each in results:
        if each.finish_reason == "end":
            assert set(json.loads(each.text)) == {"name", "age"}
        else:
            assert each.finish_reason == "length" and len(each.tokens) == 150
    assert any(each.finish_reason == "end" for each in results)
    assert "".join(stream(model, bpe, "name", max_tokens=150, seed=4, temperature=1.0, constraint=new)) == results[0].text
    exact = constraint.compile_constraint(bpe, "regex", "the quick")
    found = generate(model, bpe, "x", max_tokens=50, temperature=0.0, constraint=exact)[0]
    assert (found.text, found.finish_reason) == ("the quick", "end")
    for room, reason in ((0, "end"), (-1, "length")):
        for use_cache in (True, False):
            most = len(found.tokens) + room
            ended = generate(model, bpe, "x", max_tokens=most, temperature=0.0, constraint=exact, use_cache=use_cache)[0]
            assert (ended.finish_reason, ended.tokens) == (reason, found.tokens[:most])


def test_the_command_writes_what_the_form_allows(model, bpe, tmp_path):
    save(model, tmp_path / "model.cllm", tokenizer=bpe)
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    ran = cllm("generate", tmp_path / "model.cllm", "--prompt", "x", "--regex", "(yes|no)!", "--json", "--samples", 2)
    assert all(re.fullmatch("(yes|no)!", text) for text in ran.json["texts"]) and ran.json["finish_reasons"] == ["end", "end"]
    ran = cllm("generate", tmp_path / "model.cllm", "--prompt", "", "--json-schema", tmp_path / "person.json", "--max-tokens", 300)
    assert set(json.loads(ran.out)) == {"name", "age"}
    ran = cllm("generate", tmp_path / "model.cllm", "--prompt", "x", "--regex", "(", "--json")
    assert ran.status == 2 and "unclosed group" in ran.json["error"]
