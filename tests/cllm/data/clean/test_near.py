"""Near duplicates: what is a candidate, what is dropped, and that order, partitions and chains change nothing."""

import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.clean import near
from cllm.data.clean.components import edges, forest, groups, part, roots, unique
from cllm.data.clean.near import BANDS, deduplicate, jaccard, shingles, signature, verify
from cllm.data.clean.words import split
from cllm.runtime.errors import DataError

rensa = pytest.importorskip("rensa", reason="needs cllm[data]")


def grams_of(text):
    """The word 5-grams of a text of plain small words."""
    words = text.split()
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def similarity(a, b):
    a, b = grams_of(a), grams_of(b)
    return len(a & b) / max(len(a | b), 1)


def edited(words, share, draw):
    """Words of which a share was replaced, left out or doubled; half of the time all in one place."""
    words = list(words)
    times = round(len(words) * share)
    start = draw.randrange(max(len(words) - times, 1))
    places = range(start, start + times) if draw.random() < 0.5 else sorted(draw.sample(range(len(words)), times))
    for place in places:
        words[place] = draw.choice(["", f"new{draw.randrange(1000)}", f"{words[place]} {words[place]}"])
    return " ".join(word for word in words if word)


def planted(num_originals, copies, seed=1, edits=0.4):
    """Texts of 60 to 400 words, and from each `copies` with edits of 0 to 40 %, shuffled; with the number of each one's original."""
    draw = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(3000)]
    texts = []
    for i in range(num_originals):
        words = draw.choices(vocabulary, k=draw.randint(60, 400))
        texts += [(" ".join(words), i)] + [(edited(words, edits * draw.random() ** 3, draw), i) for _ in range(copies)]
    draw.shuffle(texts)
    return texts


def test_planted_duplicates_are_found_and_nothing_else():
    texts = planted(150, 3)
    cut = [split(text) for text, _ in texts]
    dropped = deduplicate(np.stack([signature(words) for words in cut]), lambda i: shingles(cut[i]), 0.8)
    for copy, (kept, how_similar) in dropped.items():
        assert kept not in dropped and kept < copy
        assert how_similar == pytest.approx(similarity(texts[copy][0], texts[kept][0])) and how_similar >= 0.8
    alike = {}
    for i, (_, original) in enumerate(texts):
        alike.setdefault(original, []).append(i)
    near_pairs = [(a, b) for same in alike.values() for a, b in combinations(same, 2) if similarity(texts[a][0], texts[b][0]) > 0.85]
    missed = [(a, b) for a, b in near_pairs if a not in dropped and b not in dropped]
    assert len(near_pairs) > 100
    assert len(missed) <= 0.01 * len(near_pairs)


def test_the_signatures_are_the_same_for_ever():
    """They are stored; another version of rensa or of our words must be another VERSION."""
    assert near.VERSION == "words 1, rensa 2, 20 x 6"
    keys = signature(split("It was the best of times, it was the worst of times, it was the age of wisdom."))
    assert [f"{key:016x}" for key in keys[:3].tolist()] == GOLDEN
    assert len(keys) == BANDS
    rows = rensa.RMinHash.digest_matrix_from_flat_token_hashes(np.arange(1, 9, dtype=np.uint64), np.array([0, 8], np.uint64), 4, 42).to_rows()
    assert rows[0] == GOLDEN_RENSA


GOLDEN = ["fdb535b5421646d4", "cb9be9d042f4c877", "69fbe0da0377f56e"]
GOLDEN_RENSA = [63527284, 521634037, 1074232632, 556374807]


def test_another_version_of_rensa_is_refused(monkeypatch):
    class Other:
        ALGORITHM_VERSION = 3

    near._rensa.cache_clear()
    monkeypatch.setattr(rensa, "RMinHash", Other)
    with pytest.raises(DataError, match="version 3"):
        signature(split("a b c d e f"))
    near._rensa.cache_clear()


def test_short_documents_have_no_bands_and_are_never_near():
    assert not signature(split("one two three four")).any()
    assert not len(shingles(split("one two three four")))
    bands = np.zeros((3, BANDS), np.uint64)
    assert deduplicate(bands, lambda i: np.empty(0, np.uint64), 0.8) == {}
    assert deduplicate(np.zeros((0, BANDS), np.uint64), lambda i: np.empty(0, np.uint64), 0.8) == {}


def test_a_chain_does_not_fall_as_a_whole():
    """0 is like 1, 1 is like 2, ..., but 0 is not like 2: every other one is kept."""
    sets = [np.arange(i * 10, i * 10 + 100, dtype=np.uint64) for i in range(8)]  # neighbours 0.82, next 0.67
    bands = np.ones((8, BANDS), np.uint64)
    dropped = deduplicate(bands, lambda i: sets[i], 0.8)
    assert sorted(dropped) == [1, 3, 5, 7]
    assert all(dropped[i][0] == i - 1 for i in dropped)
    assert jaccard(sets[0], sets[1]) == pytest.approx(90 / 110)


def test_equal_bands_alone_drop_nothing():
    sets = [np.arange(i * 1000, i * 1000 + 100, dtype=np.uint64) for i in range(50)]
    assert deduplicate(np.ones((50, BANDS), np.uint64), lambda i: sets[i], 0.8) == {}


def test_documents_of_earlier_data_sets_are_never_dropped():
    same = np.arange(100, dtype=np.uint64)
    bands = np.ones((4, BANDS), np.uint64)
    assert deduplicate(bands, lambda i: same, 0.8, first=3) == {3: (0, 1.0)}


def test_a_large_group_costs_a_bounded_number_of_comparisons():
    loaded = []

    def load(i):
        loaded.append(i)
        return np.arange(i * 1000, i * 1000 + 10, dtype=np.uint64)

    near.verify(np.arange(300), np.ones((300, BANDS), np.uint64), load, 0.8)
    assert len(loaded) == 300


def test_a_pair_in_a_crowd_is_found_by_what_it_shares_besides():
    """300 pages have the key of their template; the last one repeats the one before."""
    bands = np.arange(1, 301 * BANDS + 1, dtype=np.uint64).reshape(301, BANDS)
    bands[:, 0] = 1
    bands[300, 1:] = bands[299, 1:]
    sets = [np.arange(i * 1000, i * 1000 + 10, dtype=np.uint64) for i in range(300)]
    assert deduplicate(bands, lambda i: sets[min(i, 299)], 0.8) == {300: (299, 1.0)}


PAIRS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40)


def slow_roots(num, pairs):
    label = list(range(num))
    for _ in range(num):
        for a, b in pairs:
            label[a] = label[b] = min(label[a], label[b])
    return label


def as_array(pairs):
    return np.array(pairs, np.uint32).reshape(-1, 2)


@given(PAIRS)
@settings(max_examples=100, deadline=None)
def test_components_are_those_of_plain_python(pairs):
    assert roots(31, as_array(pairs)).tolist() == slow_roots(31, pairs)
    found = groups(31, as_array(pairs))
    assert [group.tolist() for group in found if len(group) > 1] == [
        [i for i in range(31) if slow_roots(31, pairs)[i] == root] for root in range(31) if slow_roots(31, pairs).count(root) > 1
    ]


@given(PAIRS, st.integers(0, 40), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_a_forest_can_be_merged_in_any_order(pairs, cut, draw):
    whole = forest(as_array(pairs))
    shuffled = [draw.choice([(a, b), (b, a)]) for a, b in draw.sample(pairs, len(pairs))]
    in_two = forest(np.concatenate([forest(as_array(shuffled[:cut])), forest(as_array(shuffled[cut:]))]))
    assert np.array_equal(whole, in_two)
    assert roots(31, whole).tolist() == slow_roots(31, pairs)


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=60), st.integers(0, 4), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_edges_do_not_depend_on_partitions_or_order(keys, bits, draw):
    rows = [(key, document) for document, key in enumerate(keys)]
    expected = sorted((keys.index(key), document) for key, document in rows if key and keys.index(key) != document)
    draw.shuffle(rows)
    keys, documents = np.array([row[0] for row in rows], np.uint64), np.array([row[1] for row in rows], np.uint32)
    assert edges(keys, documents).tolist() == [list(pair) for pair in expected]
    places = part(keys, bits)
    assert not len(places) or 0 <= places.min() <= places.max() < 2**bits
    cut = [edges(keys[places == i], documents[places == i]) for i in range(2**bits)]
    assert unique(np.concatenate(cut)).tolist() == [list(pair) for pair in expected]


def test_the_result_does_not_depend_on_how_the_work_is_cut():
    texts = planted(60, 4, seed=2)
    cut = [split(text) for text, _ in texts]
    bands = np.stack([signature(words) for words in cut])
    whole = deduplicate(bands, lambda i: shingles(cut[i]), 0.8)
    numbers = np.arange(len(cut), dtype=np.uint32)
    rows = [(bands[:, band], numbers) for band in reversed(range(BANDS))]
    keys, documents = (np.concatenate(column) for column in zip(*rows))
    places = part(keys, 3)
    pairs = np.concatenate([forest(edges(keys[places == i], documents[places == i])) for i in (5, 0, 7, 1, 6, 2, 4, 3)])
    in_parts = {}
    for group in reversed(groups(len(cut), forest(pairs))):
        in_parts |= verify(group, bands[group], lambda i: shingles(cut[i]), 0.8)
    assert in_parts == whole and whole
