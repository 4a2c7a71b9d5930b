"""llama.cpp as a contestant of generate.py and serve.py, in a process of its own: its threads and ours do not meet.

    python llama_cpp_worker.py FOLDER MODEL.gguf CONTEXT THREADS SEQUENCES

FOLDER holds libllama and the libraries that it loads; they are called as they are, without a binding between. Answers lines of JSON on standard
input, each with one line:
    {"alone": [tokens], "count": N}  N greedy tokens after a prompt -> {"first": seconds to the first token, "rest": seconds of all others}
    {"together": [[tokens], ...], "count": N, "late": [tokens] or null}
        N greedy tokens for each prompt, all at once; `late` is asked for when every other has its first token
                                     -> {"seconds": of all, "late_first": seconds from asking to its first token}
Sequences are batched as llama.cpp's server does: one token of each that has begun, then prompts until the batch is full.
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)  # what it says is not passed on
BATCH = 512  # tokens that are computed at once, llama.cpp's default


class Params(ctypes.Structure):
    """Parameters as llama.cpp passes them, by value: longer than any version's, whose end nobody reads. Of a context the first four are these."""

    _fields_ = [("n_ctx", ctypes.c_uint32), ("n_batch", ctypes.c_uint32), ("n_ubatch", ctypes.c_uint32), ("n_seq_max", ctypes.c_uint32),
                ("others", ctypes.c_byte * 1008)]  # fmt: skip


class Batch(ctypes.Structure):
    _fields_ = [("n_tokens", ctypes.c_int32), ("token", ctypes.c_void_p), ("embd", ctypes.c_void_p), ("pos", ctypes.c_void_p),
                ("n_seq_id", ctypes.c_void_p), ("seq_id", ctypes.c_void_p), ("logits", ctypes.c_void_p)]  # fmt: skip


def library(folder: Path) -> ctypes.CDLL:
    found = next(iter(sorted(folder.glob("libllama.so*")) or sorted(folder.glob("libllama.v*.so"))), None)
    base = next(iter(sorted(folder.glob("libggml.so*")) or sorted(folder.glob("libggml.v*.so"))), None)
    if found is None or base is None:
        raise SystemExit(f"{folder} holds no libllama and libggml")
    backends = ctypes.CDLL(str(base), ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(found), ctypes.RTLD_GLOBAL)
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("llama_model_default_params", Params, []),
        ("llama_context_default_params", Params, []),
        ("llama_model_load_from_file", pointer, [ctypes.c_char_p, Params]),
        ("llama_init_from_model", pointer, [pointer, Params]),
        ("llama_set_n_threads", None, [pointer, ctypes.c_int32, ctypes.c_int32]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_decode", ctypes.c_int32, [pointer, Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
        ("llama_log_set", None, [pointer, pointer]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", ctypes.c_int32, [pointer]),
    ):
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    llama.llama_log_set(ctypes.cast(_QUIET, pointer), None)
    backends.ggml_backend_load_all_from_path(str(folder).encode())
    return llama


class Sequence:
    """A prompt and its greedy continuation. on_first: called with the first token's arrival."""

    def __init__(self, number: int, prompt: list[int], count: int, on_first: Callable[[], None] = lambda: None) -> None:
        self.number, self.waiting, self.left, self.position, self.on_first = number, prompt, count, 0, on_first
        self.is_begun = False


class Session:
    def __init__(self, folder: Path, model: Path, context: int, threads: int, sequences: int) -> None:
        self.llama = llama = library(folder)
        llama.llama_backend_init()
        loaded = llama.llama_model_load_from_file(str(model).encode(), llama.llama_model_default_params())
        params = llama.llama_context_default_params()
        if (params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max) != (512, 2048, 512, 1):
            raise SystemExit("this version of llama.cpp has other parameters of a context; llama_cpp_worker.py has to learn them")
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context * sequences, BATCH, BATCH, sequences
        self.context = llama.llama_init_from_model(loaded, params) if loaded else None
        if not self.context:
            raise SystemExit(f"llama.cpp could not load {model.name}")
        llama.llama_set_n_threads(self.context, threads, threads)
        self.memory = llama.llama_get_memory(self.context)
        self.vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(loaded))
        self.ids = np.arange(sequences, dtype=np.int32)

    def step(self, sequences: list[Sequence]) -> None:
        """One batch: the next token of each sequence that has begun, then as much of the prompts as fits. Those that are finished are removed."""
        parts: list[tuple[Sequence, list[int]]] = []
        room = BATCH
        for each in sorted(sequences, key=lambda each: not each.is_begun):
            if room:
                parts.append((each, each.waiting[:room]))
                each.waiting = each.waiting[room:]
                room -= len(parts[-1][1])
        tokens = np.array([token for _, part in parts for token in part], np.int32)
        positions = np.array([each.position + i for each, part in parts for i in range(len(part))], np.int32)
        wanted = np.zeros(len(tokens), np.int8)
        counts = np.ones(len(tokens), np.int32)
        owners = np.array([self.ids.ctypes.data + 4 * each.number for each, part in parts for _ in part], np.uint64)
        end = 0
        ends = []
        for each, part in parts:
            end += len(part)
            each.position += len(part)
            if not each.waiting:
                wanted[end - 1] = 1
                ends.append((each, end - 1))
        arrays = (tokens, None, positions, counts, owners, wanted)
        batch = Batch(len(tokens), *(None if array is None else array.ctypes.data for array in arrays))
        if self.llama.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp could not decode")
        for each, row in ends:
            logits = np.ctypeslib.as_array(self.llama.llama_get_logits_ith(self.context, row), (self.vocab_size,))
            each.waiting = [int(logits.argmax())]
            each.left -= 1
            if not each.is_begun:
                each.is_begun = True
                each.on_first()
            if not each.left:
                sequences.remove(each)

    def alone(self, prompt: list[int], count: int) -> dict[str, float]:
        self.llama.llama_memory_clear(self.memory, True)
        marks = []
        running = [Sequence(0, prompt, count, lambda: marks.append(time.perf_counter()))]
        begun = time.perf_counter()
        while running:
            self.step(running)
        return {"first": marks[0] - begun, "rest": time.perf_counter() - marks[0]}

    def together(self, prompts: list[list[int]], count: int, late: list[int] | None) -> dict[str, float]:
        self.llama.llama_memory_clear(self.memory, True)
        begun, firsts, marks = time.perf_counter(), [], {}
        running = [Sequence(number, prompt, count, lambda: firsts.append(1)) for number, prompt in enumerate(prompts)]
        while running:
            self.step(running)
            if late is not None and len(firsts) == len(prompts) and "asked" not in marks:
                marks["asked"] = time.perf_counter()
                running.append(Sequence(len(prompts), late, 1, lambda: marks.setdefault("first", time.perf_counter())))
        seconds = time.perf_counter() - begun
        return {"seconds": seconds, "late_first": marks["first"] - marks["asked"] if late is not None else 0.0}


def main() -> None:
    session = Session(Path(sys.argv[1]), Path(sys.argv[2]), *(int(each) for each in sys.argv[3:6]))
    print("ready", flush=True)
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        if "alone" in asked:
            answer = session.alone(asked["alone"], asked["count"])
        else:
            answer = session.together(asked["together"], asked["count"], asked["late"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
