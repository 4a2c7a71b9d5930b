"""config.json of Hugging Face models <-> `ModelConfig`.

Served: LlamaForCausalLM, MistralForCausalLM (a Llama with a sliding window), Qwen2ForCausalLM, Qwen3ForCausalLM,
GPT2LMHeadModel. A setting that would change the result and that is not implemented here is refused by its name. Dropout
rates are not: they do not change a trained model's output, and a run names its own.

Rotary scaling: linear, llama3 and yarn are served; dynamic is the plain rotary up to max_position_embeddings, which is
as far as the model goes here. longrope and any other kind are refused, as are parts of a head without rotation.
"""

import math
from typing import Any

from cllm.config.model import ROPE_SCALINGS, ModelConfig
from cllm.runtime.errors import CheckpointError, UserError

# Hugging Face's names of activations -> ours.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu2": "relu2",
}
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2"}
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel")
_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def config_from_hf(values: dict[str, Any]) -> ModelConfig:
    """The content of config.json -> a ModelConfig. Raises CheckpointError that names what is not supported."""
    named = values.get("architectures") or [_MODEL_TYPES.get(str(values.get("model_type")), values.get("model_type"))]
    architecture = named[0] if isinstance(named, list) else named
    if architecture not in ARCHITECTURES:
        raise CheckpointError(f"the architecture {architecture!r} is not supported. Supported: {', '.join(ARCHITECTURES)}.")
    if values.get("quantization_config"):
        raise CheckpointError("quantised weights (quantization_config) are not supported. Save the model unquantised first.")
    try:
        return _gpt2_from_hf(values) if architecture == "GPT2LMHeadModel" else _llama_from_hf(values, architecture)
    except UserError as error:
        raise CheckpointError(f"config.json describes a model that is not supported: {error}") from error


def config_to_hf(config: ModelConfig, eot_id: int | None = None) -> dict[str, Any]:
    """A ModelConfig -> the content of config.json. Raises UserError when no Hugging Face architecture computes the
    same."""
    check_others_have(config)
    if config.softcap is not None:
        raise UserError(f"softcap={config.softcap} cannot be exported: no Hugging Face Llama, Qwen2, Qwen3 or GPT-2 has it. Train with softcap=None.")
    return _gpt2_to_hf(config, eot_id) if config.family == "gpt2" else _llama_to_hf(config, eot_id)


def check_others_have(config: ModelConfig) -> None:
    """UserError for a model with something that no other program has."""
    if config.only_here:
        found = ", ".join(f"{name}={value!r}" for name, value in config.only_here.items())
        raise UserError(
            f"{found} cannot be exported: no other program has such a model. Keep it as a .cllm file (cllm export --to cllm), or train one with "
            f"{' and '.join(f'{name}=0' for name in config.only_here)}."
        )


def _llama_from_hf(values: dict[str, Any], architecture: str) -> ModelConfig:
    _refuse(values, {"mlp_bias": False, "pretraining_tp": 1})
    if architecture != "Qwen2ForCausalLM":  # which has its three biases whatever the file says
        _refuse(values, {"attention_bias": False})
    embed_dim, num_heads = _whole(values, "hidden_size"), _whole(values, "num_attention_heads")
    return ModelConfig(
        vocab_size=_whole(values, "vocab_size"),
        embed_dim=embed_dim,
        num_layers=_whole(values, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=values.get("num_key_value_heads") or num_heads,
        # Qwen3's own default is 128 whatever the width; the others' is the quotient.
        head_dim=values.get("head_dim") or (128 if architecture == "Qwen3ForCausalLM" else None),
        ffn_dim=_whole(values, "intermediate_size"),
        max_seq_len=_whole(values, "max_position_embeddings"),
        norm="rms",
        activation=_activation(values, "hidden_act", "silu"),
        qk_norm=architecture == "Qwen3ForCausalLM",
        attention_bias=architecture == "Qwen2ForCausalLM",
        tie_embeddings=bool(values.get("tie_word_embeddings", False)),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        sliding_window=_sliding_window(values, architecture),
        **_rope_from_hf(values),
    )


def _rope_from_hf(values: dict[str, Any]) -> dict[str, Any]:
    """The rotary fields of a ModelConfig. transformers 4 wrote rope_theta and rope_scaling, transformers 5 writes
    rope_parameters."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"rope_parameters and rope_scaling must be objects, got {given!r}.")
    _refuse({**values, **given}, {"partial_rotary_factor": 1.0})
    fields: dict[str, Any] = {"rope_theta": float(given.get("rope_theta") or values.get("rope_theta") or 10000.0)}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind in ("default", "dynamic"):
        return fields
    if kind not in ROPE_SCALINGS:
        raise CheckpointError(f"rotary scaling of type {kind!r} is not supported. Supported: default, dynamic, {', '.join(ROPE_SCALINGS)}.")
    original = given.get("original_max_position_embeddings")
    factor = given.get("factor")
    if factor is None and kind == "yarn" and original:
        factor = _whole(values, "max_position_embeddings") / original
    fields |= {"rope_scaling": kind, "rope_factor": factor}
    if kind != "linear":
        fields["rope_original_len"] = original or _whole(values, "max_position_embeddings")
    if kind == "llama3":
        fields |= {"rope_slow": given.get("low_freq_factor"), "rope_fast": given.get("high_freq_factor")}
    if kind == "yarn":
        _refuse(given, {"truncate": True})
        attention = given.get("attention_factor")
        scales = given.get("mscale"), given.get("mscale_all_dim")
        if attention is None and factor is not None and all(scales):
            attention = _mscale(factor, scales[0]) / _mscale(factor, scales[1])
        fields |= {"rope_slow": given.get("beta_slow"), "rope_fast": given.get("beta_fast"), "rope_attention_factor": attention}
    return fields


def _mscale(factor: float, scale: Any) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    """rope_parameters for transformers 5, rope_theta and rope_scaling for the versions before."""
    scaling: dict[str, Any] = {"rope_type": config.rope_scaling or "default"}
    if config.rope_scaling is not None:
        scaling["factor"] = config.rope_factor
    if config.rope_original_len is not None:
        scaling["original_max_position_embeddings"] = config.rope_original_len
    if config.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": config.rope_slow, "high_freq_factor": config.rope_fast}
    if config.rope_scaling == "yarn":
        scaling |= {"beta_slow": config.rope_slow, "beta_fast": config.rope_fast, "attention_factor": config.rope_attention_factor}
    values = {"rope_theta": config.rope_theta, "rope_parameters": {"rope_theta": config.rope_theta, **scaling}}
    return values if config.rope_scaling is None else {**values, "rope_scaling": scaling}


def _sliding_window(values: dict[str, Any], architecture: str) -> int | None:
    window = values.get("sliding_window")
    if architecture == "LlamaForCausalLM" or not window:
        return None
    if architecture == "MistralForCausalLM":
        return int(window)
    if not values.get("use_sliding_window"):
        return None
    kinds = set(values.get("layer_types") or [])
    if not kinds and values.get("max_window_layers", 28) < _whole(values, "num_hidden_layers"):
        kinds = {"sliding_attention"} if not values["max_window_layers"] else {"sliding_attention", "full_attention"}
    if len(kinds) > 1:
        raise CheckpointError("layer_types mixes full and sliding attention, which is not supported; all layers must be of one kind.")
    return int(window) if kinds == {"sliding_attention"} else None


def _llama_to_hf(config: ModelConfig, eot_id: int | None) -> dict[str, Any]:
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": ACTIVATION_NAMES[config.activation_name],
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        **_rope_to_hf(config),
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        **_common_to_hf(config, eot_id),
    }
    if config.qk_norm or config.attention_bias:
        windowed = config.sliding_window is not None
        kind = "sliding_attention" if windowed else "full_attention"
        return {
            "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "Qwen2ForCausalLM"],
            "model_type": "qwen3" if config.qk_norm else "qwen2",
            **values,
            "use_sliding_window": windowed,
            "sliding_window": config.sliding_window,
            "max_window_layers": 0 if windowed else config.num_layers,
            "layer_types": [kind] * config.num_layers,
        }
    if config.sliding_window is not None:
        window = {"sliding_window": config.sliding_window}
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **values, **window}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **values, "mlp_bias": False}


def _gpt2_from_hf(values: dict[str, Any]) -> ModelConfig:
    _refuse(values, {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False})
    embed_dim = _whole(values, "n_embd")
    return ModelConfig(
        vocab_size=_whole(values, "vocab_size"),
        embed_dim=embed_dim,
        num_layers=_whole(values, "n_layer"),
        num_heads=_whole(values, "n_head"),
        ffn_dim=values.get("n_inner") or 4 * embed_dim,
        max_seq_len=_whole(values, "n_positions"),
        norm="layer",
        activation=_activation(values, "activation_function", "gelu_new"),
        tie_embeddings=bool(values.get("tie_word_embeddings", True)),
        norm_eps=float(values.get("layer_norm_epsilon", 1e-5)),
    )


def _gpt2_to_hf(config: ModelConfig, eot_id: int | None) -> dict[str, Any]:
    name = "gelu_new" if config.activation == "gelu_tanh" else ACTIVATION_NAMES[config.activation_name]
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.embed_dim,
        "n_inner": config.ffn_dim,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_seq_len,
        "n_ctx": config.max_seq_len,
        "activation_function": name,
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": True,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        **_common_to_hf(config, eot_id),
    }


def _common_to_hf(config: ModelConfig, eot_id: int | None) -> dict[str, Any]:
    return {
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "use_cache": True,
    }


def _refuse(values: dict[str, Any], served: dict[str, Any]) -> None:
    """Raises for a setting that is there and differs from the only value that is implemented."""
    for name, value in served.items():
        given = values.get(name)
        if given is not None and given != value:
            raise CheckpointError(f"the setting {name}={given!r} is not supported; only {name}={value!r} is.")


def _activation(values: dict[str, Any], key: str, default: str) -> str:
    name = values.get(key, default)
    if name not in ACTIVATIONS:
        raise CheckpointError(f"the activation {key}={name!r} is not supported. Supported: {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[name]


def _whole(values: dict[str, Any], key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json must give {key} as a whole number of at least 1, got {value!r}.")
    return value
