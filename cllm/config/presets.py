"""Named model sizes for `ModelConfig.preset`. A name states the parameter count at the preset's own vocabulary (a test
holds it to 10 %).

The cllm presets are Qwen3-shaped: grouped-query attention, QK-norm, tied embeddings, heads of 32 to 128. Small models
get small vocabularies, so that the embedding does not eat the parameters; `vocab_size=...` overrides. The gpt2 ones are
OpenAI's four.

An architecture changes a cllm model of any size into one that learns more in the same time and runs in CLLM alone.
"""

from typing import Any


def _cllm(vocab_size: int, embed_dim: int, num_layers: int, num_heads: int, num_kv_heads: int, ffn_dim: int, max_seq_len: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "embed_dim": embed_dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "ffn_dim": ffn_dim,
        "max_seq_len": max_seq_len,
        "norm": "rms",
        "qk_norm": True,
    }


def _gpt2(embed_dim: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    return {
        "vocab_size": 50257,
        "embed_dim": embed_dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "max_seq_len": 1024,
        "norm": "layer",
    }


PRESETS: dict[str, dict[str, Any]] = {
    #                  vocab  embed  layers heads kv   ffn  context
    "cllm-1m": _cllm(2048, 128, 4, 4, 2, 352, 256),
    "cllm-5m": _cllm(4096, 256, 6, 4, 2, 640, 512),
    "cllm-15m": _cllm(8192, 384, 8, 6, 2, 1024, 512),
    "cllm-60m": _cllm(16384, 640, 11, 10, 5, 1728, 1024),
    "cllm-125m": _cllm(32768, 768, 16, 12, 4, 2048, 1024),
    "cllm-350m": _cllm(32768, 1024, 27, 16, 8, 2816, 2048),
    "cllm-1b": _cllm(32768, 2048, 20, 16, 8, 5632, 2048),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
}

ARCHITECTURES = ("fast",)


def architecture(name: str | None, vocab_size: int) -> dict[str, Any]:
    """The fields of a ModelConfig that an architecture sets, for a vocabulary. Which of them pay was measured by profiling/ablation.py."""
    if name is None:
        return {}
    # As many rows as there are pairs of tokens, as long as that is few: what does not occur in a text needs no row of its own.
    rows = max(64, min(8192, vocab_size * vocab_size))
    return {"bigram_rows": rows, "trigram_rows": rows}
