"""Runs of 13 words that stand in text for evaluation are found wherever they stand, and nothing else is."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.clean.decontaminate import LENGTH, arranged, grams_of, judge, overlap
from cllm.data.clean.rules import Rules
from cllm.data.clean.words import split

from .texts import ENGLISH, FINNISH


def runs(text, size):
    words = text.split()
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]


WORDS = st.lists(st.sampled_from("abcd"), max_size=40).map(" ".join)


@given(st.lists(WORDS, max_size=4), WORDS)
@settings(max_examples=200, deadline=None)
def test_the_overlap_is_what_plain_python_counts(evaluation, text):
    sizes = {each: min(len(each.split()), LENGTH) for each in evaluation}
    expected = 0.0
    for size in {size for size in sizes.values() if size >= 8}:
        known = {run for each in evaluation if sizes[each] == size for run in runs(each, size)}
        mine = runs(text, size)
        expected = max(expected, sum(run in known for run in mine) / max(len(mine), 1))
    assert overlap(split(text), grams_of(evaluation)) == expected


def test_a_question_inside_of_a_document_drops_it():
    grams = grams_of([ENGLISH])
    leaked = FINNISH + "\n> " + ENGLISH[100:260].upper().replace(" ", "\n") + "\n" + FINNISH
    assert judge(split(leaked), grams, Rules()).startswith("max_evaluation_overlap: ")
    assert judge(split(FINNISH), grams, Rules()) == ""
    assert judge(split(leaked), grams, Rules().changed({"max_evaluation_overlap": "off"})) == ""
    assert judge(split(leaked), grams, Rules(max_evaluation_overlap=0.5)) == ""


def test_short_texts_count_as_a_whole_or_not_at_all():
    grams = grams_of(["one two three four five six seven eight", "one two three"])
    assert overlap(split("zero one two three four five six seven eight nine"), grams) == 1 / 3
    assert overlap(split("one two three four five six seven"), grams) == 0
    assert not len(grams_of(["one two three"]).hashes)
    assert overlap(split("one two three"), grams_of([])) == 0


def test_what_was_stored_is_ready_again_and_nothing_is_found_by_chance():
    draw = random.Random(1)
    texts = [" ".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=200)) for _ in range(200)]
    grams = grams_of(texts[:100])
    again = arranged(grams.hashes.copy(), grams.sizes.copy())
    assert np.array_equal(grams_of(reversed(texts[:100])).hashes, grams.hashes)
    assert [overlap(split(text), again) for text in texts[:100]] == [1.0] * 100
    assert [overlap(split(text), again) for text in texts[100:]] == [0.0] * 100
