"""`cllm review`: the surprise of every token with context, the lines that tokens belong to, and what a suggestion begins with."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cllm import runtime
from cllm.config.model import ModelConfig
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.evaluate.continuations import continue_all
from cllm.evaluate.review import SUGGESTED_TOKENS, place_tokens, ranked, review_text, suggest
from cllm.evaluate.surprise import surprise_of, windows
from cllm.generate.decoding import generate
from cllm.model.model import Model
from cllm.runtime.errors import DataError

sys.path.insert(0, str(Path(__file__).parents[3] / "profiling"))

TEXT = "def add(one, other):\n    return one + other\n\n\nclass Caf\u00e9:\n    def price(self):\n        return 3\n" * 6


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT * 3, "for each in range(10):\n    print(each)\n"], vocab_size=320)


@pytest.fixture(scope="module")
def model(tokenizer):
    return Model(ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=2, num_heads=2, max_seq_len=96), seed=4)


@given(st.integers(0, 200), st.integers(2, 40))
def test_windows_ask_for_every_token_but_the_first_once_with_half_a_context_before_it(num_tokens, context):
    asked = []
    for each in windows(num_tokens, context):
        assert each.start < each.first and each.end - 1 - each.start <= context
        assert each.start == 0 or each.first - each.start >= context // 2
        asked += range(each.first, each.end)
    assert asked == list(range(1, num_tokens))


def test_surprise_is_what_the_logits_say_and_the_same_for_any_number_of_threads(model, tokenizer):
    tokens = np.array(tokenizer.encode(TEXT), dtype=np.int64)
    assert len(tokens) > 96 + 1  # more than one window
    found = []
    for threads in (1, 3):
        with runtime.use(threads=threads):
            found.append(surprise_of(model, tokens))
    assert np.array_equal(found[0].bits, found[1].bits) and np.array_equal(found[0].expected, found[1].expected)
    for each in windows(len(tokens), 96):
        for token in (each.first, each.end - 1):
            nats = torch.log_softmax(model(torch.from_numpy(tokens[None, each.start : token]))[0, -1].detach().double(), 0)
            assert found[0].bits[token] == pytest.approx(-float(nats[tokens[token]]) / math.log(2), rel=1e-4)
            assert found[0].expected[token] == pytest.approx(-float((nats.exp() * nats).sum()) / math.log(2), rel=1e-4)
    assert found[0].bits[0] == found[0].expected[0] == 0


@given(text=st.text(alphabet="ab \n\t\u00e9()=", max_size=60))
def test_every_token_is_placed_where_its_first_character_stands(tokenizer, text):
    tokens = np.array(tokenizer.encode(text), dtype=np.int64)
    places = place_tokens(tokenizer, tokens, text)
    lines, before = text.split("\n"), b""
    assert (np.diff(places.line) >= 0).all()
    for token, line, column in zip(tokens, places.line, places.column):
        piece = tokenizer.token_bytes(int(token))
        assert 0 <= column <= len(lines[line])
        if piece.strip():  # what is left of it in its line stands at its column
            own = piece.rsplit(b"\n", 1)[-1]
            assert lines[line].encode()[len(lines[line][:column].encode()) :].startswith(own) or b"\n" in piece.strip() or not own.isascii()
        else:
            assert line == before.decode(errors="replace").count("\n")
        before += piece


def test_lines_have_the_bits_of_their_tokens_and_blank_lines_are_left_out(model, tokenizer):
    lines = review_text(model, tokenizer, TEXT, "a.py")
    texts = TEXT.split("\n")
    assert all(line.text == texts[line.number - 1] and line.text.strip() for line in lines)
    assert [line.number for line in lines] == [number for number, text in enumerate(texts, 1) if text.strip()]
    tokens = np.array(tokenizer.encode(TEXT), dtype=np.int64)
    surprise = surprise_of(model, tokens)
    of_blanks = sum(bits for bits, line in zip(surprise.bits, place_tokens(tokenizer, tokens, TEXT).line) if not texts[line].strip())
    assert sum(line.bits for line in lines) + of_blanks == pytest.approx(float(surprise.bits.sum()))
    order = ranked(lines)
    assert [line.score for line in order] == sorted((line.score for line in lines), reverse=True)


def test_a_suggestion_is_the_line_up_to_its_surprise_and_the_greedy_text_behind_it(model, tokenizer):
    lines = ranked(review_text(model, tokenizer, TEXT))[:4]
    for line, suggestion in zip(lines, suggest(model, tokenizer, lines)):
        alone = generate(model, tokenizer, line.context.tolist(), max_tokens=SUGGESTED_TOKENS, temperature=0.0, stop="\n")[0]
        assert suggestion == line.beginning + alone.text


def test_continuations_end_where_they_are_told_and_do_not_depend_on_each_other(model, tokenizer):
    prompts = [tokenizer.encode("def add("), tokenizer.encode("class"), tokenizer.encode("for each in")]
    together = continue_all(model, tokenizer, prompts, 12, temperature=1.0, seed=5)
    alone = [continue_all(model, tokenizer, [prompt], 12, temperature=1.0, seed=5 + number)[0] for number, prompt in enumerate(prompts)]
    assert together == alone and len(together[0]) <= 12
    first = continue_all(model, tokenizer, prompts, 12, temperature=1.0, seed=5, ends=lambda tokens: True)
    assert first == [written[:1] for written in together]
    assert continue_all(model, tokenizer, [], 12) == []


def test_a_tokenizer_without_line_breaks_is_refused(model):
    characters = Tokenizer.train(["abc"], vocab_size=300, kind="char")
    with pytest.raises(DataError, match="line breaks"):
        review_text(model, characters, "ab\nc", "a.txt")


def test_every_fault_changes_one_line_and_leaves_a_text_that_parses():
    import ast

    import faults

    text = (
        "def move(self, left, right, count=2):\n    # a note\n    if left < right and count == 10:\n        self.swap(left, right, count - 1)\n"
        "    for each in range(count):\n        total = each * left\n    return f'{left} and {right}', total\n"
    )
    found = faults.faults_of(text)
    assert {fault.kind for fault in found} == set(faults.KINDS)
    assert faults.Fault("wrong operator", 3, 12, 13, ">") in found and faults.Fault("off by one", 3, 12, 13, "<=") in found
    assert any(fault.kind == "swapped arguments" and "self.swap(right, left, count - 1)" in fault.applied(text) for fault in found)
    drawn = faults.draw({"a.py": text, "b.py": "x = 1 +"}, 8, seed=2)
    assert drawn == faults.draw({"a.py": text, "b.py": "x = 1 +"}, 8, seed=2) and {fault.kind for _, fault in drawn} == set(faults.KINDS)
    for name, fault in drawn:
        faulty = fault.applied(text)
        assert name == "a.py" and ast.dump(ast.parse(faulty)) != ast.dump(ast.parse(text))
        assert [number for number, (old, new) in enumerate(zip(text.split("\n"), faulty.split("\n")), 1) if old != new] == [fault.line]
