"""llama.cpp as a contestant of generate.py, in a process of its own: its threads and ours do not meet, and its Python may be another one.

    PYTHON llama_cpp_worker.py SHAPE-AS-JSON FOLDER bf16|int8 THREADS [plain]

Needs llama-cpp-python, gguf and numpy. Writes random weights to a GGUF file (bf16 or q8_0), then answers lines of JSON: {"prefill": [tokens]}
and {"decode": [token, count]} with the last token. plain: without its own layouts of the weights (AMX among them).
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp_model import write_model


class Session:
    def __init__(self, path: Path, shape: dict[str, Any], threads: int, repack: bool) -> None:
        self.vocab_size, self.length = shape["vocab_size"], 0
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        how = llama_cpp.llama_model_default_params()
        how.use_extra_bufts = repack
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), how)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = shape["seq_len"], 512, 512
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not load {path.name}")
        self.memory = llama_cpp.llama_get_memory(self.context)

    def step(self, tokens: list[int]) -> int:
        held = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(held, len(tokens))):
            raise RuntimeError("llama.cpp could not decode")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocab_size,)).argmax())

    def prefill(self, tokens: list[int]) -> int:
        llama_cpp.llama_memory_clear(self.memory, True)
        self.length = len(tokens)
        return self.step(tokens)

    def decode(self, token: int, count: int) -> int:
        """The memory goes back to the prompt afterwards, so that each round does the same."""
        for _ in range(count):
            token = self.step([token])
        llama_cpp.llama_memory_seq_rm(self.memory, 0, self.length, -1)
        return token


def main() -> None:
    shape, folder, weights, threads = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    path = folder / f"{shape['name']}-{weights}.gguf"
    write_model(path, shape, weights)
    session = Session(path, shape, threads, sys.argv[5:] != ["plain"])
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        result = session.prefill(request["prefill"]) if "prefill" in request else session.decode(*request["decode"])
        print(result, flush=True)


if __name__ == "__main__":
    main()
