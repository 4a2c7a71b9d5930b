"""GGUF files, which llama.cpp and what is built on it run: weights, shape and tokenizer in one file.

    save_gguf(model, "model.gguf", tokenizer, type="q8_0")

What llama.cpp's own converter would make of the Hugging Face folder, without the folder. A model that llama.cpp would compute
differently is refused by the name of the setting. Matrices are stored in `type`; norms, biases and learned positions stay float32.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cllm.files import MODEL, new_file
from cllm.interop.hf_config import check_others_have
from cllm.model.rope import frequencies, plain_frequencies
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.config.model import ModelConfig
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model

TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
Q8_0_BLOCK = 32  # values that share one scale
# Pre-tokenizer patterns that llama.cpp knows by name; "gpt-2" is the one built into the ByteLevel pre-tokenizer.
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

# Our (Hugging Face's) name inside a block -> GGUF's.
_LLAMA_BLOCK = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_GPT2_BLOCK = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}  # fmt: skip
_OUTSIDE = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "transformer.wte": "token_embd", "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm", "lm_head": "output",
}  # fmt: skip


def save_gguf(model: Model, path: str | os.PathLike[str], tokenizer: Tokenizer, type: str = "f32") -> Path:
    """Writes one .gguf file, whole or not at all, and returns its path. type: f32, f16, bf16 or q8_0 (8 bits, a scale for each 32).

    Raises UserError for another suffix or type, a model or tokenizer that llama.cpp cannot run as it is, or a missing gguf package;
    CheckpointError when the disk does not take it.
    """
    file = Path(path)
    if file.suffix != ".gguf":
        raise UserError(f"--out must name a .gguf file, got {str(path)!r}.")
    if type not in TYPES:
        raise UserError(f"a GGUF file holds {', '.join(TYPES)}, got {type!r}.")
    architecture = _architecture(model.config)
    vocabulary = _vocabulary(tokenizer, model.config.vocab_size)
    gguf = library()
    with new_file(file, MODEL) as beside:
        writer = gguf.GGUFWriter(beside, architecture)
        try:
            _write_shape(writer, model.config, gguf)
            writer.add_file_type(int(gguf.LlamaFileType[TYPES[type]]))
            _write_vocabulary(writer, vocabulary, gguf)
            for name, tensor in _tensors(model, architecture):
                _add_tensor(writer, name, tensor, type, gguf)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        except OSError as error:
            if error.errno is None:  # numpy, which writes the tensors, does not pass on why a write was cut short
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise
        finally:
            writer.close()
    return file


def library() -> Any:
    """The gguf package. UserError where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError('writing GGUF files needs the package gguf. Install it: pip install "cllm[export]"') from error


# -- the model ---------------------------------------------------------------------------------------------------------------------


def _architecture(config: ModelConfig) -> str:
    """llama.cpp's name of the architecture. What its graph has built in, and we do otherwise, is refused."""
    check_others_have(config)
    name = "gpt2" if config.family == "gpt2" else "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"
    activation = "gelu_tanh" if name == "gpt2" else "silu"
    wrong = {
        "softcap": config.softcap is not None,
        "sliding_window": config.window_or_none is not None,
        "activation": config.activation != activation,
        "rope_attention_factor": config.rope_scaling == "yarn" and not _has_usual_attention_factor(config),
        "rope_slow": config.rope_scaling == "yarn" and config.rope_slow != 1.0,  # there settings of who runs the model, not of the file
        "rope_fast": config.rope_scaling == "yarn" and config.rope_fast != 32.0,
        "rope_scaling": config.rope_scaling == "llama3" and name != "llama",
    }
    found = ", ".join(f"{setting}={getattr(config, setting)!r}" for setting, is_wrong in wrong.items() if is_wrong)
    if found:
        raise UserError(f"llama.cpp's {name} models do not have {found}, so this model would write other text there. Export it with --to hf.")
    return name


def _has_usual_attention_factor(config: ModelConfig) -> bool:
    assert config.rope_factor is not None and config.rope_attention_factor is not None
    return abs(config.rope_attention_factor - (0.1 * np.log(max(config.rope_factor, 1.0)) + 1.0)) < 1e-6


def _write_shape(writer: Any, config: ModelConfig, gguf: Any) -> None:
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.family == "gpt2":
        writer.add_layer_norm_eps(config.eps)
        return
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.eps)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(config.rope_scaling))
        writer.add_rope_scaling_factor(config.rope_factor)
    if config.rope_scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(config.rope_original_len)


def _tensors(model: Model, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """(GGUF's name, float32 tensor) of every parameter, matrices as (out, in)."""
    config = model.config
    block_names = _GPT2_BLOCK if config.family == "gpt2" else _LLAMA_BLOCK
    for name, parameter in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        tensor = parameter.detach().to("cpu", torch.float32)
        if stem in _OUTSIDE:
            yield f"{_OUTSIDE[stem]}.{kind}", tensor
            continue
        _, _, layer, inside = stem.split(".", 3)
        if config.family == "gpt2" and tensor.dim() == 2:
            tensor = tensor.T  # (in, out) there
        if architecture == "llama" and inside in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = _pairs_side_by_side(tensor, config.head_size)
        yield f"blk.{layer}.{block_names[inside]}.{kind}", tensor
    if config.rope_scaling == "llama3":
        yield "rope_freqs.weight", torch.from_numpy(plain_frequencies(config) / frequencies(config))


def _pairs_side_by_side(tensor: Tensor, head_dim: int) -> Tensor:
    """llama.cpp's llama rotates neighbours (0, 1), (2, 3), ...; Hugging Face's the halves (0, D/2), (1, D/2 + 1), ..."""
    return tensor.view(-1, 2, head_dim // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _add_tensor(writer: Any, name: str, tensor: Tensor, type: str, gguf: Any) -> None:
    kind = type if tensor.dim() == 2 and name != "position_embd.weight" else "f32"
    if kind == "q8_0" and tensor.shape[1] % Q8_0_BLOCK:
        kind = "f16"  # no whole blocks
    if kind == "f16" and tensor.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(f"{name} holds values beyond the range of float16. Export with --type bf16 or f32.")
    stored = gguf.GGMLQuantizationType[kind.upper()]
    data = gguf.quants.quantize(tensor.contiguous().numpy(), stored)
    writer.add_tensor(name, data, raw_dtype=stored)


# -- the tokenizer -----------------------------------------------------------------------------------------------------------------


def _vocabulary(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """What llama.cpp's byte-level BPE needs to know. Raises UserError for a tokenizer that it cannot be."""
    if tokenizer.eot_id is None:
        raise UserError(
            "this tokenizer has no end-of-text token, and llama.cpp would take some other token for it. "
            "Export with --to hf or --to cllm, or train on more than one document, or with cllm train --tokenizer bpe."
        )
    content = json.loads(tokenizer.to_json())
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [_UNUSED] * rows
    if tokenizer.kind == "char":
        names, merges, pre = _characters(tokenizer)
    else:
        names, merges, pre = content["model"]["vocab"], _merges(content), _pre_tokenizer(content)
    for token, i in names.items():
        tokens[i], types[i] = token, _NORMAL
    for added in content.get("added_tokens") or []:
        tokens[added["id"]], types[added["id"]] = added["content"], _CONTROL if added.get("special") else _USER_DEFINED
    found = {"tokens": tokens, "types": types, "merges": merges, "pre": pre, "eot": tokenizer.eot_id, "template": tokenizer.chat_template}
    return found | {"fim": tokenizer.fim}


def _characters(tokenizer: Tokenizer) -> tuple[dict[str, int], list[str], str]:
    """A character as a byte-level token, and the merges that put its bytes together: in UTF-8 the bytes of one character never join those
    of its neighbour, so that nothing else is merged."""
    from cllm.data.tokens.vocabulary import byte_level_name

    special = set(tokenizer.special_tokens.values())
    names = {byte_level_name(tokenizer.token_bytes(i)): i for i in range(tokenizer.vocab_size) if i not in special and tokenizer.token_bytes(i)}
    merges = {f"{name[:end]} {name[end]}": None for name in names for end in range(1, len(name))}
    return names, sorted(merges, key=lambda merge: (len(merge), merge)), "gpt-2"


def _merges(content: dict[str, Any]) -> list[str]:
    model = content["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UserError("only byte-level BPE and character tokenizers can be put into a GGUF file here, and this is neither. Export with --to hf.")
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _pre_tokenizer(content: dict[str, Any]) -> str:
    from cllm.data.tokens.vocabulary import LLAMA_BPE_PATTERN

    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    patterns = [(step.get("pattern") or {}).get("Regex") for step in steps if step.get("type") == "Split"]
    if len(byte_level) == 1 and not byte_level[0].get("add_prefix_space") and len(steps) == 1 + len(patterns) and not content.get("normalizer"):
        if byte_level[0].get("use_regex", True) and not patterns:
            return "gpt-2"
        known = {LLAMA_BPE_PATTERN: "llama-bpe"}
        if not byte_level[0].get("use_regex", True) and len(patterns) == 1 and patterns[0] in known:
            return known[patterns[0]]
    if [step.get("type") for step in steps] == ["Split", "ByteLevel"] and patterns == [_QWEN2]:
        return "qwen2"  # Its NFC normalisation is left out there, as for every Qwen2: text in decomposed characters is cut otherwise.
    raise UserError("llama.cpp does not know this tokenizer's way of splitting text into words (known: gpt-2, llama-bpe, qwen2). Use --to hf.")


def _write_vocabulary(writer: Any, vocabulary: dict[str, Any], gguf: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_bos_token_id(vocabulary["eot"])
    writer.add_eos_token_id(vocabulary["eot"])
    writer.add_add_bos_token(False)
    if vocabulary["fim"] is not None:
        keys = gguf.Keys.Tokenizer
        for key, token in zip((keys.FIM_PRE_ID, keys.FIM_SUF_ID, keys.FIM_MID_ID), vocabulary["fim"], strict=True):
            writer.add_uint32(key, token)
    if vocabulary["template"] is not None:
        writer.add_chat_template(vocabulary["template"])
