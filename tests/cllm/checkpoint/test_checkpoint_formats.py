"""Checkpoints of every earlier format version, kept as files, load with every bit, and a run goes on from them."""

import json
import shutil
from pathlib import Path

import pytest

from cllm.checkpoint.folder import FORMAT_VERSION, read_manifest, verify
from cllm.checkpoint.model_file import load
from cllm.checkpoint.safetensors import tensor_digest
from cllm.checkpoint.store import CheckpointStore
from cllm.checkpoint.weights import weights_of

FIXTURES = sorted((Path(__file__).parents[2] / "fixtures").glob("checkpoint-v*"))


def test_there_is_a_fixture_of_every_version():
    assert [path.name for path in FIXTURES] == [f"checkpoint-v{version}" for version in range(1, FORMAT_VERSION + 1)]


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
def test_a_checkpoint_of_each_version_loads_with_every_bit(fixture):
    expected = json.loads((fixture / "expected.json").read_text())
    found = CheckpointStore(fixture / "run" / "checkpoints").newest_good()
    assert (found.step, found.state["tokens"]) == (expected["step"], expected["tokens"])
    assert {name: tensor_digest(each) for name, each in found.weights.items()} == expected["tensors"]["model"]
    assert {name: tensor_digest(each) for name, each in found.optimizer.items()} == expected["tensors"]["optimizer"]
    verify(found.path)
    assert str(read_manifest(found.path)["format_version"]) == fixture.name[-1]
    for path in (fixture / "run", fixture / "model.cllm"):
        model, tokenizer = load(path)
        assert {name: tensor_digest(each) for name, each in weights_of(model).items()} == expected["tensors"]["model"]
        assert tokenizer.vocab_size == expected["vocab_size"] and tokenizer.decode(tokenizer.encode("three")) == "three"


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
def test_a_run_of_each_version_goes_on(fixture, tmp_path):
    """With the optimizer's state: the settings, which the fixture stored, are found again."""
    import random

    from cllm.config.train import TrainConfig
    from cllm.data.pipeline import prepare
    from cllm.model.model import Model
    from cllm.train.trainer import Trainer

    generator = random.Random(0)
    (tmp_path / "text.txt").write_text(" ".join(generator.choice(["one", "two", "three", "many"]) for _ in range(400)))
    dataset = prepare(tmp_path / "text.txt", tmp_path / "tokens", tokenizer="char", val_fraction=0.05)
    shutil.copytree(fixture / "run", tmp_path / "run")
    state = CheckpointStore(tmp_path / "run" / "checkpoints").newest_good().state
    config = TrainConfig.from_dict(state["config"], state["sources"])
    trainer = Trainer(Model(load(fixture / "run")[0].config), dataset, config, out=tmp_path / "run")
    result = trainer.fit(resume=True)
    assert result.resumed_from == result.step == 6 and result.validation is not None
