"""What a run pays beside its kernels: Python and torch in a step, the optimizer, dropout; checkpoints at once and in the background, and monitoring.

    python profiling/overheads.py                              # the Shakespeare model (6 x 384) in bf16
    python profiling/overheads.py --shapes gpt2 --rounds 6
    python profiling/overheads.py --shapes shakespeare-cpu --only step --rounds 200
    python profiling/overheads.py --write overheads            # commit the figures

Step: operation by operation and replayed as a recorded program, in turn, and how long its kernels take of it: the launches of the program, and AdamW.
"outside kernels" is the difference between a step and its kernels.
Optimizers: what of a step each one's update takes. Dropout: how much longer a step takes with it.
Checkpoints: for how long one holds up training ("stall"), as a share of one step's time, and how much longer the steps take while it is written.
Monitoring: the share of a run's time that layers, classes of tokens and TensorBoard take at their default pace.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import plots
import torch
from peers import SHAPES, Shape
from report import add_output_options, finish, print_table, run
from train import our_config

from cllm import Model, TrainStep, runtime
from cllm.checkpoint.store import CheckpointStore
from cllm.checkpoint.weights import weights_of
from cllm.checkpoint.writer import CheckpointWriter
from cllm.config.schema import OPTIMIZERS
from cllm.config.train import TrainConfig
from cllm.data import Batch
from cllm.monitor.layers import LayerStats
from cllm.monitor.metrics import BOARD_EVERY, Metrics
from cllm.monitor.records import StepResult, StepTiming, TrainRow
from cllm.runtime import profiler, threads

SWITCH = "CLLM_STEP_PROGRAM"
MEASURED = ("step", "optimizers", "dropout", "checkpoints", "monitoring")
DROPOUT = 0.2


class Stepper:
    """One model and its step on random tokens; `times` are those of single steps."""

    def __init__(self, shape: Shape, precision: str, **options: Any) -> None:
        self.shape, self.precision = shape, precision
        torch.manual_seed(0)
        rows = torch.randint(shape.vocab_size, (shape.batch_size, shape.seq_len + 1))
        self.batch = [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())]
        self.step = TrainStep(Model(our_config(shape)), precision=precision, learning_rate=1e-3, grad_clip=1.0, **options)
        for _ in range(3):
            self.step.run(self.batch)

    def __call__(self, before_update=None) -> float:
        began = time.perf_counter()
        self.step.run(self.batch, before_update=before_update)
        return time.perf_counter() - began


def outside_kernels(stepper: Stepper, rounds: int) -> list[dict]:
    """A step both ways and its kernels alone, interleaved; nothing for a step that is not replayed."""
    for _ in range(2):
        stepper()
    programs = stepper.step._programs
    found = [] if programs is None else programs.programs
    if not found:
        return []
    with profiler.record() as recording:
        stepper()
    (adamw,) = [event.seconds for event in recording.kernels() if event.operation == "adamw"]
    times: dict[str, list[float]] = {"operation by operation": [], "replayed": [], "kernels": []}
    for _ in range(rounds):
        os.environ[SWITCH] = "0"
        times["operation by operation"].append(stepper())
        del os.environ[SWITCH]
        times["replayed"].append(stepper())
        with threads.torch_alone():
            times["kernels"].append(found[0].kernel_seconds() + adamw)
    alone = statistics.median(times.pop("kernels"))
    return [_row(f"step, {way}", statistics.median(each), statistics.median(each) - alone) for way, each in times.items()]


def optimizers(stepper: Stepper, rounds: int) -> list[dict]:
    """A step with each optimizer, interleaved; what holds it up is the update."""
    steppers = {name: Stepper(stepper.shape, stepper.precision, optimizer=name) for name in OPTIMIZERS}
    steps: dict[str, list[float]] = {name: [] for name in steppers}
    updates: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, each in steppers.items():
            steps[name].append(each())
            updates[name].append(each.step.seconds["optimizer"])
    return [_row(f"update, {name}", statistics.median(steps[name]), statistics.median(updates[name])) for name in steppers]


def dropout(stepper: Stepper, rounds: int) -> list[dict]:
    """A step with dropout and one without, interleaved."""
    dropped = Stepper(stepper.shape, stepper.precision, dropout=DROPOUT)
    times: list[tuple[float, float]] = []
    for _ in range(rounds):
        times.append((stepper(), dropped()))
    without, took = map(statistics.median, zip(*times))
    return [_row(f"dropout {DROPOUT}", took, took - without)]


def _row(what: str, took: float, held_up: float) -> dict:
    return {"what": what, "step_seconds": took, "stall_seconds": held_up, "stall_of_step": held_up / took}


def checkpoints(stepper: Stepper, rounds: int) -> list[dict]:
    """Each round: a few steps alone, then one checkpoint each way, and steps until it is written."""
    alone: list[float] = []
    stall: dict[str, list[float]] = {"at once": [], "background": []}
    beside: dict[str, list[float]] = {"at once": [], "background": []}
    lasted: dict[str, list[float]] = {"at once": [], "background": []}
    with tempfile.TemporaryDirectory() as folder:
        writers = {way: CheckpointWriter(CheckpointStore(Path(folder) / way, keep=1), way == "background") for way in stall}
        for number in range(rounds + 1):
            for way, writer in writers.items():
                times = [stepper() for _ in range(4)]
                held, began = writer.stall_seconds, time.perf_counter()
                writer.save(number, weights_of(stepper.step.model), stepper.step.state_dict(), {})
                during = [stepper(writer.before_update)]
                while writer.busy:
                    during.append(stepper(writer.before_update))
                took = time.perf_counter() - began
                writer.wait()
                if number:  # the first round allocates the copies
                    alone += times
                    stall[way].append(writer.stall_seconds - held)
                    beside[way] += during
                    lasted[way].append(took)
    usual = statistics.median(alone)
    return [
        {
            "what": f"checkpoint, {way}", "step_seconds": usual, "stall_seconds": statistics.median(stall[way]),
            "stall_of_step": statistics.median(stall[way]) / usual, "steps_beside": statistics.median(beside[way]) / usual,
            "lasted_seconds": statistics.median(lasted[way]), "extra_seconds": statistics.mean(lasted[way]) - usual * len(beside[way]) / rounds,
        }
        for way in stall
    ]  # fmt: skip


def monitoring(stepper: Stepper, rounds: int) -> list[dict]:
    """A step with everything that the monitoring of its row costs, against one without; the layers at their pace."""
    pace = TrainConfig().log.layers_every
    parameters = stepper.step.optimizer.parameters
    plain, layered, written = [], [], []
    result = StepResult(loss=1.0, gradient_norm=1.0, largest_gradient=0.5, num_nonfinite=0, num_targets=1, learning_rate=1e-3, updated=True)
    timing = StepTiming(**{each.name: 0.5 for each in dataclasses.fields(StepTiming)})
    with tempfile.TemporaryDirectory() as folder, Metrics(Path(folder), tensorboard=True) as metrics:
        for number in range(max(rounds, int(2 / stepper()))):  # small steps differ more: about two seconds of them
            stepper()  # threads that have waited long are asleep
            plain.append(stepper())
            began = time.perf_counter()
            for step in range(BOARD_EVERY):
                metrics.write(TrainRow.of(step, result, 1, 1.0, timing))
            written.append((time.perf_counter() - began) / BOARD_EVERY)
            stepper()
            stats = LayerStats(parameters)
            began = time.perf_counter()
            stepper(stats.before)
            metrics.write(stats.after(number + 1))
            metrics.histograms("gradients", number, stats.by_block())
            layered.append(time.perf_counter() - began)
    usual, extra, row_cost = statistics.median(plain), statistics.median(layered) - statistics.median(plain), statistics.median(written)
    return [
        {"what": "monitoring: a row of metrics", "step_seconds": usual, "stall_seconds": row_cost, "stall_of_step": row_cost / usual},
        {"what": f"monitoring: layers, every {pace} steps", "step_seconds": usual, "stall_seconds": extra, "stall_of_step": extra / usual / pace},
    ]


def draw(path: Path, rows: list[dict]) -> None:
    labels = [f"{row['what']}\n{row['shape']}" for row in rows]
    plots.bars(path, "What a run pays beside its steps", labels, {"held up": [100 * row["stall_of_step"] for row in rows]}, "percent of a step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["shakespeare"], choices=SHAPES)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=MEASURED, choices=MEASURED)
    parser.add_argument("--threads", type=int)
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    rows = []
    with runtime.use(threads=options.threads):
        for name in options.shapes:
            stepper = Stepper(SHAPES[name], options.precision)
            measure = {"step": outside_kernels, "optimizers": optimizers, "dropout": dropout, "checkpoints": checkpoints, "monitoring": monitoring}
            for each in runtime.progress.track(options.only, len(options.only), f"{name} {options.precision}: measuring"):
                rows += [{"shape": name, "precision": options.precision, **row} for row in measure[each](stepper, options.rounds)]
    print_table(
        ("shape", "what", "step", "held up, or outside kernels", "of a step", "steps beside", "lasted", "in all"),
        [(r["shape"], r["what"], f"{1e3 * r['step_seconds']:.1f} ms", f"{1e3 * r['stall_seconds']:.2f} ms", f"{100 * r['stall_of_step']:.2f} %",
          f"{r['steps_beside']:.2f} x" if "steps_beside" in r else "-", f"{r['lasted_seconds']:.2f} s" if "lasted_seconds" in r else "-",
          f"{r['extra_seconds']:.2f} s" if "extra_seconds" in r else "-") for r in rows],
    )  # fmt: skip
    finish(options, rows, lambda path: draw(path, rows), threads=options.threads)


if __name__ == "__main__":
    run(main)
