"""A longer context than a model was trained with: the configuration that it becomes, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import Model, ModelConfig
from cllm.model.rope import frequencies, plain_frequencies
from cllm.model.stretch import stretch_, stretched
from cllm.runtime.errors import UserError

CONFIG = ModelConfig(vocab_size=40, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=64, norm="rms")


def test_yarn_is_what_a_yarn_model_of_that_length_has():
    found = stretched(CONFIG, 256, "yarn")
    expected = ModelConfig(
        vocab_size=40,
        embed_dim=32,
        num_layers=1,
        num_heads=2,
        max_seq_len=256,
        norm="rms",
        rope_scaling="yarn",
        rope_factor=4.0,
        rope_original_len=64,
    )
    assert found == expected


@settings(max_examples=40, deadline=None, derandomize=True)
@given(length=st.integers(65, 4096))
def test_dynamic_slows_the_slowest_pair_by_the_factor_and_leaves_the_fastest(length):
    found, own = frequencies(stretched(CONFIG, length, "dynamic")), plain_frequencies(CONFIG)
    assert found[0] == own[0]
    assert found[-1] == pytest.approx(own[-1] * 64 / length, rel=1e-5)
    assert (found <= own).all()


def test_a_stretched_model_reads_further_than_before():
    model = Model(CONFIG)
    tokens = torch.arange(100)[None] % 40
    before = model(tokens[:, :64])
    with pytest.raises(UserError, match="100 tokens are longer than the model's context of 64"):
        model(tokens)
    stretch_(model, 128, "dynamic")
    assert model(tokens).shape == (1, 100, 40)
    assert not torch.equal(model(tokens[:, :64]), before), "all angles are those of the long context"


@pytest.mark.parametrize(
    "config, length, kind, words",
    [
        (CONFIG, 64, "yarn", "must be longer than the 64 tokens"),
        (CONFIG, 128, "magic", "must be one of yarn, dynamic"),
        (stretched(CONFIG, 128, "yarn"), 256, "yarn", r"stretched already \(yarn\)"),
        (ModelConfig(vocab_size=40, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=64, norm="layer"), 128, "yarn", "learned positions"),
    ],
)
def test_what_cannot_be_stretched_is_refused(config, length, kind, words):
    with pytest.raises(UserError, match=words):
        stretched(config, length, kind)
