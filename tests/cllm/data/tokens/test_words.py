"""Encoding by remembered words gives the ids that the tokenizers library gives, for any text, in any order of texts, however much is remembered."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.pipeline import prepare
from cllm.data.tokens import tokenizer as module
from cllm.data.tokens import words as words_module
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.runtime.errors import UserError

TEXT = "The old man's house wasn't 1,234 years old; they'll see, he said.\n\n\tNext: Straße 日本語 n° 5 " * 30


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "unigram"])
def tokenizer(request):
    found = Tokenizer.train([TEXT], 640, request.param)
    assert found._words is not None
    return found


def by_library(tokenizer, texts):
    return [encoding.ids for encoding in tokenizer._backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def by_words(tokenizer, texts):
    return [ids.tolist() for ids in tokenizer._words.encode(texts)]


@given(st.lists(st.text() | st.text("aA'stdmrevl \n\t\r1½.,é日\u00a0\u3000\u0301\x1c\x85"), max_size=6))
@settings(max_examples=200, deadline=None)
def test_any_texts_are_encoded_as_the_library_encodes_them(texts):
    tokenizer = trained()
    assert by_words(tokenizer, texts) == by_library(tokenizer, texts)


TRAINED = []


def trained():
    if not TRAINED:
        TRAINED.append(Tokenizer.train([TEXT], 640))
    return TRAINED[0]


@pytest.mark.parametrize("last", [0x3000, pytest.param(0x110000, marks=pytest.mark.slow)])
def test_every_character_is_of_the_kind_that_the_library_says(last):
    rng = random.Random(1)
    text = "".join(chr(i) + rng.choice(["a", " ", "1", "", "!", "'s", " 'x", "\n "]) for i in range(last) if not 0xD800 <= i < 0xE000)
    texts = [text[start : start + 400] for start in range(0, len(text), 400)]
    assert by_words(trained(), texts) == by_library(trained(), texts)


@pytest.mark.parametrize(
    "text", ["a" * 500 + " " * 300 + "\n" * 200 + "1" * 90, "<|endoftext|> <|pad|>", "'", "''s", " '", "'l", "'ll", " ", "", TEXT]
)
def test_hard_texts(tokenizer, text):
    for _ in range(2):  # remembered from the first time
        assert by_words(tokenizer, [text, "", text[:9]]) == by_library(tokenizer, [text, "", text[:9]])


def test_a_memory_that_was_emptied_changes_nothing():
    tokenizer = Tokenizer.train([TEXT], 640)
    fresh = words_module.Words(tokenizer._words._encode)
    rng = random.Random(2)
    for _ in range(4):
        texts = [" ".join("".join(rng.choices("abcdef", k=rng.randrange(1, 60))) for _ in range(50)) for _ in range(20)]
        assert [ids.tolist() for ids in fresh.encode(texts)] == by_library(tokenizer, texts)
        fresh._clear()
        assert [ids.tolist() for ids in fresh.encode(texts)] == by_library(tokenizer, texts)


def test_where_words_depend_on_more_than_themselves_the_library_is_asked():
    assert Tokenizer.train([TEXT], 640, pre_tokenizer="llama-bpe")._words is None
    for part, change in (("pre_tokenizer", {"add_prefix_space": True}), ("pre_tokenizer", {"use_regex": False}), ("model", {"dropout": 0.1})):
        content = json.loads(trained().to_json())
        content[part] |= change
        assert Tokenizer.from_json(json.dumps(content))._words is None
    content = json.loads(trained().to_json())
    assert Tokenizer.from_json(json.dumps(content | {"normalizer": {"type": "NFC"}}))._words is None
    content["added_tokens"][0]["special"] = False
    assert Tokenizer.from_json(json.dumps(content))._words is None


def test_packed_tokens_are_the_same_and_half_a_surrogate_pair_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT * 20)
    tokenizer = trained()
    whole = prepare(tmp_path / "a.txt", tmp_path / "whole", tokenizer)
    monkeypatch.setattr(module, "_MUCH_TEXT", 10)
    assert tokenizer.encode("half \ud800 of a pair"[:4]) == tokenizer.encode("half")
    with pytest.raises(UserError, match="surrogate"):
        tokenizer.encode("half of a pair, which is no text \ud800")
    by_word = prepare(tmp_path / "a.txt", tmp_path / "words", tokenizer)
    for path in sorted(whole.folder.rglob("*.bin")):
        assert path.read_bytes() == (by_word.folder / path.relative_to(whole.folder)).read_bytes()
