"""A training step on a machine that others use too: beside processes that compute, beside a PyTorch training, beside processes of low priority.

    python profiling/busy.py                                         # ours and PyTorch's, the small recipe
    python profiling/busy.py --against ../other-checkout             # also the code of another folder, as it is and with OMP_WAIT_POLICY=passive
    python profiling/busy.py --beside idle compute-4 --seconds 1 --rounds 3
    python profiling/busy.py --precision fp32 --write busy           # commit the figures

Every contestant is a process that computes only when it is its turn, and so is everybody who disturbs: they are stopped and continued, so that all
situations alternate within one run. Whoever is started here is ended here. "beside" is the mean over all steps in the company, divided by the median
of the same contestant's steps without any; "fair" is what an even division of the cores would give.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import plots
from peers import SHAPES, PlainStep, make_batch
from report import add_output_options, finish, print_table, run

from cllm.runtime.device import usable_cores
from cllm.runtime.errors import UserError
from cllm.runtime.progress import Stage

COMPUTE = "while True: pass"
# name -> how many processes of which kind, and how many of the machine's cores they want
BESIDE = {
    "idle": ("none", 0),
    "compute-2": ("compute", 2),
    "compute-4": ("compute", 4),
    "compute-8": ("compute", 8),
    "training": ("training", 1),
    "nice-2": ("nice", 2),
}
READY, LEAST_STEPS = "ready", 3


def fair(kind: str, count: int, threads: int) -> float:
    """How many times as long a step takes that gets its even share of the cores."""
    if kind in ("none", "nice"):
        return 1.0
    others = count * (usable_cores() if kind == "training" else 1)
    return max(1.0, (others + threads) / usable_cores())


# ---- the processes ----------------------------------------------------------------------------------------------------------------------------


def contestant(name: str, shape_name: str, precision: str, threads: int | None) -> None:
    """What a contestant's process runs: for every line "SECONDS" on stdin, the times of the steps in so many seconds as a line of JSON."""
    import torch
    from train import our_config

    from cllm import Model, TrainStep, runtime

    shape = SHAPES[shape_name]
    tokens, targets = make_batch(shape)
    torch.manual_seed(0)
    torch.set_num_threads(threads or usable_cores())
    with runtime.use(threads=threads):
        step = PlainStep(shape, precision) if name == "torch" else TrainStep(Model(our_config(shape)), precision=precision, learning_rate=1e-3)
        for _ in range(3):
            step(tokens, targets)
        print(READY, flush=True)
        for line in sys.stdin:
            times: list[float] = []
            end = time.perf_counter() + float(line)
            while len(times) < LEAST_STEPS or time.perf_counter() < end:
                began = time.perf_counter()
                step(tokens, targets)
                times.append(time.perf_counter() - began)
            print(json.dumps(times), flush=True)


class Contestant:
    """A process that takes steps when told to. folder: where its code lies, the root of a checkout."""

    def __init__(self, name: str, folder: Path, environment: dict[str, str], options: argparse.Namespace) -> None:
        self.name = name
        here = folder / "profiling"
        script = f"import sys; sys.path[:0] = {[str(here), str(folder), str(Path(__file__).parent)]!r}; import busy; "
        script += f"busy.contestant({name!r}, {options.shape!r}, {options.precision!r}, {options.threads!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | {"PYTHONPATH": str(folder), **environment},
        )  # fmt: skip
        line = self._answer()
        if line.strip() != READY:
            raise UserError(f"{name} could not start in {folder}; what it said is above.")

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def steps(self, seconds: float) -> list[float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        return list(json.loads(self._answer()))


def start_company(kind: str, count: int, options: argparse.Namespace) -> list[subprocess.Popen[str]]:
    """The processes that disturb, stopped."""
    training = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import busy; busy.train({options.shape!r}, {options.precision!r})"
    script = training if kind == "training" else f"print({READY!r}, flush=True)\n{COMPUTE}"
    started = []
    for _ in range(count):
        nice = (lambda: os.nice(19) and None) if kind == "nice" else None
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, preexec_fn=nice)
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        started.append(process)
    return started


def train(shape_name: str, precision: str) -> None:
    """A PyTorch training on all cores that goes on until it is ended."""
    shape = SHAPES[shape_name]
    step, batch = PlainStep(shape, precision), make_batch(shape)
    for number in range(1 << 62):
        step(*batch)
        if number == 3:
            print(READY, flush=True)


def end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


@contextmanager
def going_on(processes: list[subprocess.Popen[str]]) -> Iterator[None]:
    for process in processes:
        process.send_signal(signal.SIGCONT)
    time.sleep(0.05 if processes else 0)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGSTOP)


# ---- the measurement --------------------------------------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    here = Path(__file__).resolve().parents[1]
    wanted: list[tuple[str, Path, dict[str, str]]] = [("cllm", here, {})]
    if options.against is not None:
        other = options.against.resolve()
        wanted += [("against", other, {}), ("against, passive", other, {"OMP_WAIT_POLICY": "passive"})]
    if not options.no_torch:
        wanted.append(("torch", here, {}))
    situations = dict.fromkeys(["idle", *options.beside])
    contestants: list[Contestant] = []
    company: dict[str, list[subprocess.Popen[str]]] = {}
    times: dict[tuple[str, str], list[float]] = {}
    try:
        for name, folder, environment in wanted:
            with Stage(f"starting {name}"):
                contestants.append(Contestant(name, folder, environment, options))
        for situation in situations:
            company[situation] = start_company(*BESIDE[situation], options)
        for number in range(options.rounds):
            with Stage(f"round {number + 1} of {options.rounds}"):
                for situation in situations:
                    with going_on(company[situation]):
                        for each in contestants:
                            times.setdefault((each.name, situation), []).extend(each.steps(options.seconds))
    finally:
        end([each.process for each in contestants] + [process for processes in company.values() for process in processes])
    return [row(options, name, situation, found, times[name, "idle"]) for (name, situation), found in times.items()]


def row(options: argparse.Namespace, name: str, situation: str, found: list[float], idle: list[float]) -> dict[str, Any]:
    usual = statistics.median(idle)
    return {
        "shape": options.shape,
        "precision": options.precision,
        "contestant": name,
        "situation": situation,
        "steps": len(found),
        "median_seconds": statistics.median(found),
        "mean_seconds": statistics.mean(found),
        "beside": statistics.mean(found) / usual,
        "beside_median": statistics.median(found) / usual,
        "fair": fair(*BESIDE[situation], options.threads or usable_cores()),
    }


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    situations = list(dict.fromkeys(row["situation"] for row in rows))
    found = {(row["contestant"], row["situation"]): row["beside"] for row in rows}
    series = {name: [found[name, situation] for situation in situations] for name in names}
    series["fair"] = [next(row["fair"] for row in rows if row["situation"] == situation) for situation in situations]
    plots.bars(path, "A training step beside other work", situations, series, "mean time of a step, idle = 1", line=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="shakespeare-cpu", choices=SHAPES)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--beside", nargs="+", default=list(BESIDE), choices=BESIDE)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="the root of another checkout of this repository, to compare with")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch's step out")
    parser.add_argument("--seconds", type=float, default=1.5, help="how long each takes steps in each situation of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of ours and of PyTorch's step; all cores if left out")
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    if options.rounds < 1 or options.seconds <= 0:
        raise UserError(f"--rounds must be at least 1 and --seconds above 0, got {options.rounds} and {options.seconds}.")
    rows = measure(options)
    print_table(
        ("situation", "whose", "steps", "median", "mean", "beside", "fair"),
        [
            (
                r["situation"],
                r["contestant"],
                str(r["steps"]),
                f"{1e3 * r['median_seconds']:.1f} ms",
                f"{1e3 * r['mean_seconds']:.1f} ms",
                f"{r['beside']:.2f} x",
                f"{r['fair']:.1f} x",
            )
            for r in sorted(rows, key=lambda r: list(BESIDE).index(r["situation"]))
        ],
    )
    finish(options, rows, lambda path: draw(path, rows), threads=options.threads)


if __name__ == "__main__":
    run(main)
