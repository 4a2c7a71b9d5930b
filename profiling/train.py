"""Whole training steps, ours against plain PyTorch, interleaved in one run.

python profiling/train.py                                # the small recipes, fp32 and bf16
python profiling/train.py --shapes gpt2 --rounds 5 --compile
python profiling/train.py --write train                  # commit the figures: profiling/results/train.json
"""

import argparse
from pathlib import Path

import plots
import torch
from peers import SHAPES, NanoGPTStep, PlainStep, Shape
from report import add_output_options, finish, interleaved, print_table, run

from cllm import Model, ModelConfig, TrainStep, runtime


def our_config(shape: Shape) -> ModelConfig:
    return ModelConfig(
        vocab_size=shape.vocab_size,
        embed_dim=shape.embed_dim,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        max_seq_len=shape.seq_len,
        norm="layer",
        activation="gelu_tanh",
        tie_embeddings=True,
    )


def measure(shape: Shape, precision: str, rounds: int, compile: bool, nanogpt: Path | None) -> dict:
    torch.manual_seed(0)
    tokens = torch.randint(shape.vocab_size, (shape.batch_size, shape.seq_len))
    targets = torch.randint(shape.vocab_size, (shape.batch_size, shape.seq_len))
    config = our_config(shape)
    ours = TrainStep(Model(config), precision=precision, learning_rate=1e-3, grad_clip=1.0)
    peers = {"eager": PlainStep(shape, precision)}
    if compile:
        peers["compile"] = PlainStep(shape, precision, compile=True)
    if nanogpt is not None:
        peers["nanogpt"] = NanoGPTStep(nanogpt, shape, precision)
    contestants = {"cllm": ours, **peers}
    seconds = interleaved({name: lambda step=step: step(tokens, targets) for name, step in contestants.items()}, rounds)
    best = min(seconds[name] for name in peers)
    flops = config.flops_per_token(shape.seq_len) * shape.tokens
    return {
        "shape": shape.name,
        "precision": precision,
        "rounds": rounds,
        "seconds": seconds,
        "tokens_per_second": {name: shape.tokens / each for name, each in seconds.items()},
        "gflops": flops / seconds["cllm"] / 1e9,
        "ratio": best / seconds["cllm"],
    }


def draw(path: Path, rows: list[dict]) -> None:
    """Tokens per second of each contestant, as a multiple of PyTorch eager: shapes of all sizes fit on one axis."""
    names = list(rows[0]["seconds"])
    labels = [f"{r['shape']}\n{r['precision']}" for r in rows]
    titles = {"cllm": "CLLM", "eager": "PyTorch eager", "compile": "torch.compile", "nanogpt": "nanoGPT eager"}
    series = {titles[name]: [r["seconds"]["eager"] / r["seconds"][name] for r in rows] for name in names}
    plots.bars(path, "Whole training step against PyTorch", labels, series, "speed, PyTorch eager = 1", line=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["shakespeare-cpu", "shakespeare"], choices=SHAPES)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true", help="also against torch.compile")
    parser.add_argument("--nanogpt", type=Path, metavar="MODEL.PY", help="also against nanoGPT's own model, eager, from your copy of its model.py")
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    rows = []
    with runtime.use(threads=options.threads):
        torch.set_num_threads(options.threads or runtime.device.usable_cores())
        for name in options.shapes:
            for precision in options.precision:
                with runtime.progress.Stage(f"{name} {precision}: timing a step of each"):
                    rows.append(measure(SHAPES[name], precision, options.rounds, options.compile, options.nanogpt))
    print_table(
        ("shape", "precision", "ours tok/s", "best PyTorch tok/s", "ratio", "our GFLOP/s"),
        [
            (
                r["shape"],
                r["precision"],
                f"{r['tokens_per_second']['cllm']:.0f}",
                f"{max(v for k, v in r['tokens_per_second'].items() if k != 'cllm'):.0f}",
                f"{r['ratio']:.2f}",
                f"{r['gflops']:.0f}",
            )
            for r in rows
        ],
    )
    finish(options, rows, lambda path: draw(path, rows), threads=options.threads)


if __name__ == "__main__":
    run(main)
