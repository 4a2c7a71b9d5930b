"""Random weights as a GGUF file, for llama.cpp as a contestant (llama_cpp_worker.py, llama_cpp_worker.mjs)."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Tokens that nobody reads: without any, some builds of llama.cpp end when a first token is asked for."""
    special = [("<unk>", gguf.TokenType.UNKNOWN), ("<s>", gguf.TokenType.CONTROL), ("</s>", gguf.TokenType.CONTROL)]
    special += [(f"<0x{byte:02X}>", gguf.TokenType.BYTE) for byte in range(max(0, min(256, size - len(special))))]
    tokens = (special + [(f"t{number}", gguf.TokenType.NORMAL) for number in range(size - len(special))])[:size]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_scores([-1000.0] * size)
    writer.add_token_types([int(kind) for _, kind in tokens])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def write_model(path: Path, shape: dict[str, Any], weights: str) -> None:
    width, hidden = shape["embed_dim"], shape["ffn_dim"]
    head = width // shape["num_heads"]
    kv = shape["num_kv_heads"] * head
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(shape["seq_len"])
    writer.add_embedding_length(width)
    writer.add_block_count(shape["num_layers"])
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(shape["num_heads"])
    writer.add_head_count_kv(shape["num_kv_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(shape["vocab_size"])
    _add_vocabulary(writer, shape["vocab_size"])
    kind = {"bf16": gguf.GGMLQuantizationType.BF16, "int8": gguf.GGMLQuantizationType.Q8_0, "int4": gguf.GGMLQuantizationType.Q4_0}[weights]
    matrices = {"token_embd": (shape["vocab_size"], width), "output": (shape["vocab_size"], width)}
    vectors = ["output_norm"]
    for i in range(shape["num_layers"]):
        sizes = {"attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, width),
                 "ffn_gate": (hidden, width), "ffn_up": (hidden, width), "ffn_down": (width, hidden)}  # fmt: skip
        matrices |= {f"blk.{i}.{name}": size for name, size in sizes.items()}
        vectors += [f"blk.{i}.attn_norm", f"blk.{i}.ffn_norm"]
    random = np.random.default_rng(0)
    for name, size in matrices.items():
        values = random.standard_normal(size, np.float32) * np.float32(0.02)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in vectors:
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
