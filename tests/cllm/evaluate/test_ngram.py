"""Kneser-Ney: probabilities that sum to one, and those of the definition written out with dictionaries."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.evaluate.ngram import NGrams

MARK = "start"


class Definition:
    """Interpolated modified Kneser-Ney as Chen and Goodman write it, one sum at a time."""

    def __init__(self, documents, vocab_size, order):
        self.vocab_size, self.order = vocab_size, order
        raw = Counter()
        for document in documents:
            text = (MARK, *document)
            for length in range(1, order + 1):
                raw.update(text[start : start + length] for start in range(len(text) - length + 1))
        before = defaultdict(set)
        for gram in raw:
            if len(gram) > 1:
                before[gram[1:]].add(gram[0])
        self.counts = {gram: raw[gram] if len(gram) == order or gram[0] == MARK else len(before[gram]) for gram in raw if gram != (MARK,)}
        if order == 1:
            self.counts = {gram: raw[gram] for gram in raw if gram != (MARK,)}
        self.followers = defaultdict(dict)
        for gram, count in self.counts.items():
            self.followers[gram[:-1]][gram[-1]] = count
        self.discounts = [self.discounts_of(length) for length in range(1, order + 1)]

    def discounts_of(self, length):
        n = Counter(count for gram, count in self.counts.items() if len(gram) == length)
        if not (n[1] and n[2] and n[3]):
            return (0.5, 1.0, 1.5)
        y = n[1] / (n[1] + 2 * n[2])
        found = tuple(count - (count + 1) * y * n[count + 1] / n[count] for count in (1, 2, 3))
        return found if all(0 <= each <= count for count, each in enumerate(found, 1)) else (0.5, 1.0, 1.5)

    def probability(self, history, token):
        history = tuple(history)[max(0, len(history) - self.order + 1) :]
        lower = 1 / self.vocab_size if not history else self.probability(history[1:], token)
        behind = self.followers.get(history, {})
        total = sum(behind.values())
        if not total:
            return lower

        def taken(count):
            return 0.0 if not count else self.discounts[len(history)][min(count, 3) - 1]

        left = sum(taken(count) for count in behind.values()) / total
        count = behind.get(token, 0)
        return (count - taken(count)) / total + left * lower


VOCABULARY = 6
DOCUMENTS = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=30), min_size=1, max_size=6)


def packed(documents):
    starts = np.cumsum([0, *(len(document) for document in documents[:-1])])
    return np.concatenate([np.array(document, dtype=np.int64) for document in documents]), starts


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS, DOCUMENTS, st.integers(1, 4))
def test_the_bits_are_those_of_the_definition(training, held_out, order):
    definition = Definition(training, VOCABULARY, order)
    found = NGrams.count(*packed(training), VOCABULARY, order).bits(*packed(held_out))
    wanted = [definition.probability((MARK, *document[:place]), token) for document in held_out for place, token in enumerate(document)]
    np.testing.assert_allclose(2.0**-found, wanted, rtol=1e-9)


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS, st.lists(st.integers(0, VOCABULARY - 1), max_size=6), st.integers(1, 4), st.booleans())
def test_the_shares_behind_any_history_sum_to_one_and_are_those_of_the_definition(training, history, order, begins):
    shares = NGrams.count(*packed(training), VOCABULARY, order).shares(history, begins)
    assert shares.sum() == pytest.approx(1.0, abs=1e-9) and (shares >= 0).all()
    definition = Definition(training, VOCABULARY, order)
    known = (MARK, *history) if begins else tuple(history)
    np.testing.assert_allclose(shares, [definition.probability(known, token) for token in range(VOCABULARY)], rtol=1e-9, atol=1e-15)


def test_a_text_with_enough_n_grams_is_discounted_by_what_they_say():
    generator = np.random.default_rng(3)
    tokens = generator.zipf(1.5, 4000) % 50
    ngrams = NGrams.count(tokens, np.array([0]), 50, 3)
    assert all(each.discounts != (0.5, 1.0, 1.5) for each in ngrams.orders[1:])
    definition = Definition([tokens.tolist()], 50, 3)
    np.testing.assert_allclose([each.discounts for each in ngrams.orders], definition.discounts)
    held_out = generator.zipf(1.5, 200) % 50
    known = [MARK, *held_out.tolist()]
    wanted = [definition.probability(known[: place + 1], token) for place, token in enumerate(held_out.tolist())]
    np.testing.assert_allclose(2.0 ** -ngrams.bits(held_out, np.array([0])), wanted, rtol=1e-9)
