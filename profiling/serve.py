"""Many requests at once: our engine against llama.cpp with as many sequences, interleaved in one run.

    python profiling/serve.py                                # 125 M, bf16: 8 and 32 requests of 128 tokens in, 128 out
    python profiling/serve.py --weights bf16 int8 --write serve

Weights are random: speed does not depend on them. `total tok/s` counts the tokens written by all requests over the time from the first question to
the last answer. `first token` is how long a request of 128 tokens waits for its first one while 16 others are being answered. llama.cpp takes part
where `make peers` has brought it, or with any build of it (--llama FOLDER); its sequences are batched as its server's slots are. Nobody guesses, and
prompts differ, so that nobody finds another's keys.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import generate
import plots
import torch
from peers import LLAMA_CPP, LLAMA_SHAPES, LlamaCpp, LlamaShape
from report import add_output_options, finish, print_table, run

from cllm import runtime
from cllm.config.sampling import Sampling
from cllm.generate.engine import Engine
from cllm.generate.request import Request

GREEDY = Sampling(temperature=0)


class Ours:
    """Our engine behind the calls of `peers.LlamaCpp`."""

    def __init__(self, shape: LlamaShape, weights: str) -> None:
        self.model, self.vocab_size = generate.Ours(shape, weights).model, shape.vocab_size

    def together(self, prompts: list[list[int]], count: int, late: list[int] | None = None) -> dict[str, float]:
        engine = Engine(self.model, vocab_size=self.vocab_size)
        waiting, marks = set(range(len(prompts))), {}

        def first(number: int) -> Any:
            def on_token(_: int, __: Any) -> bool:
                waiting.discard(number)
                return True

            return on_token

        def late_token(_: int, __: Any) -> bool:
            marks.setdefault("first", time.perf_counter())
            return True

        begun = time.perf_counter()
        for number, prompt in enumerate(prompts):
            engine.submit(Request(prompt, count, GREEDY, speculate=False, on_token=first(number)))
        while engine.step():
            if late is not None and not waiting and "asked" not in marks:
                marks["asked"] = time.perf_counter()
                engine.submit(Request(late, 1, GREEDY, speculate=False, on_token=late_token))
        return {"seconds": time.perf_counter() - begun, "late_first": marks["first"] - marks["asked"] if late is not None else 0.0}


def prompts_of(shape: LlamaShape, number: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = torch.randint(259, shape.vocab_size, (number, length), generator=generator).tolist()
    return found


def measure(shape: LlamaShape, weights: str, options: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    most = max(*options.requests, options.streams + 1)
    with tempfile.TemporaryDirectory(prefix="cllm-serve-") as folder, runtime.progress.Stage(f"{shape.name} {weights}: answering") as stage:
        found: dict[str, Any] = {"cllm": Ours(shape, weights)}
        if LlamaCpp.is_present(options.llama):
            found["llama.cpp"] = LlamaCpp(options.llama, shape, weights, Path(folder), threads, most)
        works = [(f"{number} requests", number, options.answer, False) for number in options.requests]
        works.append((f"first token beside {options.streams}", options.streams, 4, True))
        for place, (name, number, count, late) in enumerate(works):
            measured: dict[str, list[float]] = {each: [] for each in found}
            for round_ in range(options.rounds + 1):  # the first one warms up
                *prompts, extra = prompts_of(shape, number + 1, options.prompt, round_)
                for each, contestant in found.items():
                    answer = contestant.together(prompts, count, extra if late else None)
                    if round_:
                        measured[each].append(answer["late_first"] if late else number * count / answer["seconds"])
                stage.advance(place * (options.rounds + 1) + round_ + 1, len(works) * (options.rounds + 1), "rounds")
            medians = {each: statistics.median(values) for each, values in measured.items()}
            ratio = None if len(medians) == 1 else medians["cllm"] / medians["llama.cpp"]
            rows.append({"shape": shape.name, "weights": weights, "work": name, "unit": "s" if late else "tokens/s", **medians, "ratio": ratio})
        if "llama.cpp" in found:
            found["llama.cpp"].close()
    return rows


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    rates = [row for row in rows if row["unit"] == "tokens/s"]
    series = {name: [row[name] for row in rates] for name in ("cllm", "llama.cpp") if name in rates[0]}
    plots.bars(path, "Many requests at once", [f"{row['shape']}\n{row['weights']}\n{row['work']}" for row in rates], series, "tokens per second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["llama-125m"], choices=LLAMA_SHAPES)
    parser.add_argument("--weights", nargs="+", default=["bf16"], choices=[each for each in generate.DTYPES if each != "fp32"])
    parser.add_argument("--requests", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--streams", type=int, default=16, help="answers beside which the first token of another is waited for")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama", type=Path, default=LLAMA_CPP, metavar="FOLDER", help="where libllama lies with what it loads")
    parser.add_argument("--threads", type=int)
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    threads = options.threads or runtime.device.usable_cores()
    rows: list[dict[str, Any]] = []
    with runtime.use(threads=options.threads):
        torch.set_num_threads(threads)
        for name in options.shapes:
            for weights in options.weights:
                rows += measure(LLAMA_SHAPES[name], weights, options, threads)
    if not LlamaCpp.is_present(options.llama):
        print("llama.cpp is absent: `make peers` installs it, and gguf is needed (pip install 'cllm[export]')")
    names = [name for name in ("cllm", "llama.cpp") if name in rows[0]]
    print_table(
        ("shape", "weights", "work", *names, "unit", "ratio"),
        [(r["shape"], r["weights"], r["work"], *(f"{r[name]:.3g}" for name in names), r["unit"], "-" if r["ratio"] is None else f"{r['ratio']:.2f}")
         for r in rows],
    )  # fmt: skip
    finish(options, rows, lambda path: draw(path, rows), threads=options.threads)


if __name__ == "__main__":
    run(main)
