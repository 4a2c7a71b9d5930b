"""Which sequences each process learns from: together all of an update's, each once, whatever their number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.config.train import TrainConfig
from cllm.data import Batches
from cllm.data.pipeline import prepare
from cllm.distributed.reduce import clip_, norm_of, row_squares
from cllm.distributed.share import Share
from cllm.runtime.errors import UserError


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 8), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_shares_are_disjoint_and_whole(sequences, piece, size, whole_pieces, dealt):
    dealt = dealt and whole_pieces
    shares = [Share(sequences, piece, rank, size, whole_pieces, dealt) for rank in range(size)]
    taken = [number for share in shares for first, count in share.pieces() for number in range(first, first + count)]
    assert sorted(taken) == list(range(sequences))
    assert dealt or taken == sorted(taken)  # contiguous runs in the order of ranks
    assert max(len(share.pieces()) for share in shares) <= shares[0].rounds
    assert all(1 <= count <= piece for share in shares for _, count in share.pieces())


@pytest.mark.parametrize("shuffle", ["epoch", "random", "none"])
def test_windows_are_the_same_however_they_are_cut(tmp_path, shuffle):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20)
    split = prepare(tmp_path / "text.txt", tmp_path / "tokens", tokenizer="char", val_fraction=0.1).train
    whole = Batches(split, 8, 12, seed=5, shuffle=shuffle).batch(3)
    for size in (1, 2, 3, 4, 5):
        parts = [part for rank in range(size) for part in Share(12, 2, rank, size).microbatches(Batches(split, 8, 1, seed=5, shuffle=shuffle), 3)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)


def test_too_many_processes_are_refused_with_the_remedy():
    class World:
        rank, size = 0, 5

    with pytest.raises(UserError, match=r"an update has 4 sequences for 5 processes. Raise batch_size or grad_accum"):
        Share.of(TrainConfig(batch_size=2, grad_accum=2), World())
    with pytest.raises(UserError, match=r"4 leaves of 2 sequences \(unit\)"):
        Share.of(TrainConfig(batch_size=8, deterministic=True, unit=2), World())


@pytest.mark.parametrize("shape", [(1, 40000), (7, 300), (5,), (3, 1), (6, 5, 4)])
def test_the_squares_of_a_row_do_not_depend_on_its_neighbours(shape):
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = row_squares(gradient)
    for cut in range(shape[0] + 1):
        assert torch.equal(torch.cat([row_squares(gradient[:cut]), row_squares(gradient[cut:])]), whole)
    assert norm_of([whole], 0) == pytest.approx(float(gradient.double().norm()), rel=1e-12)


def test_clipping_follows_torch():
    ours = [torch.randn(8, 3, generator=torch.Generator().manual_seed(2)), torch.ones(5)]
    theirs = [torch.nn.Parameter(each.clone()) for each in ours]
    for parameter, each in zip(theirs, ours):
        parameter.grad = each.clone()
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    clip_(ours, norm_of([row_squares(each) for each in ours], 0), 0.5)
    for parameter, each in zip(theirs, ours):
        torch.testing.assert_close(each, parameter.grad, rtol=1e-6, atol=0)
