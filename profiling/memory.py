"""Peak memory of a training step, ours and plain PyTorch's, each in a process of its own, beside what `cllm train --plan` predicts.

    python profiling/memory.py                                       # the small recipes, fp32 and bf16
    python profiling/memory.py --shapes gpt2 --plot memory.png
    python profiling/memory.py --optimizer muon                      # ours with it; PyTorch's step keeps AdamW

Each process first takes a step of the tiny shape, so that libraries and compiled kernels are loaded: that is its baseline. Then it makes model and
optimizer and takes two steps; the peak is the largest resident size during the second. "step" is peak less baseline: weights, gradients, moments,
activations and workspace. "ratio" is ours / PyTorch's, below 1 we need less. Where the kernel cannot start a new peak (/proc/self/clear_refs) the
largest size since the start of the process stands in for it, and "method" says so.
"""

import argparse
import ctypes
import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import plots
from report import add_output_options, finish, print_table, run

from cllm import runtime
from cllm.config.schema import OPTIMIZERS
from cllm.runtime.errors import CLLMError, UserError

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MB = 1e6


def _resident() -> dict[str, int]:
    """VmRSS (now) and VmHWM (peak) in bytes."""
    return {name: int(value) << 10 for name, value in re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", STATUS.read_text())}


def start_peak() -> bool:
    """Makes the present size the peak; False where the system does not offer that."""
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def settle() -> None:
    """Hands back what is free, so that the baseline is what is needed and not what was."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def child(who: str, name: str, precision: str, optimizer: str) -> dict[str, Any]:
    """Takes the steps in this process and measures it."""
    import torch
    from peers import SHAPES, PlainStep, Shape
    from train import our_config

    from cllm import Model, TrainStep

    def steps(shape: Shape, count: int) -> int:
        """The peak during the last of them."""
        torch.manual_seed(0)
        tokens = torch.randint(shape.vocab_size, (shape.batch_size, shape.seq_len))
        targets = torch.randint(shape.vocab_size, (shape.batch_size, shape.seq_len))
        step = (
            TrainStep(Model(our_config(shape)), precision=precision, learning_rate=1e-3, grad_clip=1.0, optimizer=optimizer)
            if who == "cllm"
            else PlainStep(shape, precision)
        )
        for number in range(count):
            if number == count - 1:
                start_peak()
            step(tokens, targets)
        return _resident()["VmHWM"]

    steps(SHAPES["tiny"], 1)
    settle()
    baseline, renewed = _resident()["VmRSS"], start_peak()
    peak = steps(SHAPES[name], 2)
    return {
        "baseline_bytes": baseline,
        "peak_bytes": peak,
        "step_bytes": peak - baseline,
        "method": "peak of a step" if renewed else "peak of the process",
    }


def in_own_process(who: str, name: str, precision: str, optimizer: str, threads: int | None) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", who, "--shapes", name, "--precision", precision, "--optimizer", optimizer]
    if threads is not None:
        command += ["--threads", str(threads)]
    with runtime.progress.Stage(f"{name} {precision}: memory of {who}"):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        killed = " (killed, as when memory runs out)" if done.returncode < 0 else ""
        raise CLLMError(f"{who} could not take two steps of {name} in {precision}: status {done.returncode}{killed}. Try a smaller shape.")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, precision: str, optimizer: str, threads: int | None) -> dict[str, Any]:
    from peers import SHAPES
    from train import our_config

    from cllm.model.memory import predict

    shape = SHAPES[name]
    ours, peer = (in_own_process(who, name, precision, optimizer, threads) for who in ("cllm", "pytorch"))
    expected = predict(our_config(shape), shape.batch_size, shape.seq_len, precision, optimizer=optimizer)
    return {
        "shape": name,
        "precision": precision,
        "optimizer": optimizer,
        "parameters": our_config(shape).num_parameters(),
        "cllm": ours,
        "pytorch": peer,
        "ratio": ours["step_bytes"] / peer["step_bytes"],
        "predicted_step_bytes": expected.total - expected.process,
        "predicted_peak_bytes": expected.total,
        "prediction": {part: size for part, size, _ in expected.rows()},
    }


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    plots.bars(
        path,
        "Peak memory of a training step (weights, gradients, moments, activations, workspace)",
        [f"{r['shape']}\n{r['precision']}" for r in rows],
        {
            "CLLM": [r["cllm"]["step_bytes"] / MB for r in rows],
            "CLLM, predicted": [r["predicted_step_bytes"] / MB for r in rows],
            "PyTorch eager": [r["pytorch"]["step_bytes"] / MB for r in rows],
        },
        "MB",
    )


def main() -> None:
    from peers import SHAPES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["shakespeare-cpu", "shakespeare"], choices=SHAPES)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--optimizer", default="adamw", choices=OPTIMIZERS, help="of our step")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--child", choices=["cllm", "pytorch"], help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    if not STATUS.exists():
        raise UserError("memory.py reads /proc/self/status, which this system does not have. Measure on Linux.")
    if options.child:
        with runtime.use(threads=options.threads):
            print(json.dumps(child(options.child, options.shapes[0], options.precision[0], options.optimizer)))
        return
    rows = [measure(name, precision, options.optimizer, options.threads) for name in options.shapes for precision in options.precision]
    print_table(
        ("shape", "precision", "ours MB", "PyTorch MB", "ratio", "predicted MB", "whole process, ours", "PyTorch", "predicted"),
        [
            (
                r["shape"],
                r["precision"],
                f"{r['cllm']['step_bytes'] / MB:,.0f}",
                f"{r['pytorch']['step_bytes'] / MB:,.0f}",
                f"{r['ratio']:.2f}",
                f"{r['predicted_step_bytes'] / MB:,.0f}",
                f"{r['cllm']['peak_bytes'] / MB:,.0f}",
                f"{r['pytorch']['peak_bytes'] / MB:,.0f}",
                f"{r['predicted_peak_bytes'] / MB:,.0f}",
            )
            for r in rows
        ],
    )
    finish(options, rows, lambda path: draw(path, rows), threads=options.threads)


if __name__ == "__main__":
    run(main)
