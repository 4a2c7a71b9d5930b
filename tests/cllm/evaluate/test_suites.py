"""The suites of `cllm evaluate`: figures by hand, on texts whose answers are known."""

import gzip
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.config.model import ModelConfig
from cllm.data.pipeline import prepare
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.evaluate import code_suite, prose_suite
from cllm.evaluate.baselines import compressed_bits_per_byte, count_ngrams
from cllm.evaluate.documents import score_documents
from cllm.evaluate.held_out import Document, documents, ngram_bits_per_byte, ngram_writer
from cllm.evaluate.memorised import stand_in
from cllm.evaluate.ngram import NGrams
from cllm.evaluate.shares import Share
from cllm.model.model import Model
from cllm.runtime.errors import UserError

CODE = '''import json


def outer(one, two=(1,
                    2)):
    """Adds."""
    total = one + len(two)

    # a note
    return total


class Shape:
    def area(self):
        width = self.width
        height = self.height
        return width * height

    def one_line(self): return 1


VALUE = 3
'''


class Tokens:
    """Packed tokens in memory."""

    def __init__(self, tokens):
        self.tokens, self.num_tokens = np.asarray(tokens, dtype=np.int64), len(tokens)

    def read(self, start, count):
        assert start >= 0 and start + count <= self.num_tokens
        return self.tokens[start : start + count]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text").mkdir()
    for number in range(12):
        (folder / "text" / f"part{number}.py").write_text(CODE.replace("total", f"total{number}") * 2)
    return prepare(folder / "text", folder / "tokens", vocab_size=320, val_fraction=0.4)


# -- memorisation ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data(), st.integers(1, 5))
def test_pieces_are_found_where_a_naive_search_finds_them(data, length):
    train = data.draw(st.lists(st.integers(0, 3), max_size=60))
    pieces = data.draw(st.lists(st.lists(st.integers(0, 3), min_size=length, max_size=length), max_size=8))
    naive = [any(train[start : start + length] == piece for start in range(len(train))) for piece in pieces]
    assert stand_in(Tokens(train), pieces).tolist() == naive


def test_pieces_are_found_across_what_is_read_at_a_time(monkeypatch):
    import cllm.evaluate.memorised as memorised

    monkeypatch.setattr(memorised, "_TOGETHER", 7)
    train = np.random.default_rng(0).integers(0, 60_000, 100)
    pieces = [train[start : start + 5].tolist() for start in range(96)] + [[1, 2, 3, 4, 5]]
    assert stand_in(Tokens(train), pieces).tolist() == [True] * 96 + [False]


def test_pieces_of_several_lengths_are_refused_and_no_pieces_are_none():
    with pytest.raises(UserError, match="same number of tokens"):
        stand_in(Tokens([1, 2, 3]), [[1], [1, 2]])
    assert stand_in(Tokens([1, 2, 3]), []).tolist() == [] and stand_in(Tokens([1]), [[1, 2]]).tolist() == [False]


# -- baselines -------------------------------------------------------------------------------------------------------------


def test_the_bits_of_n_grams_are_of_the_targets_that_a_model_is_scored_on(dataset, monkeypatch):
    import cllm.evaluate.held_out as held_out

    ngrams, split, tokenizer = count_ngrams(dataset.train), dataset.val, dataset.tokenizer
    assert split.num_documents > 1 and dataset.train.num_documents > 1
    scores = score_documents(
        Model(ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=32)), split, tokenizer, 32
    )
    bits = targets = 0.0
    for start, length in zip(split.document_starts, split.document_lengths):
        found = ngrams.bits(split.read(int(start), int(length)), np.array([0]))
        bits += found[1:].sum()
        targets += len(found) - 1
    assert targets == scores.targets.sum()
    assert ngram_bits_per_byte(ngrams, split, tokenizer) == pytest.approx(bits / scores.num_bytes.sum())
    monkeypatch.setattr(held_out, "_TOGETHER", 1)  # a document at a time
    assert ngram_bits_per_byte(ngrams, split, tokenizer) == pytest.approx(bits / scores.num_bytes.sum())


def test_a_large_split_is_counted_in_pieces_from_all_of_it(dataset, monkeypatch):
    import cllm.evaluate.baselines as baselines

    counted = []
    monkeypatch.setattr(baselines, "_PIECE", 50)
    monkeypatch.setattr(NGrams, "count", lambda *arguments: counted.append(arguments))
    count_ngrams(dataset.train, most_tokens=200)
    tokens, starts, vocab_size, _ = counted[0]
    assert len(tokens) == 200 and vocab_size == dataset.train.vocab_size and {0, 50, 100, 150} <= set(starts.tolist())
    assert tokens[:50].tolist() == dataset.train.read(0, 50).tolist()
    assert tokens[150:].tolist() == dataset.train.read(dataset.train.num_tokens - 50, 50).tolist()
    for start in set(starts.tolist()) - {0, 50, 100, 150}:
        assert tokens[start - 1] == dataset.tokenizer.eot_id


def test_compression_is_counted_in_bits_for_each_byte():
    content = b"again and again " * 50
    found = compressed_bits_per_byte(content)
    assert found["gzip"] == 8 * len(gzip.compress(content, 9, mtime=0)) / len(content) and 0 < found["xz"] < 2


def test_n_grams_write_what_is_likeliest_and_the_same_for_the_same_prompts():
    tokenizer = Tokenizer.train(["abcabc"], vocab_size=300, kind="char")
    ngrams = NGrams.count(np.array(tokenizer.encode("abc" * 30)), np.array([0]), tokenizer.vocab_size)
    write = ngram_writer(ngrams, tokenizer)
    assert tokenizer.decode(write([tokenizer.encode("ab")], 6, 0.0, lambda tokens: False)[0]) == "cabcab"
    prompts = [tokenizer.encode("a"), tokenizer.encode("b")]
    assert write(prompts, 9, 1.0, lambda tokens: False) == write(prompts, 9, 1.0, lambda tokens: False)
    assert write(prompts, 9, 1.0, lambda tokens: len(tokens) == 2)[1] == write(prompts, 2, 1.0, lambda tokens: False)[1]


@given(st.integers(0, 60), st.integers(1, 60))
def test_an_interval_holds_its_share(hits, more):
    share = Share(hits, hits + more)
    low, high = share.interval()
    assert 0 <= low <= share.value <= high <= 1 and share.interval(0.5)[0] >= low
    assert Share(0, 0).value is None and Share(0, 0).interval() is None


def test_the_interval_is_that_of_wilson():
    low, high = Share(8, 10).interval()  # worked out in Brown, Cai and DasGupta 2001
    assert (low, high) == pytest.approx((0.490, 0.943), abs=1e-3)


# -- code ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([CODE * 4], vocab_size=320)


@pytest.fixture(scope="module")
def tasks(tokenizer):
    document = Document("a.py", np.array(tokenizer.encode(CODE)), CODE)
    return code_suite.functions([document, Document("b.txt", document.tokens, CODE)], tokenizer, 512, 10)


def test_functions_are_cut_behind_their_headers(tasks, tokenizer):
    assert [task.name for task in tasks] == ["a.py:4", "a.py:14"] and [task.indent for task in tasks] == [0, 4]
    outer, area = tasks
    assert outer.statement == "def outer(one, two=(1,\n                    2)):" and area.statement == "class Shape:\n    def area(self):"
    assert tokenizer.decode(outer.prompt) == "import json\n\n\n" + outer.statement and outer.body.endswith("return total")
    assert outer.line == "# a note" and outer.before == "total = one + len(two)" and area.line == "height = self.height"
    assert tokenizer.decode(area.line_prompt).endswith("width = self.width")
    assert area.behind.startswith("\n        return width * height\n") and area.behind.endswith("VALUE = 3\n")


def test_true_bodies_are_python_and_what_is_not_is_told(tasks, tokenizer):
    true = code_suite.judge(tasks, code_suite.true_bodies(tasks, tokenizer))
    assert true.parse.value == true.compiles.value == 1 and true.imports.trials == 0
    judged = code_suite.judge(tasks, ["\n    return )", "\n        import json, no_such_thing_here\n        from os.path import join\n        break"])
    assert judged.parse.hits == 1 and judged.compiles.hits == 0  # break outside of a loop
    assert (judged.imports.hits, judged.imports.trials) == (2, 3)
    assert code_suite.judge(tasks, ["", "\n"]).parse.hits == 0


def test_nothing_that_was_written_is_run(tasks, tmp_path):
    marker = tmp_path / "ran"
    body = f"\n    import antigravity\n    open({str(marker)!r}, 'w')\nopen({str(marker)!r}, 'w')"
    assert code_suite.judge(tasks[:1], [body]).parse.hits == 1
    assert not marker.exists() and "antigravity" not in sys.modules


def test_a_body_ends_where_its_function_ends(tasks, tokenizer):
    text = "\n    a = 1\n\n    b = 2\nnext = 3\n    c = 4"

    def writer(prompts, most, temperature, ends):
        tokens = tokenizer.encode(text)
        count = next(count for count in range(len(tokens)) if ends(tokens[:count]))
        return [tokens[:count] for _ in prompts]

    bodies = code_suite.bodies(tasks[:1], tokenizer, writer)
    assert bodies == ["\n    a = 1\n\n    b = 2"]


def test_lines_are_compared_by_their_edits():
    assert code_suite.similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert code_suite.similarity("", "") == 1.0 and code_suite.similarity("", "ab") == 0.0 and code_suite.similarity("ab", "ab") == 1.0


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_similarity_is_symmetric_and_one_only_for_equals(one, other):
    value = code_suite.similarity(one, other)
    assert value == code_suite.similarity(other, one) and 0 <= value <= 1 and (value == 1) == (one == other)


def test_next_lines_are_those_of_the_writer(tasks, tokenizer):
    def writer(prompts, most, temperature, ends):
        assert temperature == 0.0
        tokens = tokenizer.encode("\n\n    # a note\n    return")
        count = next(count for count in range(len(tokens) + 1) if ends(tokens[:count]))
        return [tokens[:count] for _ in prompts]

    found = code_suite.compare_lines(tasks, code_suite.next_lines(tasks, tokenizer, writer))
    assert found.exact.hits == 1 and found.exact.trials == 2


def test_missing_lines_are_asked_for_with_what_stands_around_them(tasks, tokenizer):
    taught, seen = tokenizer.with_fim(), []

    def writer(prompts, most, temperature, ends):
        seen.extend(prompts)
        return [tokenizer.encode("\n    # a note\n    and more") for _ in prompts]

    lines = code_suite.missing_lines(tasks, taught, writer, 512)
    assert lines == ["# a note", "# a note"]
    for task, prompt in zip(tasks, seen):
        assert prompt == [taught.fim.prefix, *task.line_prompt, taught.fim.suffix, *tokenizer.encode(task.behind), taught.fim.middle]
    code_suite.missing_lines(tasks, taught, writer, 100)
    assert [len(prompt) for prompt in seen[2:]] == [100 - code_suite.LINE_TOKENS] * 2


# -- prose -----------------------------------------------------------------------------------------------------------------

TOPICS = {
    "sea/one.txt": "the sea and the ship under sail met wind and wave on the water",
    "hill/two.txt": "a hill with sheep and grass lies behind our stone house near town",
}


@pytest.fixture(scope="module")
def prose_documents(tokenizer):
    texts = {name: "\n\n".join(f"{words} {number}." for number in range(8)) for name, words in TOPICS.items()}
    return [Document(name, np.array(tokenizer.encode(text)), text) for name, text in texts.items()]


def test_pairs_have_the_right_paragraph_and_one_from_elsewhere(prose_documents, tokenizer):
    for pairs in (prose_suite.next_pairs(prose_documents, tokenizer, 6), prose_suite.source_pairs(prose_documents, tokenizer, 6)):
        assert len(pairs) == 6
        for pair in pairs:
            assert ("sea" in pair.before) == ("sea" in pair.true) != ("sea" in pair.other)
            assert tokenizer.decode(pair.before_tokens) in pair.before + "\n\n" and pair.true.startswith(tokenizer.decode(pair.true_tokens))
        assert prose_suite.prefers_by_words(pairs).value == 1
    assert prose_suite.source_pairs(prose_documents[:1], tokenizer, 6) == []


def test_a_paragraph_wins_by_what_the_one_before_it_helps(prose_documents, tokenizer):
    pairs = prose_suite.next_pairs(prose_documents, tokenizer, 6)

    def bits(tokens):  # a token that was seen before costs half a bit, any other three
        return np.array([0.5 if token in tokens[:place] else 3.0 for place, token in enumerate(tokens.tolist())])

    assert prose_suite.prefers(pairs, bits).value == 1
    assert prose_suite.prefers(pairs, lambda tokens: np.ones(len(tokens))).value == 0.5  # nothing helps: as often right as chance


def test_variety_is_counted_by_hand():
    found = prose_suite.variety(["a b a b a b", "a b c d e"])
    assert found.num_words == 11 and found.distinct == pytest.approx((5 / 11, 5 / 9, 5 / 7))
    assert found.repetition == pytest.approx((1 / 3 + 0) / 2)
    assert prose_suite.variety([]).repetition == 0.0 and not math.isnan(prose_suite.variety([""]).distinct[0])


def test_documents_come_with_their_text_and_without_the_end_token(dataset):
    found = list(documents(dataset.val, dataset.tokenizer))
    assert [each.name for each in found] == dataset.val.document_names()
    for each in found:
        assert (
            dataset.tokenizer.eot_id not in each.tokens and each.text == dataset.tokenizer.decode(each.tokens) and each.text.startswith("import json")
        )
