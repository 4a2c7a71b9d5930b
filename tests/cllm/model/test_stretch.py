"""A longer context than a model was trained with: the configuration that it becomes, and what is refused."""

import pytest
import torch
from command import cllm
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import Model, ModelConfig, save
from cllm.data.tokens.tokenizer import Tokenizer
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


def test_the_command_says_when_a_text_outgrows_the_context_and_stretches_it_when_asked_to(tmp_path):
    tokenizer = Tokenizer.train(["one two three four five. " * 20], vocab_size=320)
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=16, num_layers=1, num_heads=1, max_seq_len=32))
    save(model, tmp_path / "m.cllm", tokenizer=tokenizer)
    asked = ("generate", tmp_path / "m.cllm", "--prompt", "one two", "--max-tokens", 50, "--temperature", 0, "--threads", 1, "--json")
    ran = cllm(*asked)
    assert ran.status == 0 and len(ran.json["tokens"][0]) == 50
    assert ran.err.count("longer than the model's context of 32 tokens") == 1 and "--stretch lets it see further" in ran.err
    for kind in ("yarn", "dynamic"):
        ran = cllm(*asked, "--context", 128, "--stretch", kind)
        assert ran.status == 0 and len(ran.json["tokens"][0]) == 50 and "longer than" not in ran.err
    for half in (("--context", 128), ("--stretch", "yarn")):
        ran = cllm(*asked, *half)
        assert ran.status == 2 and "--context and --stretch belong together" in ran.err
    ran = cllm(*asked, "--context", 16, "--stretch", "yarn")
    assert ran.status == 2 and "must be longer than the 32 tokens" in ran.err
