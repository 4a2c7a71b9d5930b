"""A few training steps as a trace to look at, and a table of where their time went.

    python profiling/trace.py --shape shakespeare                    # writes trace.json: open it at https://ui.perfetto.dev
    python profiling/trace.py --shape gpt2 --precision bf16 --steps 2 --out gpt2.json --plot gpt2.png

Each range of the trace is a call of one of our kernels, with its shapes and its rate, inside its stage: forward, backward, update. "share of peak" is
the rate against this machine's measured ceilings (matrix products or copying, whichever the kernel comes closer to); what a kernel must do is counted
by roofline.py. "outside kernels" is Python, autograd and what torch itself computes. Recording costs a few microseconds a call: measure speed with
train.py. A small step is replayed as a recorded program, whose kernels have the same names; overheads.py measures what stands outside of them then.
"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import plots
from peers import SHAPES, Shape, make_batch
from report import add_output_options, finish, percent, print_table, provenance, run
from roofline import cost
from train import our_config

from cllm import Model, TrainStep, runtime
from cllm.runtime import profiler
from cllm.runtime.errors import UserError

FORWARD, BACKWARD, UPDATE, STEP = "forward", "backward", "update", "step"
WARM_UPS = 4  # kernels compile, and a small step is recorded


def work(event: profiler.Event) -> tuple[float, float] | None:
    """(flops, bytes) that this call of a kernel had to do by roofline.py's formulas; None where there is none."""
    tensors = [each for each in event.operands if isinstance(each, profiler.Operand)]
    backward = event.function.endswith("backward")
    match event.operation:
        case "matmul" if event.function == "column_sums":
            return float(tensors[0].numel), float(tensors[0].numel * tensors[0].itemsize)
        case "matmul":  # every product is a call of its own, those of the backward too
            a, b = tensors[:2]
            found, factor = cost("matmul", a.itemsize, *a.shape, b.shape[1]), 1.0
        case "attention":
            q, k = [each for each in tensors if len(each.shape) == 4][backward : backward + 2]
            if q.shape[1] != k.shape[1] or True not in event.operands:  # counted for causal attention of a sequence to itself
                return None
            found = cost("attention", q.itemsize, *q.shape[:3], k.shape[2], q.shape[3])
            factor = found.with_backward - 1 if backward else 1.0
        case "feed_forward":
            position = int(backward)
            x, gate, up = event.operands[position : position + 3]
            found = cost("feed_forward", x.itemsize, x.numel // x.shape[-1], x.shape[-1], up.shape[0], 2 if gate is None else 3)
            factor = 2.0 if backward else 1.0
        case "linear_cross_entropy":
            x, weight = tensors[backward : backward + 2]
            found = cost("linear_cross_entropy", x.itemsize, *x.shape, weight.shape[0])
            factor = 2.0 if backward else 3.0 if event.function == "forward_with_grads" else 1.0
        case "rms_norm" | "layer_norm" | "softmax":
            x = tensors[0]
            found = cost("norm", x.itemsize, x.numel // x.shape[-1], x.shape[-1])
            factor = found.with_backward - 1 if backward else 1.0
        case "embedding" if event.function == "forward":  # the backward also goes over the rows of all other tokens
            tokens, weight = tensors
            found, factor = cost("embedding", weight.itemsize, tokens.numel, weight.shape[1]), 1.0
        case "rotary" if event.function.startswith("norm"):
            x = tensors[0]
            found = cost("norm_rotary", x.itemsize, x.numel)
            factor = found.with_backward - 1 if backward else 1.0
        case "rotary":
            found, factor = cost("rotary", tensors[0].itemsize, tensors[0].numel), 1.0
        case "adamw":
            params = event.operands[0]
            found, factor = cost("adamw", params[0].itemsize, sum(each.numel for each in params)), 1.0
        case _:
            return None
    return found.flops * factor, found.bytes * factor


def record(shape: Shape, precision: str, steps: int) -> profiler.Recording:
    tokens, targets = make_batch(shape)
    step = TrainStep(Model(our_config(shape), seed=0), precision=precision, learning_rate=1e-3, grad_clip=1.0)
    with runtime.progress.Stage(f"{shape.name} {precision}: warming up"):
        for _ in range(WARM_UPS):
            step(tokens, targets)
    with runtime.progress.Stage(f"{shape.name} {precision}: recording {steps} steps"), profiler.record() as recording:
        for _ in range(steps):
            with profiler.span(STEP):
                step(tokens, targets)
    for event in recording.kernels():
        found = work(event)
        if found is not None:
            event.flops, event.bytes = found
    return recording


def _seconds(events: Iterable[profiler.Event]) -> float:
    return sum(event.seconds for event in events)


def rows_of(recording: profiler.Recording, shape: Shape, precision: str, steps: int) -> list[dict[str, Any]]:
    """One row for each kernel, largest first; then what is outside of kernels, the stages and the whole step."""
    kernels = recording.kernels()
    total = _seconds(event for event in recording.events if event.name == STEP and not event.operation)
    ceilings = runtime.ceilings()

    def row(kind: str, name: str, calls: int, seconds: float, **more: Any) -> dict[str, Any]:
        return {
            "kind": kind,
            "name": name,
            "shape": shape.name,
            "precision": precision,
            "steps": steps,
            "calls": calls,
            "ms": seconds * 1e3,
            "ms_per_step": seconds * 1e3 / steps,
            "share_of_step": seconds / total,
            "gflops": None,
            "gbps": None,
            "share": None,
            **more,
        }

    rows = []
    for name in dict.fromkeys(event.name for event in kernels):
        calls = [event for event in kernels if event.name == name]
        seconds, rates = _seconds(calls), {}
        if all(event.flops is not None and event.bytes is not None for event in calls):
            gflops = sum(event.flops or 0.0 for event in calls) / seconds / 1e9
            gbps = sum(event.bytes or 0.0 for event in calls) / seconds / 1e9
            limit = ceilings.gflops("bf16" if any(each.itemsize == 2 for each in calls[0].operands if isinstance(each, profiler.Operand)) else "fp32")
            rates = {"gflops": gflops, "gbps": gbps, "share": max(gflops / limit, gbps / ceilings.copy_gbps)}
        rows.append(row("kernel", name, len(calls), seconds, **rates))
    rows.sort(key=lambda each: -each["ms"])
    rows.append(row("rest", "outside kernels", steps, total - _seconds(kernels)))
    for name in (FORWARD, BACKWARD, UPDATE):
        stage = [event for event in recording.events if event.name == name and not event.operation]
        rows.append(row("stage", name, len(stage), _seconds(stage)))
    flops = our_config(shape).flops_per_token(shape.seq_len) * shape.tokens * steps
    rows.append(row("stage", STEP, steps, total, gflops=flops / total / 1e9, share=flops / total / 1e9 / ceilings.gflops(precision)))
    return rows


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    shown = [row for row in rows if row["kind"] != "stage"]
    step = rows[-1]
    plots.bars(
        path,
        f"One training step: {step['shape']}, {step['precision']}, {step['ms_per_step']:.1f} ms",
        [row["name"] for row in shown],
        {"time": [row["ms_per_step"] for row in shown]},
        "ms a step",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="shakespeare", choices=SHAPES)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--by-operations", action="store_true", help="also a step that could be replayed as a recorded program (see overheads.py)")
    parser.add_argument("--out", type=Path, default=Path("trace.json"), help="the trace to write")
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    if options.steps < 1:
        raise UserError(f"--steps must be at least 1, got {options.steps}.")
    if not options.out.absolute().parent.is_dir():
        raise UserError(f"--out {options.out}: there is no folder {options.out.parent}. Create it first.")
    shape = SHAPES[options.shape]
    if options.by_operations:
        os.environ["CLLM_STEP_PROGRAM"] = "0"
    with runtime.use(threads=options.threads):
        recording = record(shape, options.precision, options.steps)
    rows = rows_of(recording, shape, options.precision, options.steps)

    def rate(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    print_table(
        ("where", "calls", "ms a step", "share of step", "GFLOP/s", "GB/s", "share of peak"),
        [
            (
                r["name"],
                str(r["calls"]),
                f"{r['ms_per_step']:.3f}",
                f"{100 * r['share_of_step']:.1f} %",
                rate(r["gflops"]),
                rate(r["gbps"]),
                percent(r["share"]),
            )
            for r in rows
        ],
    )
    about = {key: value for key, value in provenance(options.threads).items() if key in ("versions", "commit", "date")}
    recording.save(options.out, {"shape": options.shape, "precision": options.precision, **about})
    print(f"wrote {options.out}: open it at https://ui.perfetto.dev")
    finish(options, rows, lambda path: draw(path, rows), threads=options.threads)


if __name__ == "__main__":
    run(main)
