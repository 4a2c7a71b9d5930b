"""Generation at batch 1, ours against plain PyTorch and llama.cpp: prefill of a prompt, then greedy decoding, interleaved in one run.

    python profiling/generate.py                             # the 125 M shape: fp32, bf16, int8, int4
    python profiling/generate.py --shapes llama-1b --weights bf16 int8 int4
    python profiling/generate.py --write generate --plot generate.png

Weights are random: speed does not depend on them. Ours is the engine of `cllm generate` and `cllm serve`, without guesses. llama.cpp takes part where
`make peers` brought it, or with any build of it (--llama FOLDER), called without a binding between, with bf16 for bf16, q8_0 for int8 and q4_0 for
int4. Decoding reads every weight once a token: its limit is the memory, here the rates at which this machine copies, and at which torch reads a
large matrix in the same rounds.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import plots
import torch
from peers import LLAMA_CPP, LLAMA_SHAPES, LlamaCpp, LlamaShape, PlainLlama
from report import add_output_options, finish, print_table, run

from cllm import Model, ModelConfig, runtime
from cllm.config.sampling import Sampling
from cllm.generate.engine import Engine
from cllm.generate.request import Request

GREEDY = Sampling(temperature=0)

BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0 + 4 / 64, "int4": 0.5 + 2 / 32}  # with a float32 scale for 64, a bfloat16 for 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "int4": torch.bfloat16}
READ_BYTES = 1 << 28  # of the matrix whose product with a vector measures the rate of reading


class Ours:
    """Our model behind the call that every contestant answers."""

    def __init__(self, shape: LlamaShape, weights: str) -> None:
        config = ModelConfig(
            vocab_size=shape.vocab_size,
            embed_dim=shape.embed_dim,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            ffn_dim=shape.ffn_dim,
            max_seq_len=shape.seq_len,
            norm="rms",
            tie_embeddings=False,
        )
        self.vocab_size = shape.vocab_size
        self.model = Model(config).to(DTYPES[weights])
        if weights.startswith("int"):
            self.model.quantize_(int(weights[3:]))
        self.model.pack_()  # as `cllm generate` does

    def alone(self, prompt: list[int], count: int) -> tuple[float, float]:
        """`count` greedy tokens after a prompt, without guesses -> (seconds to the first token, seconds of all others)."""
        engine, marks = Engine(self.model, vocab_size=self.vocab_size), []  # a new one each time: nothing is found again

        def on_token(_: int, __: Any) -> bool:
            marks.append(time.perf_counter())
            return True

        engine.submit(Request(prompt, count, GREEDY, speculate=False, on_token=on_token))
        begun = time.perf_counter()
        with torch.no_grad():
            while engine.step():
                pass
        return marks[0] - begun, marks[-1] - marks[0]


def contestants(shape: LlamaShape, weights: str, folder: Path, threads: int, llama: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"cllm": Ours(shape, weights)}
    if not weights.startswith("int"):
        found["torch"] = PlainLlama(shape, DTYPES[weights])
    if weights != "fp32" and LlamaCpp.is_present(llama):
        found["llama.cpp"] = LlamaCpp(llama, shape, weights, folder, threads)
    return found


def measure(shape: LlamaShape, weights: str, options: argparse.Namespace, threads: int) -> dict[str, Any]:
    count, prompt = options.tokens, min(options.prompt, shape.seq_len - options.tokens - 1)
    tokens = torch.randint(shape.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    matrix, vector = torch.ones(READ_BYTES >> 14, 1 << 12), torch.ones(1 << 12)
    with tempfile.TemporaryDirectory(prefix="cllm-generate-") as folder, runtime.progress.Stage(f"{shape.name} {weights}: generating") as stage:
        found = contestants(shape, weights, Path(folder), threads, options.llama)
        firsts: dict[str, list[float]] = {name: [] for name in found}
        rests: dict[str, list[float]] = {name: [] for name in found}
        readings: list[float] = []
        for round_ in range(options.rounds + 1):
            for name, each in found.items():
                first, rest = each.alone(tokens, count + 1)
                if round_:  # the first one warms up
                    firsts[name].append(first)
                    rests[name].append(rest)
            begun = time.perf_counter()
            torch.mv(matrix, vector)
            readings.append(time.perf_counter() - begun)
            stage.advance(round_ + 1, options.rounds + 1, "rounds")
        if "llama.cpp" in found:
            found["llama.cpp"].close()
    prefill = {name: statistics.median(each) for name, each in firsts.items()}
    decode = {name: statistics.median(each) for name, each in rests.items()}
    read_gbps = READ_BYTES / statistics.median(readings[1:]) / 1e9
    weights_bytes = shape.num_weights * BYTES_PER_WEIGHT[weights]
    gbps = weights_bytes * count / decode["cllm"] / 1e9
    copy_gbps = runtime.ceilings().copy_gbps

    def ratio(seconds: dict[str, float]) -> float | None:
        others = [each for name, each in seconds.items() if name != "cllm"]
        return min(others) / seconds["cllm"] if others else None

    return {
        "shape": shape.name, "weights": weights, "prompt": prompt, "tokens": count, "rounds": options.rounds,
        "prefill_tokens_per_second": {name: prompt / each for name, each in prefill.items()},
        "decode_tokens_per_second": {name: count / each for name, each in decode.items()},
        "prefill_ratio": ratio(prefill), "decode_ratio": ratio(decode),
        "weights_gbps": gbps, "copy_gbps": copy_gbps, "share_of_copy": gbps / copy_gbps,
        "read_gbps": read_gbps, "share_of_reading": gbps / read_gbps,
    }  # fmt: skip


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for r in rows for name in r["decode_tokens_per_second"]))
    labels = [f"{r['shape']}\n{r['weights']}" for r in rows]
    series = {name: [r["decode_tokens_per_second"].get(name) for r in rows] for name in names}
    plots.bars(path, "Greedy decoding at batch 1", labels, series, "tokens per second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-125m"], choices=LLAMA_SHAPES)
    parser.add_argument("--weights", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--llama", type=Path, default=LLAMA_CPP, metavar="FOLDER", help="where libllama lies with what it loads")
    parser.add_argument("--threads", type=int)
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    threads = options.threads or runtime.device.usable_cores()
    rows = []
    with runtime.use(threads=options.threads):
        torch.set_num_threads(threads)
        for name in options.shapes:
            rows += [measure(LLAMA_SHAPES[name], weights, options, threads) for weights in options.weights]
    if not LlamaCpp.is_present(options.llama):
        print("llama.cpp is absent: `make peers` installs it, and gguf is needed (pip install 'cllm[export]')")

    def rates(values: dict[str, float]) -> str:
        return " / ".join(f"{each:,.1f}" for each in values.values())

    def times(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    print_table(
        ("shape", "weights", "contestants", "prefill tok/s", "ratio", "decode tok/s", "ratio", "weights GB/s", "of copying", "of reading"),
        [(r["shape"], r["weights"], " / ".join(r["decode_tokens_per_second"]), rates(r["prefill_tokens_per_second"]), times(r["prefill_ratio"]),
          rates(r["decode_tokens_per_second"]), times(r["decode_ratio"]), f"{r['weights_gbps']:.1f}", f"{100 * r['share_of_copy']:.0f} %",
          f"{100 * r['share_of_reading']:.0f} %")
         for r in rows],
    )  # fmt: skip
    finish(options, rows, lambda path: draw(path, rows), threads=options.threads)


if __name__ == "__main__":
    run(main)
