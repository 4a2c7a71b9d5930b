"""Batches: pure functions of (data, seed, index); every token in its turn; documents kept apart."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data import IGNORE, Batches, TokenSplit, Windows
from cllm.data.tokens.shards import ShardWriter
from cllm.files import DATA, new_folder
from cllm.runtime.errors import DataError, UserError

DOCUMENTS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
SIZES = st.tuples(st.integers(1, 12), st.integers(1, 7))


def make(folder, lengths):
    """A split whose token at position p is p + 1: a batch then tells where it comes from."""
    with new_folder(folder, DATA) as temporary:
        writer = ShardWriter(temporary, 2000, "0" * 64, None, shard_tokens=16)
        first = 1
        for number, length in enumerate(lengths):
            writer.append(np.arange(first, first + length))
            writer.end_document(str(number), length, length)
            first += length
        writer.close()
    return TokenSplit(folder)


@pytest.fixture(scope="module")
def split_of(tmp_path_factory):
    made = {}

    def get(lengths):
        key = tuple(lengths)
        if key not in made:
            made[key] = make(tmp_path_factory.mktemp("split") / "tokens", lengths)
        return made[key]

    return get


def check_documents(split, batch):
    """cu_seqlens cuts exactly where the document (or the row) changes, and no target belongs to another document than its input."""
    rows, seq_len = batch.tokens.shape
    tokens, targets = batch.tokens.flatten().tolist(), batch.targets.flatten().tolist()
    document = [split.document_at(t - 1) if t else -1 for t in tokens]
    cuts = [0]
    for i in range(1, rows * seq_len):
        if i % seq_len == 0 or document[i] != document[i - 1] or (tokens[i] and tokens[i] != tokens[i - 1] + 1):
            cuts.append(i)
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens.tolist() == [*cuts, rows * seq_len]
    for i, target in enumerate(targets):
        if target != IGNORE:
            assert target == tokens[i] + 1 and split.document_at(target - 1) == document[i]
    assert batch.documents == sorted(set(document) - {-1})


@given(DOCUMENTS, SIZES, st.booleans())
@settings(max_examples=60, deadline=None)
def test_windows_make_every_token_a_target_exactly_once(split_of, lengths, sizes, mask):
    split = split_of(lengths)
    windows = Windows(split, *sizes, document_mask=mask)
    seen = []
    for batch in windows:
        assert batch.tokens.shape == batch.targets.shape and batch.tokens.shape[1] == sizes[0] and len(batch.tokens) <= sizes[1]
        valid = batch.targets != IGNORE
        assert torch.equal(batch.targets[valid], batch.tokens[valid] + 1)
        seen += batch.targets[valid].tolist()
        if mask:
            check_documents(split, batch)
        else:
            assert batch.cu_seqlens is None
    skipped = {int(start) + 1 for start in split.document_starts} if mask else {1}
    assert seen == [t for t in range(1, split.num_tokens + 1) if t not in skipped]
    assert windows.num_targets == len(seen)


@given(DOCUMENTS.filter(lambda lengths: sum(lengths) > 12), SIZES, st.integers(0, 2**63 - 1), st.integers(0, 500), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_batch_depends_on_seed_and_index_alone(split_of, lengths, sizes, seed, index, mask):
    split = split_of(lengths)
    for shuffle in ("epoch", "random", "none"):
        first = Batches(split, *sizes, seed, shuffle=shuffle, document_mask=mask)
        wanderer = Batches(split, *sizes, seed, shuffle=shuffle, document_mask=mask)
        for other in (0, index + 3, index // 2):
            wanderer.batch(other)
        a, b = first.batch(index), wanderer[index]
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) and a.documents == b.documents
        assert a.tokens.dtype == a.targets.dtype == torch.int64 and a.tokens.shape == (sizes[1], sizes[0])
        valid = a.targets != IGNORE
        assert torch.equal(a.targets[valid], a.tokens[valid] + 1)
        if mask:
            assert torch.equal(a.cu_seqlens, b.cu_seqlens)
            check_documents(split, a)
        else:
            assert int((~valid).sum()) <= sizes[1], "only where the ring closes there is no target"


@given(st.integers(13, 300), SIZES, st.integers(0, 99), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_a_permutation_of_windows_that_do_not_overlap(split_of, length, sizes, seed, epoch):
    split = split_of([length])
    rows = Batches(split, sizes[0], 1, seed)
    windows = rows.windows_per_epoch
    inputs = torch.cat([rows.batch(epoch * windows + i).tokens[0] for i in range(windows)]).tolist()
    assert len(inputs) == len(set(inputs)) == rows.tokens_per_epoch and length - sizes[0] < len(inputs) <= length
    several = Batches(split, sizes[0], sizes[1], seed)
    joined = torch.cat([several.batch(i).tokens for i in range(several.num_batches)])[: several.windows_per_epoch]
    single = torch.cat([rows.batch(i).tokens for i in range(windows)])
    assert torch.equal(joined, single), "the windows are the same whatever the batch size"


def test_epochs_and_seeds_differ_and_random_windows_do_not_depend_on_the_batch_size(split_of):
    split = split_of([500])
    rows = Batches(split, 8, 1, seed=3)
    per_epoch = rows.windows_per_epoch
    orders = [[int(rows.batch(e * per_epoch + i).tokens[0, 0]) for i in range(per_epoch)] for e in range(3)]
    assert len({tuple(order) for order in orders}) == 3 and len({min(order) for order in orders}) > 1, "each epoch has its own order and offset"
    assert not torch.equal(rows.batch(0).tokens, Batches(split, 8, 1, seed=4).batch(0).tokens)
    whole = torch.cat([Batches(split, 8, 12, 3, shuffle="random").batch(i).tokens for i in range(5)])
    parts = torch.cat([Batches(split, 8, 5, 3, shuffle="random").batch(i).tokens for i in range(12)])
    assert torch.equal(whole, parts)
    starts = {int(t) for t in whole[:, 0]}
    assert len(starts) > 30 and min(starts) >= 1 and max(starts) <= 492


def test_random_windows_reach_the_first_and_the_last_token(split_of):
    batches = Batches(split_of([9]), 8, 64, shuffle="random")
    drawn = batches.batch(0)
    assert set(drawn.tokens[:, 0].tolist()) == {1} and not (drawn.targets == IGNORE).any()


def test_the_order_of_the_data_is_the_same_on_every_machine_and_numpy(split_of):
    batch = Batches(split_of([50, 50]), 4, 3, seed=1337)
    assert batch.batch(0).tokens[:, 0].tolist() == [52, 20, 4]
    assert Batches(split_of([50, 50]), 4, 3, seed=1337, shuffle="random").batch(7).tokens[:, 0].tolist() == [39, 36, 40]


def test_data_smaller_than_a_batch_goes_on_with_the_next_epoch(split_of):
    batches = Batches(split_of([10]), 4, 16)
    assert batches.windows_per_epoch == 2 and batches.num_batches == 1
    batch = batches.batch(5)
    assert batch.tokens.shape == (16, 4)
    assert batches.num_batches_for(0.1) == 1 and batches.num_batches_for(100) == 13 and batches.epoch_of(1) == 8.0


def test_without_shuffling_windows_come_in_order(split_of):
    batches = Batches(split_of([20]), 5, 2, shuffle=False)
    assert batches.batch(0).tokens.tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert batches.batch(2).tokens[:, 0].tolist() == [1, 6]
    assert batches.batch(1).targets[-1].tolist() == [17, 18, 19, 20, IGNORE]


def test_data_too_short_for_a_window_says_what_would_fit(split_of):
    with pytest.raises(DataError, match=r"has 10 tokens; one window of --seq-len 64 needs 65. Use --seq-len 9 or less"):
        Batches(split_of([10]), 64, 4)
    with pytest.raises(DataError, match="Use more text"):
        Batches(split_of([1]), 64, 4)
    assert len(Windows(split_of([1]), 64)) == 0 and Windows(split_of([1]), 64).num_targets == 0


def test_wrong_settings_are_explained(split_of):
    for wrong, message in (
        ({"seq_len": 0}, "seq_len"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"shuffle": "maybe"}, "epoch, random, none"),
    ):
        with pytest.raises(UserError, match=message):
            Batches(**{"split": split_of([100]), "seq_len": 4, "batch_size": 2, **wrong})


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("count", [1, 3, 8, 10, 99])
def test_a_part_of_the_windows_is_spread_evenly_and_each_is_as_in_the_whole(split_of, count, mask):
    split = split_of([5, 1, 30, 2, 39])
    whole = Windows(split, 8, 3, document_mask=mask)
    part = whole.part(count)
    assert part.num_rows == min(count, whole.num_rows) and whole.num_rows == whole.num_windows == 10
    everything = [row for batch in whole for row in zip(batch.tokens.tolist(), batch.targets.tolist())]
    chosen = [row for batch in part for row in zip(batch.tokens.tolist(), batch.targets.tolist())]
    places = [everything.index(row) for row in chosen]
    assert places == [number * 10 // part.num_rows for number in range(part.num_rows)]
    assert part.num_targets == sum(target != -100 for _, targets in chosen for target in targets)
    assert len(part) == -(-part.num_rows // 3) and whole.num_rows == 10, "the whole is left as it was"
