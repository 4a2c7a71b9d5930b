"""The one record for a batch: its device, its targets, and the names under which scripts know it."""

import pytest
import torch

import cllm.train
from cllm.data import IGNORE, Batch

TOKENS = torch.arange(6).reshape(2, 3)
TARGETS = torch.tensor([[1, IGNORE, 3], [IGNORE, 5, 6]])
BOUNDS = torch.tensor([0, 3, 6], dtype=torch.int32)


@pytest.mark.parametrize("bounds", [BOUNDS, None])
def test_a_batch_moves_to_another_device_as_a_whole(bounds):
    batch = Batch(TOKENS, TARGETS, bounds, [4, 7])
    moved = batch.to("meta")
    tensors = [each for each in moved if isinstance(each, torch.Tensor)]
    assert len(tensors) == (2 if bounds is None else 3) and all(each.device.type == "meta" for each in tensors)
    assert (moved.cu_seqlens is None) == (bounds is None) and moved.documents == [4, 7]


def test_a_batch_that_is_where_it_should_be_is_not_copied():
    batch = Batch(TOKENS, TARGETS, BOUNDS)
    assert all(there is here for there, here in zip(batch.to("cpu")[:3], batch[:3]))


def test_only_targets_that_are_predicted_count():
    assert Batch(TOKENS, TARGETS).num_targets == 4
    assert Batch(TOKENS, torch.full_like(TARGETS, IGNORE)).num_targets == 0


def test_a_microbatch_is_a_batch():
    assert cllm.train.Microbatch is Batch
    assert Batch(TOKENS, TARGETS) == (TOKENS, TARGETS, None, (), None, None)
