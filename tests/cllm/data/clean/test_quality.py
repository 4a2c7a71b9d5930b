"""A score learned from examples tells texts like them from others, with the same bits each time."""

import hashlib
import random

import numpy as np
import pytest

from cllm.data.clean.quality import BUCKETS, loaded, train
from cllm.data.clean.words import split
from cllm.runtime.errors import DataError


def texts(kind, num, seed):
    """Letters of a business or descriptions of ships: most words are common to both."""
    draw = random.Random(f"{kind} {seed}")
    common = ["the", "a", "of", "and", "to", "in", "that", "it", "was", "for", "on", "with", "as", "at", "by", "from", "this", "they", "had", "were"]
    own = {
        "ships": "harbour sail tide mast anchor deck storm captain hull",
        "trade": "invoice offer price discount order payment client stock refund",
    }[kind].split()
    return [" ".join(draw.choice(own) if draw.random() < 0.15 else draw.choice(common) for _ in range(draw.randint(20, 200))) for _ in range(num)]


@pytest.fixture(scope="module")
def score():
    return train(texts("ships", 60, 1), texts("trade", 200, 1))


def test_new_texts_are_told_apart(score):
    good = [score.score(split(text)) for text in texts("ships", 50, 2)]
    bad = [score.score(split(text)) for text in texts("trade", 50, 2)]
    assert sum(each > 0.5 for each in good) >= 49
    assert sum(each < 0.5 for each in bad) >= 49
    assert all(0 <= each <= 1 for each in good + bad)


def test_texts_like_the_examples_among_the_others_do_not_spoil_the_score():
    """Most of what is to be found stands among the documents that it is told from, and examples are few."""
    found = train(texts("ships", 20, 1), texts("trade", 300, 1) + texts("ships", 60, 3))
    assert sum(found.score(split(text)) > 0.5 for text in texts("ships", 50, 2)) >= 45
    assert sum(found.score(split(text)) < 0.5 for text in texts("trade", 50, 2)) >= 49


def test_the_weights_are_the_same_bit_for_bit(score):
    again = train(texts("ships", 60, 1), texts("trade", 200, 1))
    assert np.array_equal(again.weights, score.weights)
    assert hashlib.sha256(score.weights.tobytes()).hexdigest()[:16] == GOLDEN


GOLDEN = "69be2703c94155bf"


def test_a_kept_score_is_the_same(score):
    assert loaded(score.weights.copy()).score(split("harbour and sail")) == score.score(split("harbour and sail"))
    with pytest.raises(DataError, match="32 bits"):
        loaded(np.zeros(BUCKETS, np.float32))


def test_an_empty_text_has_a_score_and_few_examples_are_refused(score):
    assert 0 <= score.score(split("")) <= 1
    with pytest.raises(DataError, match="at least 10 examples of good text, and there are 3"):
        train(texts("ships", 3, 1), texts("trade", 30, 1))
    with pytest.raises(DataError, match="at least 3 documents to compare them with, and there are 0"):
        train(texts("ships", 30, 1), ["..."] * 30)
