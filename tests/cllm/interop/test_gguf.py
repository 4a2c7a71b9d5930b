"""GGUF files: llama.cpp loads them, cuts text into the same tokens and writes the same text.

llama.cpp comes as a prebuilt library with the npm package node-llama-cpp, which `make peers` installs; the package gguf comes with the extra
`export`. Without them the tests that need them say so and are skipped.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import PATIENCE, cllm

from cllm import runtime
from cllm.config.model import ModelConfig
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.generate.decoding import generate
from cllm.interop.gguf import save_gguf
from cllm.model.model import Model
from cllm.runtime.errors import UserError
from cllm.train.step import TrainStep

TEXT = "".join(f"def add_{name}(a, b):\n    return a + b  # naïve — {name} is 12345\n\n" for name in ("one", "two", "three", "four")) * 4
SHAPE = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "max_seq_len": 128}
FAMILIES = {
    "llama": {"num_kv_heads": 2, "tie_embeddings": False, "head_dim": 32},
    "llama3-rope": {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_len": 64, "rope_slow": 0.5, "rope_fast": 2.0},
    "linear-rope": {"rope_scaling": "linear", "rope_factor": 2.0},
    "qwen2": {"num_kv_heads": 2, "attention_bias": True},
    "qwen3": {"num_kv_heads": 2, "qk_norm": True},
    "yarn": {"qk_norm": True, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 32},
    "gpt2": {"norm": "layer"},
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], vocab_size=384)


def trained(tokenizer, steps=40, **changes):
    """A model that has something to say: random weights would leave the likeliest token to rounding."""
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size + 7, **SHAPE, **changes))
    if model.config.attention_bias:
        with torch.no_grad():
            for block in model.model.layers:
                for projection in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                    projection.bias.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(tokenizer.encode(TEXT)[: 2 * 65]).view(2, 65)
    step = TrainStep(model, learning_rate=5e-3)
    with runtime.use(threads=1):
        for _ in range(steps):
            step(ids[:, :-1], ids[:, 1:])
    return model


def ours_on(model, tokenizer):
    """(ids of a prompt, log-probabilities after each of them, the tokens that we write after them)."""
    ids = tokenizer.encode("def add_three(a, b):\n")
    with torch.no_grad():
        log_probabilities = torch.log_softmax(model(torch.tensor([ids]))[0], -1).numpy()
    return ids, log_probabilities, list(generate(model, tokenizer, ids, max_tokens=60, temperature=0)[0].tokens)


def llama(path, **asked):
    """What llama.cpp answers (see llama_cpp_runner.mjs)."""
    peers = Path(sys.prefix) / "peers"
    if not (peers / "node_modules" / "node-llama-cpp").is_dir() or shutil.which("node") is None:
        pytest.skip("node-llama-cpp is not installed (make peers)")
    command = ["node", Path(__file__).parents[2] / "llama_cpp_runner.mjs"]
    done = subprocess.run(command, cwd=peers, input=json.dumps({"model": str(path), **asked}), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout)


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_writes_the_same_greedy_tokens_with_the_same_probabilities(family, tokenizer, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed (the extra export)")
    model = trained(tokenizer, **FAMILIES[family])
    ids, ours, expected = ours_on(model, tokenizer)
    assert len(set(expected)) > 5
    theirs = llama(save_gguf(model, tmp_path / "m.gguf", tokenizer), ids=ids, count=len(expected))
    # GPT-2's GELU comes from a table of 16-bit floats there.
    np.testing.assert_allclose(theirs["log_probabilities"], ours, atol=0.05 if family == "gpt2" else 4e-3)
    assert theirs["greedy"] == expected


@pytest.mark.parametrize(("kind", "atol"), [("f16", 0.05), ("bf16", 0.4), ("q8_0", 0.4)])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_smaller_types_write_the_same_greedy_tokens(kind, atol, family, tokenizer, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed (the extra export)")
    model = trained(tokenizer, steps=60, **FAMILIES[family])
    whole, small = save_gguf(model, tmp_path / "f32.gguf", tokenizer), save_gguf(model, tmp_path / "m.gguf", tokenizer, kind)
    assert small.stat().st_size < whole.stat().st_size * (0.45 if kind == "q8_0" else 0.65)
    ids, ours, expected = ours_on(model, tokenizer)
    theirs = llama(small, ids=ids, count=len(expected))
    np.testing.assert_allclose(theirs["log_probabilities"], ours, atol=atol)
    assert theirs["greedy"] == expected


@pytest.mark.parametrize("pre_tokenizer", ["gpt-2", "llama-bpe"])
def test_llama_cpp_cuts_text_into_the_same_tokens_and_puts_it_together_again(pre_tokenizer, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed (the extra export)")
    tokenizer = Tokenizer.train([TEXT], vocab_size=384, pre_tokenizer=pre_tokenizer)
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE))
    texts = [TEXT[:300], "I'll  go\n\n\n  12345 — naïve 漢字 🙂\t!", " x", "<|endoftext|>"]
    theirs = llama(save_gguf(model, tmp_path / "m.gguf", tokenizer), texts=texts)
    assert theirs["tokens"] == [tokenizer.encode(text) for text in texts]
    assert theirs["texts"] == texts
    assert theirs["eos"] == tokenizer.eot_id and theirs["with_specials"][-1] == [tokenizer.eot_id]


def test_the_tokens_around_a_middle_have_their_keys_where_the_model_has_learnt_them(tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (the extra export)")
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE))
    for each in (tokenizer, tokenizer.with_fim()):
        fields = gguf.GGUFReader(save_gguf(model, tmp_path / "m.gguf", each)).fields
        found = [
            fields[f"tokenizer.ggml.fim_{part}_token_id"].contents()
            for part in ("pre", "suf", "mid")
            if f"tokenizer.ggml.fim_{part}_token_id" in fields
        ]
        assert found == list(each.fim or [])
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert {kinds[token] for token in each.fim} == {int(gguf.TokenType.CONTROL)}


def test_characters_become_a_byte_level_tokenizer(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed (the extra export)")
    text = "Où? 漢字 to be — 🙂\n"
    tokenizer = Tokenizer.train([text], kind="char", specials=("<|endoftext|>",))
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE))
    theirs = llama(save_gguf(model, tmp_path / "m.gguf", tokenizer), texts=[text * 2])
    assert theirs["tokens"] == [tokenizer.encode(text * 2)]
    assert theirs["texts"] == [text * 2]


def test_what_llama_cpp_would_compute_otherwise_is_refused_by_name(tokenizer, tmp_path):
    rows = tokenizer.vocab_size
    for changes, message in (
        ({"softcap": 30.0}, "llama models do not have softcap=30.0"),
        ({"sliding_window": 16}, "sliding_window=16"),
        ({"trigram_rows": 8}, "trigram_rows=8 cannot be exported: no other program has such a model"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"norm": "layer", "activation": "relu2"}, "gpt2 models do not have activation='relu2'"),
        ({"qk_norm": True, "rope_scaling": "llama3", "rope_factor": 2.0}, "rope_scaling='llama3'"),
        ({"rope_scaling": "yarn", "rope_factor": 2.0, "rope_attention_factor": 1.0}, "rope_attention_factor=1.0"),
        ({"rope_scaling": "yarn", "rope_factor": 2.0, "rope_fast": 16.0}, "rope_fast=16.0"),
    ):
        with pytest.raises(UserError, match=message):
            save_gguf(Model(ModelConfig(vocab_size=rows, **SHAPE, **changes)), tmp_path / "m.gguf", tokenizer)
    model = Model(ModelConfig(vocab_size=rows, **SHAPE))
    with pytest.raises(UserError, match=r"must name a \.gguf file"):
        save_gguf(model, tmp_path / "m.bin", tokenizer)
    with pytest.raises(UserError, match="f32, f16, bf16, q8_0, got 'q4_0'"):
        save_gguf(model, tmp_path / "m.gguf", tokenizer, "q4_0")
    with pytest.raises(UserError, match="no end-of-text token"):
        save_gguf(model, tmp_path / "m.gguf", Tokenizer.train(["abc"], kind="char"))
    assert not list(tmp_path.iterdir())


def test_an_unknown_pre_tokenizer_is_refused_and_no_half_file_is_left(tokenizer, tmp_path):
    content = json.loads(tokenizer.to_json())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\w+|\s"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]}  # fmt: skip
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE))
    with pytest.raises(UserError, match="way of splitting text into words"):
        save_gguf(model, tmp_path / "m.gguf", Tokenizer(content))
    pytest.importorskip("gguf", reason="gguf is not installed (the extra export)")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight holds values beyond the range of float16"):
        save_gguf(model, tmp_path / "m.gguf", tokenizer, "f16")
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_extra_is_named(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r'pip install "cllm\[export\]"'):
        save_gguf(Model(ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE)), tmp_path / "m.gguf", tokenizer)


def test_the_command_writes_a_file_and_tells_wrong_usage(tokenizer, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed (the extra export)")
    from cllm import save

    save(Model(ModelConfig(vocab_size=tokenizer.vocab_size, **SHAPE)), tmp_path / "m.cllm", tokenizer=tokenizer)
    ran = cllm("export", tmp_path / "m.cllm", "--to", "gguf", "--type", "q8_0", "--out", tmp_path / "m.gguf", "--json")
    assert ran.status == 0, ran.err
    assert ran.json["bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"
    ran = cllm("export", tmp_path / "m.cllm", "--to", "onnx", "--out", tmp_path / "m.onnx")
    assert ran.status == 2 and "hf, gguf, cllm" in ran.err
    ran = cllm("export", tmp_path / "m.cllm", "--to", "hf", "--type", "q8_0", "--out", tmp_path / "hf")
    assert ran.status == 2 and "f32, f16, bf16" in ran.err
