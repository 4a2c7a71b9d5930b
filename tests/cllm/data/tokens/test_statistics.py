"""What is measured of a tokenizer on a text: counted by hand on texts small enough for it."""

import pytest

from cllm.data.tokens.statistics import Fit
from cllm.data.tokens.tokenizer import Tokenizer

TEXT = "the cat and the dog and the house, "


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_rates_of_each_language_and_of_all(kind):
    tokenizer = Tokenizer.train([TEXT * 40], 640, kind)
    fit = Fit(tokenizer)
    fit.add([TEXT, "the cat"], "en")
    fit.add(["Die Straße"], "de")
    found = fit.result()
    english, german = found["languages"]["en"], found["languages"]["de"]
    assert list(found["languages"]) == ["en", "de"] and english["documents"] == german["documents"] == 1
    assert english["tokens"] == len(tokenizer.encode(TEXT)) + len(tokenizer.encode("the cat")) and english["words"] == 10
    assert german == {"documents": 1, "bytes": 11, "chars": 10, "words": 2, "tokens": german["tokens"], "bytes_per_token": 11 / german["tokens"],
                      "tokens_per_word": german["tokens"] / 2}  # fmt: skip
    assert found["num_tokens"] == english["tokens"] + german["tokens"] and found["num_bytes"] == len(TEXT) + 7 + 11
    assert found["comes_back"] and found["losses"] == [] and found["coverage"] == 1.0
    used = {i for text in (TEXT, "the cat", "Die Straße") for i in tokenizer.encode(text)}
    assert found["unused_tokens"] == tokenizer.vocab_size - len(used) - found["special_tokens"]


def test_what_characters_do_not_know_is_counted():
    fit = Fit(Tokenizer.train(["abc"], kind="char"))
    fit.add(["abcx"], "all")
    assert fit.result()["coverage"] == 0.75 and fit.result()["num_tokens"] == 3


def test_a_tokenizer_that_changes_text_is_caught():
    from tokenizers import Tokenizer as Backend
    from tokenizers import normalizers

    backend = Backend.from_str(Tokenizer.train([TEXT], 320).to_json())
    backend.normalizer = normalizers.Lowercase()
    fit = Fit(Tokenizer.from_json(backend.to_str()))
    fit.add(["The Cat"], "en")
    assert not fit.result()["comes_back"] and fit.result()["losses"] == ["it changes text before it reads it (Lowercase)"]
