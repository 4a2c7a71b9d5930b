"""Data that a thread makes one update ahead: the same data, its errors told where it is asked for, and an end of the thread."""

import threading

import pytest
import torch

from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data.pipeline import prepare
from cllm.model.model import Model
from cllm.runtime.errors import UserError
from cllm.train.faults import Faults
from cllm.train.loader import Loader
from cllm.train.staging import for_device
from cllm.train.update_data import UpdateData


def loaders():
    return [each for each in threading.enumerate() if each.name.startswith("cllm-loader")]


def test_a_value_is_made_ahead_in_one_thread_and_anew_where_another_one_is_asked_for():
    made = []

    def make(key):
        made.append((key, threading.current_thread().name))
        return key * 10

    loader = Loader(make)
    assert [loader.take(1, 2), loader.take(2, 3), loader.take(7, 8), loader.take(8, 9)] == [10, 20, 70, 80]
    assert loader.run(lambda: threading.current_thread().name).startswith("cllm-loader")
    loader.close()
    assert [key for key, _ in made if key != 3 and key != 9] == [1, 2, 7, 8] and {name for _, name in made} == {"cllm-loader_0"}


def test_what_goes_wrong_is_told_when_the_value_is_asked_for_and_not_before():
    def make(key):
        if key == 2:
            raise UserError("shard-00001.bin is gone.")
        return key

    loader = Loader(make)
    assert loader.take(1, 2) == 1
    with pytest.raises(UserError, match=r"shard-00001\.bin is gone"):
        loader.take(2, 3)
    assert loader.take(3, 4) == 3
    loader.close()
    assert not loaders()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("one two three\n" * 60 + "four five six\n" * 60)
    return prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.1)


def test_batches_made_ahead_are_those_that_are_made_when_they_are_asked_for(dataset):
    """Through a ramp of the batch size, a rollback, and from an update in the middle, as after a resume."""
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=16))
    settings = {"steps": 9, "seq_len": 16, "batch_size": 2, "grad_accum": 2, "batch_ramp": 3, "threads": 1}
    config = TrainConfig(**settings).resolve(model.config, dataset.train.num_tokens)
    faults = Faults()
    plain = UpdateData(dataset.train, config, faults, None)
    with UpdateData(dataset.train, config, faults, None, lambda each: for_device(each, model, torch.device("cpu"))) as ahead:
        for update in (0, 1, 2, 1, 2, 3, 6, 7):
            if update == 3:
                faults.roll_back(2, 1)
            for found, expected in zip(ahead.microbatches(update), plain.microbatches(update), strict=True):
                assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.targets, expected.targets)
                count = expected.cu_seqlens.numel()
                assert torch.equal(found.cu_seqlens[:count], expected.cu_seqlens) and found.cu_seqlens.numel() == expected.tokens.numel() + 1
                assert torch.equal(found.positions, model.document_positions(expected.cu_seqlens, expected.tokens.numel()))
            assert ahead.documents(update) == plain.documents(update)
        assert loaders()
    assert not loaders()
