"""Runs of 13 words that stand in text for evaluation are found wherever they stand, and nothing else is."""

import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.clean.decontaminate import LENGTH, arranged, grams_of, judge, overlap
from cllm.data.clean.normalise import normalise
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
    assert judge(leaked, split(leaked), grams, Rules()).startswith("max_evaluation_overlap: ")
    assert judge(FINNISH, split(FINNISH), grams, Rules()) == ""
    assert judge(leaked, split(leaked), grams, Rules().changed({"max_evaluation_overlap": "off"})) == ""
    assert judge(leaked, split(leaked), grams, Rules(max_evaluation_overlap=0.5)) == ""


ACCENTS = "un \u00e9t\u00e9 o\u00f9 le caf\u00e9 \u00e9tait tr\u00e8s cher pr\u00e8s de la for\u00eat \u00e0 c\u00f4t\u00e9"
OFFICE = "the first officer of the staff office was efficient and flew a different flag"
IN_DOCUMENTS = {
    "composed": (unicodedata.normalize("NFD", ACCENTS), ACCENTS, False),
    "taken apart, in code": (ACCENTS, unicodedata.normalize("NFD", ACCENTS), True),
    "ligatures": (OFFICE, OFFICE.replace("ffi", "\ufb03").replace("fi", "\ufb01").replace("fl", "\ufb02"), False),
    "links": (OFFICE, OFFICE.replace("officer", "[officer](https://example.org/a_(b)?c=d)").replace("efficient", '[efficient](/e "A title")'), False),
    "notes": (OFFICE.replace("staff", "staff[3]"), OFFICE.replace("efficient", "efficient[^12]"), False),
    "double width": (OFFICE, "".join(chr(ord(each) + 0xFEE0) if each != " " else each for each in OFFICE), False),
    "soft hyphens": (OFFICE.replace("ff", "f\u00adf"), OFFICE, False),
}


@pytest.mark.parametrize("form", IN_DOCUMENTS)
def test_the_form_of_letters_does_not_matter(form):
    evaluation, text, is_code = IN_DOCUMENTS[form]
    text = normalise(text, is_code, Rules())[0]
    assert judge(text, split(text), grams_of([evaluation]), Rules()).startswith("max_evaluation_overlap: ")


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
