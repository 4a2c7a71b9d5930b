"""A .cllm file of int8 weights: half the bytes of bfloat16, the numbers that int8 generation computes with, and refused where it is damaged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.checkpoint.int8 import from_int8, to_int8
from cllm.checkpoint.model_file import load, save
from cllm.checkpoint.weights import weights_of
from cllm.config.model import ModelConfig
from cllm.kernels.quantization import SCALE_BLOCK, quantize
from cllm.model.model import Model
from cllm.runtime.errors import CheckpointError, UserError

SMALL = ModelConfig(vocab_size=100, embed_dim=72, num_layers=2, num_heads=4, max_seq_len=8, ffn_dim=100)


@given(st.integers(1, 40), st.integers(1, 200), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_each_number_is_off_by_at_most_half_a_step_of_its_block_and_packs_to_itself(rows, depth, seed):
    weight = torch.randn(rows, depth, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 7 - 3)
    stored = to_int8({"a": weight, "norm": weight[0]})
    assert {name: each.dtype for name, each in stored.items()} == {"a.int8": torch.int8, "a.scales": torch.float32, "norm": torch.float32}
    again = from_int8(stored, "here")
    assert torch.equal(again["norm"], weight[0]) and again["a"].shape == weight.shape
    for first in range(0, depth, SCALE_BLOCK):
        block, back = (each[:, first : first + SCALE_BLOCK].double() for each in (weight, again["a"]))
        step = block.abs().amax(dim=1, keepdim=True) / 127
        assert bool(((back - block).abs() <= 0.5001 * step).all())
    assert torch.equal(quantize(again["a"]).values, quantize(weight).values), "generation with int8 weights is the same from both"


def test_a_file_is_half_as_large_as_bfloat16_and_loads_as_any_other(tmp_path):
    model = Model(SMALL, seed=1)
    save(model, tmp_path / "int8.cllm", int8=True)
    save(model.to(torch.bfloat16), tmp_path / "bf16.cllm")
    sizes = {name: (tmp_path / f"{name}.cllm").stat().st_size for name in ("int8", "bf16")}
    assert sizes["int8"] < 0.65 * sizes["bf16"]
    again = weights_of(load(tmp_path / "int8.cllm")[0])
    for name, weight in weights_of(Model(SMALL, seed=1)).items():
        assert again[name].dtype == torch.float32 and torch.allclose(again[name], weight, atol=float(weight.abs().max()) / 200), name


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored.pop("a.scales"),
        lambda stored: stored.update({"a.scales": torch.ones(3, 1)}),
        lambda stored: stored.update({"a.scales": torch.ones(3, 2, dtype=torch.float64)}),
        lambda stored: stored.update({"a.int8": torch.ones(3, 100)}),
        lambda stored: stored.update({"a.int8": torch.ones(300, dtype=torch.int8)}),
    ],
)
def test_integers_without_scales_that_fit_are_refused(damage):
    stored = to_int8({"a": torch.ones(3, 100)})
    damage(stored)
    with pytest.raises(CheckpointError, match="int8 numbers of a have no scales that fit"):
        from_int8(stored, "here")


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = Model(SMALL)
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        save(model, tmp_path / "x.cllm", int8=True)
    assert not list(tmp_path.iterdir())
