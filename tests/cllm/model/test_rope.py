"""Rotary frequencies and their stretches against transformers' own, and models that use them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.model.model import Model
from cllm.model.rope import frequencies, plain_frequencies
from cllm.runtime.errors import UserError

SHAPE = {"vocab_size": 50, "embed_dim": 32, "num_layers": 2, "num_heads": 2, "max_seq_len": 64}


def theirs(kind, theta, factor, original, slow, fast, head_dim, max_len):
    transformers = pytest.importorskip("transformers")
    rope = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind != "linear":
        rope["original_max_position_embeddings"] = original
    if kind == "llama3":
        rope |= {"low_freq_factor": slow, "high_freq_factor": fast}
    if kind == "yarn":
        rope |= {"beta_slow": slow, "beta_fast": fast}
    config = transformers.LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, max_position_embeddings=max_len, rope_parameters=rope
    )
    values, attention = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    return values.numpy(), attention


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["linear", "llama3", "yarn"]), theta=st.sampled_from([500.0, 1e4, 5e5, 1e6]), factor=st.floats(1.0, 40.0),
    original=st.sampled_from([16, 256, 4096, 8192]), slow=st.floats(0.1, 1.5), gap=st.floats(0.1, 40.0), head_dim=st.sampled_from([8, 64, 128]),
)  # fmt: skip
def test_stretched_frequencies_are_those_of_transformers(kind, theta, factor, original, slow, gap, head_dim):
    expected, attention = theirs(kind, theta, factor, original, slow, slow + gap, head_dim, 8 * original)
    ramped = {} if kind == "linear" else {"rope_original_len": original, "rope_slow": slow, "rope_fast": slow + gap}
    config = ModelConfig(
        vocab_size=50, embed_dim=2 * head_dim, num_layers=1, num_heads=2, max_seq_len=8 * original, rope_theta=theta, rope_scaling=kind,
        rope_factor=factor, **ramped,
    )  # fmt: skip
    np.testing.assert_allclose(frequencies(config), expected, rtol=2e-6)
    assert (config.rope_attention_factor or 1.0) == pytest.approx(attention)


def test_a_stretch_changes_slow_pairs_only():
    plain = plain_frequencies(ModelConfig(**SHAPE, head_dim=64))
    for kind in ("llama3", "yarn"):
        stretched = frequencies(ModelConfig(**SHAPE, head_dim=64, rope_scaling=kind, rope_factor=4.0, rope_original_len=4096))
        assert stretched[0] == plain[0] and stretched[-1] == plain[-1] / 4


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"rope_scaling": "yarn", "rope_factor": 4.0}], ids=["qwen2", "yarn"])
def test_decoding_and_int8_agree_with_the_whole_pass_and_gradients_with_the_differences(changes):
    model = Model(ModelConfig(**SHAPE, num_kv_heads=1, **changes))
    assert sum(each.numel() for each in model.parameters()) == model.config.num_parameters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    tokens = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, cache = model(tokens), model.make_cache(1)
        pieces = [model(tokens[:, :4], cache=cache), *(model(tokens[:, i : i + 1], cache=cache) for i in range(4, 12))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)

    double = model.double()
    double.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    for parameter in (double.model.layers[0].self_attn.k_proj.weight, getattr(double.model.layers[0].self_attn.v_proj, "bias", None)):
        if parameter is None:
            continue
        index = (3,) * parameter.dim()
        slope = float(parameter.grad[index])
        values = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                parameter[index] += step
                values.append(float(double.loss(tokens[:, :-1], tokens[:, 1:])))
        assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-9)
    double.float().quantize_()
    assert torch.isfinite(double(tokens)).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": "longrope"}, "rope_scaling must be one of linear, llama3, yarn"),
        ({"rope_scaling": "linear"}, "needs rope_factor"),
        ({"rope_factor": 2.0}, "rope_factor=2.0 has no meaning with rope_scaling=None"),
        ({"rope_scaling": "linear", "rope_factor": 2.0, "rope_slow": 1.0}, "rope_slow=1.0 has no meaning"),
        ({"rope_scaling": "yarn", "rope_factor": 2.0, "rope_slow": 40.0}, "rope_fast must be above rope_slow"),
        ({"rope_scaling": "linear", "rope_factor": 2.0, "norm": "layer"}, "needs rotary positions"),
        ({"attention_bias": True, "qk_norm": True}, "neither of the two model families"),
        ({"attention_bias": True, "norm": "layer"}, "neither of the two model families"),
    ],
)
def test_a_stretch_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**SHAPE, **changes)


def test_a_run_from_before_these_settings_is_still_the_same_run():
    model = ModelConfig.preset("cllm-1m", vocab_size=320)
    config = TrainConfig(preset="cllm-1m", steps=5).resolve(model, 10_000)
    stored = config.to_dict()
    for name in ("attention_bias", "rope_scaling"):
        stored["model"].pop(name, None)
    assert config.differences(TrainConfig.from_dict(stored)) == []
    changed = config.replace("test", attention_bias=True)
    assert len(changed.differences(TrainConfig.from_dict(stored))) == 1
