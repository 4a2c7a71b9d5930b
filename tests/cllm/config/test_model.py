"""ModelConfig: derived values, refusals, exact counts of parameters and operations, presets."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cllm.config.model import ModelConfig
from cllm.config.presets import PRESETS
from cllm.model.model import Model
from cllm.runtime.errors import UserError

SMALL = {"vocab_size": 50, "embed_dim": 24, "num_layers": 2, "num_heads": 4, "max_seq_len": 16}


def test_derived_values_follow_the_family():
    llama = ModelConfig(**SMALL)
    assert (llama.family, llama.position, llama.gated, llama.bias, llama.activation) == (
        "cllm",
        "rotary",
        True,
        False,
        "silu",
    )
    assert (llama.num_kv_heads, llama.head_dim, llama.ffn_dim, llama.norm_eps) == (4, 6, 64, 1e-6)
    gpt2 = ModelConfig(**SMALL, norm="layer")
    assert (gpt2.family, gpt2.position, gpt2.gated, gpt2.bias, gpt2.activation) == (
        "gpt2",
        "learned",
        False,
        True,
        "gelu_tanh",
    )
    assert (gpt2.ffn_dim, gpt2.norm_eps) == (96, 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, 'norm must be "rms" or "layer"'),
        ({"embed_dim": 0}, "embed_dim must be a whole number of at least 1, got 0"),
        ({"num_layers": 2.0}, "num_layers must be a whole number"),
        ({"embed_dim": 25}, "embed_dim must be a multiple of num_heads"),
        ({"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"head_dim": 512}, "head_dim must be at most 256"),
        ({"activation": "relu"}, "activation must be one of silu"),
        ({"bias": True}, "neither of the two model families"),
        ({"position": "learned"}, "position='learned' (needs 'rotary')"),
        ({"norm": "layer", "qk_norm": True}, "qk_norm=True (needs False)"),
        ({"norm": "layer", "num_kv_heads": 2}, "num_kv_heads=2 (needs 4)"),
        ({"bigram_rows": -1}, "bigram_rows must be a whole number of at least 0, got -1"),
        ({"norm": "layer", "trigram_rows": 9}, "trigram_rows=9 (needs 0)"),
        ({"norm_eps": 0.0}, "norm_eps must be a finite number > 0"),
        ({"tie_embeddings": "yes"}, "tie_embeddings must be true or false"),
    ],
)
def test_a_wrong_value_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ModelConfig(**{**SMALL, **change})


def test_dictionaries_go_both_ways_and_an_unknown_key_names_the_nearest():
    config = ModelConfig(**SMALL, qk_norm=True, num_kv_heads=2)
    assert ModelConfig.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="did you mean 'num_layers'"):
        ModelConfig.from_dict({**SMALL, "num_layer": 3})
    with pytest.raises(UserError, match="vocab_size is missing"):
        ModelConfig.from_dict({"embed_dim": 64})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_size_that_its_name_says(name):
    sizes = {"gpt2": 124.4e6, "gpt2-medium": 354.8e6, "gpt2-large": 774.0e6, "gpt2-xl": 1557.6e6}
    config = ModelConfig.preset(name)
    if name in sizes:
        assert config.num_parameters() == pytest.approx(sizes[name], rel=0.001)
    else:
        number, unit = re.fullmatch(r"cllm-(\d+)([mb])", name).groups()
        assert config.num_parameters() == pytest.approx(int(number) * {"m": 1e6, "b": 1e9}[unit], rel=0.1)
    with torch.device("meta"):
        model = Model(config)
    assert model.num_parameters() == config.num_parameters()


def test_presets_take_overrides_and_an_unknown_one_names_the_nearest():
    assert ModelConfig.preset("cllm-1m", vocab_size=65, tie_embeddings=False).vocab_size == 65
    with pytest.raises(UserError, match="did you mean 'cllm-125m'"):
        ModelConfig.preset("cllm-124m")


@pytest.mark.parametrize(
    "changes",
    [{"num_kv_heads": 2, "tie_embeddings": False, "qk_norm": True}, {"norm": "layer"}, {"head_dim": 8, "bigram_rows": 9, "trigram_rows": 5}],
)
def test_counts_equal_those_of_the_model_and_of_torch(changes):
    config = ModelConfig(**{**SMALL, **changes})
    model = Model(config)
    assert model.num_parameters() == config.num_parameters()
    assert len(dict(model.named_parameters())) == len(model.state_dict())
    tables = sum(parameter.numel() for name, parameter in model.named_parameters() if "grams" in name)
    assert config.num_parameters(ngrams=False) == config.num_parameters() - tables == model.num_parameters() - tables

    # The same products in plain torch, counted by torch itself (which does not halve causal attention).
    length, matrices = (
        16,
        [p for name, p in model.named_parameters() if p.dim() == 2 and "wpe" not in name and "embed" not in name],
    )
    if config.tie_embeddings:
        matrices = [p for p in matrices if p is not model.embedding_weight] + [model.embedding_weight]
    elif model.config.family == "gpt2":
        matrices = [p for p in matrices if p is not model.embedding_weight]
    q = torch.zeros(config.num_heads, length, config.head_size)
    with FlopCounterMode(display=False) as counter:
        for weight in matrices:
            torch.zeros(length, weight.numel() // max(weight.shape)) @ torch.zeros(weight.numel() // max(weight.shape), max(weight.shape))
        for _ in range(config.num_layers):
            (q @ q.transpose(1, 2)) @ q
    assert config.flops_per_token(length, backward=False, causal=False) * length == counter.get_total_flops()
    assert config.flops_per_token(length, causal=False) * length == 3 * counter.get_total_flops()


def test_causal_operations_are_those_of_the_keys_that_are_seen():
    config = ModelConfig(**SMALL)
    fixed = config.flops_per_token(1, backward=False) - 4 * 2 * 24  # one token sees one key
    for seq_len, window in ((16, None), (16, 5), (7, 100)):
        seen = [min(t + 1, window or seq_len) for t in range(seq_len)]
        expected = fixed * seq_len + 4 * 2 * 24 * sum(seen)
        windowed = ModelConfig(**SMALL, sliding_window=window)
        assert windowed.flops_per_token(seq_len, backward=False) * seq_len == pytest.approx(expected, rel=1e-12)


def test_palm_convention_is_six_n_plus_attention():
    config = ModelConfig.preset("gpt2")
    looked_up_only = 1024 * 768
    assert config.flops_per_token_palm(1024) == 6 * (config.num_parameters() - looked_up_only) + 12 * 12 * 768 * 1024
    with pytest.raises(UserError, match="seq_len must be at least 1"):
        config.flops_per_token(0)
