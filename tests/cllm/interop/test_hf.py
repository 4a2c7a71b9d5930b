"""Hugging Face folders: the same logits as transformers both ways, and refusals by name."""

import json

import pytest
import torch

from cllm.config.model import ModelConfig
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.interop.hf import load_hf, save_hf
from cllm.interop.hf_config import config_from_hf, config_to_hf
from cllm.model.model import Model
from cllm.runtime.errors import CheckpointError, UserError

SHAPE = {"vocab_size": 99, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "max_seq_len": 32}
LLAMA = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 32}  # fmt: skip
# Chosen so that some pairs stay, some are stretched and some lie between.
ROPE = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 0.5, "high_freq_factor": 1.5},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "beta_fast": 1.5, "beta_slow": 0.25},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 0.5},
}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}


def transformers_model(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, num_key_value_heads=2, rope_theta=5000.0))
    if kind == "mistral":
        config = transformers.MistralConfig(**LLAMA, num_key_value_heads=2, sliding_window=5, attn_implementation="eager")
        return transformers.MistralForCausalLM(config)
    if kind == "qwen3":
        config = transformers.Qwen3Config(**LLAMA, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)
        return transformers.Qwen3ForCausalLM(config)
    if kind == "qwen2":
        config = transformers.Qwen2Config(**LLAMA, num_key_value_heads=2, tie_word_embeddings=True)
        return transformers.Qwen2ForCausalLM(config)
    if kind in ROPE:
        config = transformers.LlamaConfig(**LLAMA, num_key_value_heads=2, rope_parameters={"rope_theta": 500.0, **ROPE[kind]})
        return transformers.LlamaForCausalLM(config)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))


def perturb(model):
    """Random values everywhere, biases and norms included, so that a swapped tensor shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def tokens_for(model_vocab=99):
    return torch.randint(0, model_vocab, (2, 20), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gpt2", *ROPE])
def test_a_folder_from_transformers_gives_the_same_logits_and_goes_back(kind, tmp_path):
    theirs = perturb(transformers_model(kind))
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(tokens_for()).logits
    ours, tokenizer = load_hf(tmp_path / "theirs")
    assert tokenizer is None
    torch.testing.assert_close(ours(tokens_for()).detach(), expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in ours.parameters())

    save_hf(ours, tmp_path / "back")
    again, report = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens_for()).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(**SHAPE, tie_embeddings=False, rope_theta=500.0),
        ModelConfig(**SHAPE, num_kv_heads=2, qk_norm=True, head_dim=12, sliding_window=4, activation="gelu"),
        ModelConfig(**SHAPE, norm="layer", activation="relu2", tie_embeddings=False),
        ModelConfig(**SHAPE, num_kv_heads=2, attention_bias=True, sliding_window=4),
        ModelConfig(**SHAPE, rope_scaling="llama3", rope_factor=4.0, rope_slow=0.25, rope_fast=1.25),
        ModelConfig(**SHAPE, qk_norm=True, rope_scaling="yarn", rope_factor=2.0, rope_fast=2.0),
    ],
    ids=["llama", "qwen3", "gpt2", "qwen2", "llama3-rope", "yarn"],
)
def test_a_model_made_here_runs_in_transformers(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = perturb(Model(config))
    save_hf(model, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens_for()).logits, model(tokens_for()), rtol=1e-4, atol=1e-4)
    assert config_from_hf(theirs.config.to_dict()) == config


def test_configurations_go_both_ways_without_transformers():
    for changes in (
        {},
        {"qk_norm": True, "num_kv_heads": 1},
        {"sliding_window": 8},
        {"attention_bias": True},
        {"attention_bias": True, "sliding_window": 8, "rope_scaling": "linear", "rope_factor": 2.0},
        {"rope_scaling": "yarn", "rope_factor": 2.0, "rope_original_len": 16, "rope_attention_factor": 1.3},
        {"qk_norm": True, "sliding_window": 8},
        {"norm": "layer"},
    ):
        config = ModelConfig(**SHAPE, **changes)
        assert config_from_hf(json.loads(json.dumps(config_to_hf(config, 3)))) == config
    with pytest.raises(UserError, match="softcap"):
        config_to_hf(ModelConfig(**SHAPE, softcap=30.0))
    with pytest.raises(UserError, match=r"^bigram_rows=9, trigram_rows=7 cannot be exported.*--to cllm.*bigram_rows=0 and trigram_rows=0"):
        config_to_hf(ModelConfig(**SHAPE, bigram_rows=9, trigram_rows=7))


def test_shards_are_written_read_and_checked(tmp_path):
    model = Model(ModelConfig(**SHAPE))
    folder = save_hf(model, tmp_path / "sharded", max_shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and index["metadata"]["total_size"] == model.num_parameters() * 4
    assert {path.name for path in folder.glob("*.safetensors")} == files
    loaded, _ = load_hf(folder)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())

    (folder / min(files)).unlink()
    with pytest.raises(CheckpointError, match=r"is missing; model\.safetensors.index.json lists it"):
        load_hf(folder)
    index["weight_map"] = {"model.norm.weight": "../outside.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_hf(folder)


def test_half_precision_folders_load_as_float32(tmp_path):
    model = Model(ModelConfig(**SHAPE, norm="layer"))
    save_hf(model, tmp_path / "half", dtype=torch.bfloat16)
    loaded, _ = load_hf(tmp_path / "half")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name].bfloat16().float())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_bare_backbone_and_old_constants_load(tmp_path):
    from safetensors.torch import load_file, save_file

    model = Model(ModelConfig(**SHAPE, norm="layer"))
    folder = save_hf(model, tmp_path / "gpt2")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded, _ = load_hf(folder)
    assert torch.equal(loaded(tokens_for()), model(tokens_for()))

    weights["lm_head.weight"] = weights["wte.weight"] + 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="ties the output projection"):
        load_hf(folder)


def test_the_tokenizer_and_its_end_of_text_token_travel_along(tmp_path):
    tokenizer_module = pytest.importorskip("cllm.data.tokens.tokenizer")
    transformers = pytest.importorskip("transformers")
    text = "def add(a, b):\n    return a + b\n" * 20
    tokenizer = tokenizer_module.Tokenizer.train([text], vocab_size=280, kind="bpe")
    model = Model(ModelConfig(**{**SHAPE, "vocab_size": tokenizer.vocab_size}))
    save_hf(model, tmp_path / "out", tokenizer)
    _, loaded = load_hf(tmp_path / "out")
    assert loaded.hash == tokenizer.hash
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.encode("return a", add_special_tokens=False) == tokenizer.encode("return a")
    assert theirs.eos_token_id == tokenizer.eot_id and loaded.fim is None
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eot_id


def test_the_tokens_around_a_middle_travel_along_by_name_there_and_back(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.train(["def add(a, b):\n    return a + b\n" * 20], vocab_size=280).with_fim()
    model = Model(ModelConfig(**{**SHAPE, "vocab_size": tokenizer.vocab_size}))
    save_hf(model, tmp_path / "out", tokenizer)
    assert load_hf(tmp_path / "out")[1].fim == tokenizer.fim
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.fim_prefix_token_id, theirs.fim_suffix_token_id, theirs.fim_middle_token_id) == tokenizer.fim
    assert set(tokenizer.fim) <= set(theirs.all_special_ids)
    theirs.save_pretrained(tmp_path / "back")
    assert Tokenizer.load(tmp_path / "back").fim == tokenizer.fim


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "architecture 'BertForMaskedLM' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rotary scaling of type 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "needs rope_factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate=False is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_factor must be a finite number"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not supported",
        ),
        ({"hidden_act": "relu"}, "activation hidden_act='relu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"hidden_size": "32"}, "hidden_size as a whole number"),
        ({"num_key_value_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
    ],
)
def test_an_unsupported_llama_setting_is_refused_by_name(change, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_hf({"architectures": ["LlamaForCausalLM"], **LLAMA, **change})


def test_an_unsupported_gpt2_or_qwen3_setting_is_refused_by_name():
    with pytest.raises(CheckpointError, match="scale_attn_by_inverse_layer_idx=True"):
        config_from_hf({"model_type": "gpt2", **GPT2, "scale_attn_by_inverse_layer_idx": True})
    mixed = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(CheckpointError, match="layer_types mixes"):
        config_from_hf({"model_type": "qwen3", **LLAMA, **mixed})


def test_a_broken_folder_gives_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_hf(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config.json is missing"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        load_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **LLAMA}))
    with pytest.raises(CheckpointError, match=r"has neither model.safetensors nor"):
        load_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pickle \(pytorch_model\.bin\).*never read"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_hf(tmp_path)


def test_weights_that_do_not_fit_the_configuration_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_hf(Model(ModelConfig(**SHAPE)), tmp_path / "llama")
    weights = load_file(folder / "model.safetensors")
    extra = {**weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    save_file(extra, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing nothing, not expected model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_hf(folder)
    save_file({name: tensor for name, tensor in weights.items() if "norm" not in name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.0\.input_layernorm\.weight.* and 2 more"):
        load_hf(folder)
    save_file({**weights, "model.norm.weight": torch.ones(7)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.norm.weight has the shape \(7,\)"):
        load_hf(folder)
    save_file({**weights, "model.norm.weight": torch.ones(32, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"stored as torch\.int8"):
        load_hf(folder)


def test_an_existing_folder_is_not_overwritten_and_nothing_is_left_of_a_failed_write(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        save_hf(Model(ModelConfig(**SHAPE)), tmp_path / "full")
    with pytest.raises(UserError, match="softcap"):
        save_hf(Model(ModelConfig(**SHAPE, softcap=5.0)), tmp_path / "new")

    class FullDisk:
        eot_id = None

        def save(self, path):
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        save_hf(Model(ModelConfig(**SHAPE)), tmp_path / "new", FullDisk())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_whoever_may_read_the_folder_may_read_its_weights(tmp_path):
    folder = save_hf(Model(ModelConfig(**SHAPE)), tmp_path / "llama")
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
