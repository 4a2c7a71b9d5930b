"""Decoding token by token gives the bits of one pass over the whole text: every family, dtype, store of the weights, number of threads."""

import pytest
import torch

from cllm import Model, ModelConfig, load, runtime, save
from cllm.runtime.errors import UserError

LLAMA = dict(vocab_size=101, embed_dim=96, num_layers=2, num_heads=6, num_kv_heads=2, ffn_dim=144, max_seq_len=96, norm="rms")  # noqa: C408
GPT2 = LLAMA | dict(num_kv_heads=6, norm="layer", position="learned", activation="gelu_tanh", bias=True, tie_embeddings=True)  # noqa: C408
CONFIGS = {
    "llama": LLAMA,
    "qk_norm_and_softcap": LLAMA | {"qk_norm": True, "tie_embeddings": True},
    "window": LLAMA | {"sliding_window": 21},
    "ngrams": LLAMA | {"bigram_rows": 90, "trigram_rows": 70},
    "gpt2": GPT2,
    "gpt2_odd_width": GPT2 | {"embed_dim": 72, "activation": "gelu"},
}


def make(name, dtype, weights):
    model = Model(ModelConfig(**CONFIGS[name]), seed=1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("grams.weight"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    if weights != "master":
        model = model.to(dtype)
    model.compute_dtype = dtype
    return model.quantize_(int(weights[3:])) if weights.startswith("int") else model.pack_() if weights == "packed" else model


@torch.no_grad()
def decoded(model, tokens, prefix):
    cache = model.make_cache(tokens.shape[0])
    pieces = [model(tokens[:, :prefix], cache=cache)]
    pieces += [model(tokens[:, i : i + 1], cache=cache) for i in range(prefix, tokens.shape[1])]
    return torch.cat(pieces, dim=1), cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["master", "same", "packed", "int8", "int4"])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoded_tokens_have_the_bits_of_one_pass(name, weights, dtype):
    pytest.importorskip("numba")
    model = make(name, dtype, weights)
    tokens = torch.randint(101, (2, 80), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(tokens)
    for threads, prefix in ((1, 50), (3, 66)):
        with runtime.use(threads=threads):
            logits, cache = decoded(model, tokens, prefix)
        assert cache.decoder[1] is not None, "the fast path did not serve"
        assert torch.equal(logits, whole), (threads, prefix)


def test_a_cache_whose_rows_change_is_decoded_on():
    model = make("llama", torch.bfloat16, "same")
    tokens = torch.randint(101, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(tokens)
        cache = model.make_cache(3)
        model(tokens[:, :8], cache=cache)
        model(tokens[:, 8:9], cache=cache)
        cache.select([2, 0])
        assert torch.equal(model(tokens[[2, 0], 9:10], cache=cache)[:, 0], whole[[2, 0], 9])
        with runtime.use(backend="torch"):  # in the middle of a text, one operation at a time
            other = model(tokens[[2, 0], 10:11], cache=cache)[:, 0]
        assert torch.allclose(other.float(), whole[[2, 0], 10].float(), atol=0.05)


def test_int8_weights_write_nearly_the_same_distribution_and_cannot_be_saved(tmp_path):
    model = Model(ModelConfig(**LLAMA), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    save(model, tmp_path / "model.cllm")
    tokens = torch.randint(101, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = load(tmp_path / "model.cllm", weights="fp32")[0](tokens).softmax(-1)
        for weights in ("bf16", "int8"):
            loaded, _ = load(tmp_path / "model.cllm", weights=weights)
            assert loaded.compute_dtype == torch.bfloat16
            assert torch.nn.functional.l1_loss(loaded(tokens).float().softmax(-1), exact, reduction="sum") < 0.05 * tokens.numel(), weights
            assert float(loaded.loss(tokens, tokens)) == pytest.approx(float(model.loss(tokens, tokens)), rel=0.01)
    with pytest.raises(UserError, match="int8"):
        save(loaded, tmp_path / "other.cllm")
    with pytest.raises(UserError, match="fp32, bf16, int8, int4"):
        load(tmp_path / "model.cllm", weights="int3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qk_norm_and_softcap", "gpt2", "gpt2_odd_width"])
def test_packed_weights_have_the_bits_of_the_matrices(name, dtype, monkeypatch):
    """At any number of rows, in the loss too, and on the processors on which a model is not packed because its matrices are read as fast."""
    pytest.importorskip("numba")
    monkeypatch.setenv("CLLM_BF16_KERNEL", "widened")
    model, packed = make(name, dtype, "master"), make(name, dtype, "packed")
    assert packed.is_packed and sum(each.numel() for each in packed.parameters()) < sum(each.numel() for each in model.parameters())
    tokens = torch.randint(101, (2, 80), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(packed(tokens), model(tokens))
        assert torch.equal(decoded(packed, tokens, 60)[0], model(tokens))
        assert torch.equal(packed.loss(tokens, tokens), model.loss(tokens, tokens))
        with runtime.use(backend="torch"):
            assert torch.allclose(packed(tokens).float(), model(tokens).float(), atol=0.05)


def test_a_packed_model_is_for_generation_only(monkeypatch, tmp_path):
    pytest.importorskip("numba")
    monkeypatch.setenv("CLLM_BF16_KERNEL", "widened")
    model = make("llama", torch.bfloat16, "packed")
    with pytest.raises(UserError, match=r"packed for bfloat16.*cannot be saved"):
        save(model, tmp_path / "model.cllm")
    with pytest.raises(UserError, match="before pack_"):
        model.compute_dtype = torch.float32
    assert not any(each.requires_grad for each in model.parameters())
    with runtime.use(backend="torch"):
        assert not make("llama", torch.bfloat16, "packed").is_packed  # plain torch reads matrices
