"""Whole training steps on 1 to all cores and with far more threads than cores: how the speed grows, and that the result never changes.

    python profiling/scaling.py                                      # 1..N cores, then 2 N, 64 and 1,741 threads
    python profiling/scaling.py --shapes gpt2 --precision bf16 --plot scaling.png
    python profiling/scaling.py --threads 1 2 --rounds 21
    python profiling/scaling.py --parts                              # also: how each kernel of a step grows, and what lies outside of kernels
    python profiling/scaling.py --predict 64                         # what a machine of 64 such cores would do, by simulation

For every number of threads a new model takes `--steps` steps; "same bits" says whether the SHA-256 of all its losses and weights is that of the
first number. It ends with status 1 where one differs. Up to 2 N threads are timed interleaved; more are far slower than they could ever be useful, so
they are timed once, in the last of those steps. `--predict` measures single tasks instead and shares them out by a model: see scaling_predict.py.
"""

import argparse
import hashlib
import statistics
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import plots
import torch
from peers import SHAPES, Shape, make_batch
from report import add_output_options, finish, interleaved, print_table, run
from train import our_config

from cllm import Model, TrainStep, runtime
from cllm.runtime import profiler
from cllm.runtime.errors import UserError

OVERSUBSCRIBED = (64, 1741)


def default_counts(cores: int) -> list[int]:
    """All of 1..N for a few cores, powers of two and half-way points for many; then twice the cores and more."""
    few = range(1, cores + 1) if cores <= 8 else [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256) if n < cores]
    return sorted({*few, cores, 2 * cores, *OVERSUBSCRIBED})


def new_step(shape: Shape, precision: str) -> TrainStep:
    return TrainStep(Model(our_config(shape), seed=0), precision=precision, learning_rate=1e-3, grad_clip=1.0)


def digest(shape: Shape, precision: str, threads: int, steps: int, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[str, float]:
    """SHA-256 of the losses and weights of a new model after some steps, and the seconds that the last of them took."""
    found = hashlib.sha256()
    step = new_step(shape, precision)
    seconds = 0.0
    with runtime.use(threads=threads):
        for _ in range(steps):
            start = time.perf_counter()
            loss = step(*batch)
            seconds = time.perf_counter() - start
            found.update(loss.numpy().tobytes())
    for name, value in sorted(step.model.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().contiguous().numpy().tobytes())
    return found.hexdigest(), seconds


def timings(shape: Shape, precision: str, counts: list[int], rounds: int, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Median seconds of a step on each number of threads, interleaved, all of one model."""
    step = new_step(shape, precision)

    def timed(threads: int) -> None:
        with runtime.use(threads=threads):
            step(*batch)

    return interleaved({str(n): lambda n=n: timed(n) for n in counts}, rounds)


OUTSIDE = "outside kernels"  # Python, autograd, and what torch itself computes
WARM_UPS = 4  # kernels compile, and a small step is recorded


def time_parts(shape: Shape, precision: str, counts: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row for each kernel, largest first, and one for what is outside: median seconds a step on each number of threads, interleaved."""
    step, batch = new_step(shape, precision), make_batch(shape)
    for threads in counts:
        with runtime.use(threads=threads):
            for _ in range(WARM_UPS):
                step(*batch)
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with runtime.progress.Stage(f"{shape.name} {precision}: timing the kernels of a step on {', '.join(map(str, counts))} threads"):
        for turn in range(rounds + 1):
            for threads in counts:
                with runtime.use(threads=threads), profiler.record() as recording:
                    start = time.perf_counter()
                    step(*batch)
                    whole = time.perf_counter() - start
                if turn:  # the first is a warm-up
                    seconds: dict[str, float] = defaultdict(float)
                    for event in recording.kernels():
                        seconds[event.name] += event.seconds
                    seconds[OUTSIDE] = whole - sum(seconds.values())
                    for name, value in seconds.items():
                        found[name][threads].append(value)
    medians = {name: {n: statistics.median(values[n]) for n in counts} for name, values in found.items()}
    ordered = sorted(medians, key=lambda name: (name == OUTSIDE, -medians[name][counts[0]]))
    return [{"shape": shape.name, "precision": precision, "part": name, "seconds": medians[name]} for name in ordered]


def measure(shape: Shape, precision: str, counts: list[int], steps: int, rounds: int) -> list[dict[str, Any]]:
    cores = runtime.device.usable_cores()
    tokens, targets = make_batch(shape)
    few = [n for n in counts if n <= 2 * cores]
    with runtime.progress.Stage(f"{shape.name} {precision}: timing {', '.join(map(str, few))} threads"):
        seconds = timings(shape, precision, few, rounds, (tokens, targets))
    hashes = {}
    for threads in counts:
        with runtime.progress.Stage(f"{shape.name} {precision}: {steps} steps on {threads:,} threads"):
            hashes[threads], last = digest(shape, precision, threads, steps, (tokens, targets))
        seconds.setdefault(str(threads), last)
    first = counts[0]
    base = seconds[str(first)]
    return [
        {
            "shape": shape.name,
            "precision": precision,
            "threads": n,
            "cores": cores,
            "rounds": rounds if n in few else 1,
            "seconds": seconds[str(n)],
            "tokens_per_second": shape.tokens / seconds[str(n)],
            "compared_with_threads": first,
            "speed_up": base / seconds[str(n)],
            "efficiency": base * min(first, cores) / (seconds[str(n)] * min(n, cores)),
            "steps": steps,
            "sha256": hashes[n],
            "same_bits": hashes[n] == hashes[first],
        }
        for n in counts
    ]


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    names = dict.fromkeys((row["shape"], row["precision"]) for row in rows)
    series = {
        f"{shape} {precision}": [(r["threads"], r["speed_up"]) for r in rows if (r["shape"], r["precision"]) == (shape, precision)]
        for shape, precision in names
    }
    counts = sorted({row["threads"] for row in rows})
    cores, first = rows[0]["cores"], rows[0]["compared_with_threads"]
    ideal = [(n, min(n, cores) / min(first, cores)) for n in counts]
    plots.lines(
        path,
        f"Whole training step, {cores} core{'s' if cores > 1 else ''}",
        series,
        "threads",
        f"speed, as a multiple of {first} thread{'s' if first > 1 else ''}",
        ideal,
    )


def print_predictions(options: argparse.Namespace) -> None:
    from scaling_predict import predict

    runtime.threads.checked(options.predict, "--predict")
    found: list[dict[str, Any]] = []
    for name in options.shapes:
        for precision in options.precision:
            with runtime.progress.Stage(f"{name} {precision}: timing each task of a step"):
                rows, limits = predict(partial(new_step, SHAPES[name], precision), make_batch(SHAPES[name]), options.predict, options.rounds)
            print_prediction(f"{name} {precision}", rows, limits, options.predict)
            found += [{"shape": name, "precision": precision} | row for row in rows + limits]
    finish(options, found, lambda path: plots.check(path), threads=options.predict)


def print_prediction(what: str, rows: list[dict[str, Any]], limits: list[dict[str, Any]], most: int) -> None:
    def milliseconds(seconds: float | None) -> str:
        return "" if seconds is None else f"{1e3 * seconds:.2f}"

    print_table(
        (f"{what}: workers", "ms a step, predicted", "speed-up", "if cores shared nothing", "measured", "error"),
        [
            (
                f"{r['workers']:,}",
                milliseconds(r["predicted_seconds"]),
                f"{r['predicted_speed_up']:.2f}",
                f"{r['unshared_speed_up']:.2f}",
                milliseconds(r["measured_seconds"]),
                "" if r["error"] is None else f"{100 * r['error']:+.1f} %",
            )
            for r in rows
        ],
    )
    print_table(
        (f"what limits it on {most:,}", "launches", "ms lost"),
        [(r["part"], str(r["launches"]), milliseconds(r["lost_seconds"])) for r in limits],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["shakespeare"], choices=SHAPES)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--threads", nargs="+", type=int, help="these numbers of threads; the first is what the others are compared with")
    parser.add_argument("--steps", type=int, default=3, help="steps whose losses and weights are compared")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--predict", type=int, metavar="N", help="predict the speed-up on up to N workers instead, and what limits it")
    parser.add_argument("--parts", action="store_true", help="also time each kernel of a step on 1..N cores")
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    if options.steps < 1 or options.rounds < 1:
        raise UserError(f"--steps and --rounds must be at least 1, got {options.steps} and {options.rounds}.")
    if options.predict is not None:
        print_predictions(options)
        return
    counts = list(dict.fromkeys(options.threads or default_counts(runtime.device.usable_cores())))
    for count in counts:
        runtime.threads.checked(count, "--threads")
    rows: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    few = [count for count in counts if count <= runtime.device.usable_cores()]
    for name in options.shapes:
        for precision in options.precision:
            rows += measure(SHAPES[name], precision, counts, options.steps, options.rounds)
            if options.parts and few:
                parts += time_parts(SHAPES[name], precision, few, options.rounds)
    print_table(
        ("shape", "precision", "threads", "ms a step", "tok/s", "speed-up", "efficiency", "same bits"),
        [
            (
                r["shape"],
                r["precision"],
                f"{r['threads']:,}",
                f"{1e3 * r['seconds']:.1f}",
                f"{r['tokens_per_second']:,.0f}",
                f"{r['speed_up']:.2f}",
                f"{100 * r['efficiency']:.0f} %",
                "yes" if r["same_bits"] else "NO",
            )
            for r in rows
        ],
    )
    if parts:
        print_table(
            ("shape", "precision", "part", *(f"ms on {n}" for n in few), "speed-up"),
            [
                (
                    p["shape"],
                    p["precision"],
                    p["part"],
                    *(f"{1e3 * p['seconds'][n]:.1f}" for n in few),
                    f"{p['seconds'][few[0]] / p['seconds'][few[-1]]:.2f}",
                )
                for p in parts
            ],
        )
    finish(options, rows + parts, lambda path: draw(path, rows), threads=max(counts))
    if not all(row["same_bits"] for row in rows):
        print("error: the number of threads changed the result; the rows marked NO have another SHA-256.", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
