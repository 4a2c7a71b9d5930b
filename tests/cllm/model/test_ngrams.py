"""Rows of hashed n-grams: the same from whole numbers and from tensors, spread evenly, and never across the beginning of a document."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cllm import Model, ModelConfig, load, save
from cllm.model.ngrams import NONE, row_of, tokens_before

TOKENS = st.integers(NONE, 2**31)


@given(st.lists(st.tuples(TOKENS, TOKENS, TOKENS), min_size=1, max_size=20), st.integers(1, 2**31 - 1))
def test_tensors_and_whole_numbers_have_the_same_rows(grams, rows):
    for length in (2, 3):
        found = row_of([torch.tensor(column) for column in zip(*grams)][:length], rows).tolist()
        assert found == [row_of(gram[:length], rows) for gram in grams] and all(0 <= row < rows for row in found)


def test_the_hash_is_what_trained_models_have_been_given():
    assert [row_of((5, 3), 4096), row_of((5, NONE), 4096), row_of((5, 3, 9), 1000)] == [3376, 1610, 422]


def test_ngrams_are_spread_over_the_rows():
    tokens = torch.arange(200)
    grid = [each.flatten() for each in torch.meshgrid(tokens, tokens, indexing="ij")]
    counts = torch.bincount(row_of(grid, 10_000), minlength=10_000)
    assert counts.float().mean() == 4 and (counts == 0).float().mean() < 0.05 and counts.max() < 25  # at random 0.018 and about 15


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 2))
def test_a_token_sees_none_of_another_document(lengths, distance):
    tokens = torch.arange(sum(lengths)).unsqueeze(0)
    positions = torch.cat([torch.arange(length) for length in lengths])
    expected = [token - distance if position >= distance else NONE for token, position in zip(tokens[0].tolist(), positions.tolist())]
    assert tokens_before(tokens, positions, distance).tolist() == [expected]
    rows = tokens.repeat(2, 1)
    assert tokens_before(rows, None, distance).tolist() == 2 * [[max(NONE, token - distance) for token in tokens[0].tolist()]]


def test_a_file_keeps_the_tables(tmp_path):
    model = Model(ModelConfig(vocab_size=20, embed_dim=8, num_layers=1, num_heads=1, max_seq_len=8, bigram_rows=30, trigram_rows=40))
    with torch.no_grad():
        for each in (model.model.embed_bigrams, model.model.embed_trigrams):
            each.weight.normal_(generator=torch.Generator().manual_seed(0))
    save(model, tmp_path / "model.cllm")
    loaded, _ = load(tmp_path / "model.cllm")
    tokens = torch.tensor([[1, 2, 3, 4]])
    assert loaded.config == model.config and torch.equal(loaded(tokens), model(tokens))
    assert torch.isfinite(load(tmp_path / "model.cllm", weights="int8")[0](tokens)).all()
