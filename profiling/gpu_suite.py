"""Everything there is to know of the GPU kernels on the GPU of this machine, in one command that goes on where it was stopped.

    python profiling/gpu_suite.py                                  # all steps, in this order
    python profiling/gpu_suite.py --only operations                # one step, again
    python profiling/gpu_suite.py --tiny                           # without a GPU: runs through on Triton's interpreter, measures nothing

Cheap proofs of correctness come first and whole training steps last, and nothing runs behind a wrong result: what is measured of a kernel that
computes the wrong thing is worth nothing. Each step is kept as soon as it is done (results/gpu-NAME.json and .md) and skipped when the script starts
again, unless it failed. Operations are timed against what torch ships (attention pinned to cuDNN and to flash and as torch chooses, FlexAttention,
torch.compile for the rest) and against the libraries of rivals.py where they are installed; absent ones are named. Times are medians, eager and as a
CUDA graph, interleaved, on random data with the L2 cache emptied; shares are of the rates measured in the same run. What was fastest is recorded for
the plan (`runtime.choice`), which then prefers it.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

if "--tiny" in sys.argv:  # read when a kernel is defined, so before anything of ours is imported
    os.environ["TRITON_INTERPRET"] = "1"

import report
import rivals as others
import torch
from gpu_benches import OURS, Bench, Machine, attention_benches, product_benches, row_benches
from peers import PlainStep, Shape

from cllm import Model, ModelConfig, TrainStep, kernels, runtime
from cllm.kernels._register import backend_serves
from cllm.runtime import toolchain

ROOT = Path(__file__).resolve().parents[1]
NEEDS_A_GPU = "these tests need a GPU"
MOST_WORKERS = 14  # each holds a CUDA context of some 500 MB
State = dict[str, Any]


class Wrong(Exception):
    """A result that makes everything behind it worthless. `found`: what is kept with it."""

    def __init__(self, text: str, found: State | None = None) -> None:
        super().__init__(text)
        self.found = found or {}


# ---- correctness, the cheapest proof first ----------------------------------------------------------------------------------


def check_versions(machine: Machine, state: State) -> State:
    """What the kernels are compiled with, and whether all of it is there."""
    found: State = {}
    for name in ("torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "nvidia-ml-py"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if importlib.util.find_spec("cupy") is not None:
        done = subprocess.run([sys.executable, "-c", "import cupy; cupy.cuda.nvrtc.getVersion()"], capture_output=True, text=True)
        found["CuPy imports"] = done.returncode == 0 or done.stderr.strip()[-400:]
    if not machine.tiny and toolchain.obstacle():
        raise Wrong(toolchain.obstacle(), found)
    return found


def _pytest(machine: Machine, *words: str, seconds: float, workers: bool = False, command: tuple[str, ...] = (), **variables: str) -> State:
    """Counts of a run of pytest; Wrong where a test fails, none runs, or it takes longer than `seconds`. `command`: what the run is put behind.

    Compiling takes longest, and every process compiles for itself: with `workers` the tests are shared among processes.
    """
    count = min(MOST_WORKERS, runtime.device.usable_cores())
    shared = ["-n", str(count)] if workers and count > 1 and not machine.tiny and importlib.util.find_spec("xdist") is not None else []
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        run = [*command, sys.executable, "-m", "pytest", *words, *shared, f"--junitxml={results}", "-p", "no:cacheprovider"]
        process = subprocess.Popen(
            run, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # also the workers, which wait for a GPU that hangs
            said, _ = process.communicate()
            raise Wrong(f"{' '.join(words)} took longer than {seconds:.0f} s", {"tail": said.splitlines()[-20:]}) from None
        counts = {"tests": 0, "skipped": 0, "failures": 0, "errors": 0}
        if results.exists():  # written when all tests have ended
            for suite in ElementTree.parse(results).getroot().iter("testsuite"):
                counts = {name: counts[name] + int(suite.get(name, 0)) for name in counts}
    wrong = counts.pop("failures") + counts.pop("errors")
    found = {"status": process.returncode, **counts}
    nothing = counts["tests"] == counts["skipped"]
    if process.returncode < 0 and not nothing and not wrong:
        # Libraries abort at times when the interpreter ends ("terminate called without an active exception"); every result was there by then.
        return {**found, "note": f"ended by signal {-process.returncode} after all tests had passed"}
    if process.returncode or nothing:
        why = "no test ran" if nothing and process.returncode in (0, 5) else f"status {process.returncode}"
        raise Wrong(f"pytest {' '.join(words)}: {why}", {**found, "tail": said.splitlines()[-40:]})
    return found


def check_captured(machine: Machine, state: State) -> State:
    """The captured training step against the CPU's."""
    if machine.tiny:
        return {"note": NEEDS_A_GPU}
    return _pytest(machine, "tests/gpu", "-k", "captured", seconds=300)


def check_optimizer_and_norms(machine: Machine, state: State) -> State:
    some = ("-k", "step_is_that or no_rows") if machine.tiny else ()
    return _pytest(machine, "tests/kernels/triton/test_adamw.py", "tests/kernels/triton/test_norm.py", *some, seconds=600, workers=True)


def check_accuracy(machine: Machine, state: State) -> State:
    """Every case of every operation against the float64 oracle, eager and captured."""
    names = ("test_accuracy", "test_edge_values", "test_captured", "triton/test_attention", "triton/test_products")
    some = ("-k", "triton and softmax") if machine.tiny else ()
    return _pytest(machine, *(f"tests/kernels/{name}.py" for name in names), *some, seconds=1200, workers=True)


def check_everything_for_gpus(machine: Machine, state: State) -> State:
    """What else needs a GPU: the command line, large tensors, backends against each other."""
    if machine.tiny:
        return {"note": NEEDS_A_GPU}
    return _pytest(machine, "tests/gpu", seconds=900)


def check_hopper(machine: Machine, state: State) -> State:
    """The Gluon kernels. One that hangs is ended after a minute."""
    if machine.tiny or not runtime.gpu.gpu_of(machine.device).is_hopper:
        return {"note": "the Gluon kernels are for Hopper"}
    limit = ("--timeout", "60", "--timeout-method", "thread")  # a signal does not reach a thread that waits for a GPU
    return _pytest(machine, "tests/kernels/gluon/test_attention.py", "-k", "on_hopper", *limit, seconds=900)


def check_instrumented(machine: Machine, state: State) -> State:
    """Small shapes of them again, under Triton's checks of barriers and under compute-sanitizer where it is installed."""
    if machine.tiny or not runtime.gpu.gpu_of(machine.device).is_hopper:
        return {"note": "the Gluon kernels are for Hopper"}
    words = ("tests/kernels/gluon/test_attention.py", "-k", "on_hopper and (group or packed)")
    found: State = {"consan": _pytest(machine, *words, seconds=600, TRITON_INSTRUMENTATION_MODE="consan")}
    for tool in ("memcheck", "racecheck"):
        sanitizer = shutil.which("compute-sanitizer")
        found[tool] = "compute-sanitizer is not installed"
        if sanitizer is not None:
            command = (sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
            found[tool] = _pytest(machine, *words, seconds=1200, command=command)
    return found


def check_determinism(machine: Machine, state: State) -> State:
    """The backward of attention again and again, on every backend of ours: the same bits."""
    shape = (1, 24, 2, 16) if machine.tiny else (4, 1024, 16, 64)
    q, k, v, dout = (machine.normal(*shape, grad=True) for _ in range(4))
    found: State = {"repeats": 3 if machine.tiny else 1000, "bitwise": True}
    for name in ("triton", "gluon"):
        if not backend_serves("attention", name, (q.shape, k.shape), q.dtype, machine.device.type):
            continue

        def gradients(name: str = name) -> tuple[torch.Tensor, ...]:
            with runtime.use(backend=name):
                return torch.autograd.grad(kernels.attention(q, k, v, causal=True), (q, k, v), dout.detach())

        first = gradients()
        for repeat in range(found["repeats"]):
            if not all(torch.equal(a, b) for a, b in zip(first, gradients())):
                raise Wrong(f"attention on {name} gave other bits at repeat {repeat}", found | {"bitwise": False})
    return found


def check_training(machine: Machine, state: State) -> State:
    """The losses of a small model over many steps, in fp32: those of the CPU."""
    sizes = {"vocab_size": 97, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 64, "max_seq_len": 32}
    generator = torch.Generator().manual_seed(0)
    data = [(tokens[:, :-1], tokens[:, 1:]) for tokens in torch.randint(97, (4, 4, 17), generator=generator)]
    curves = []
    for backend, device in (("torch", torch.device("cpu")), ("triton", machine.device)):
        with runtime.use(backend=backend):
            step = TrainStep(Model(ModelConfig(**sizes), seed=1).to(device), learning_rate=1e-3)
            curves.append([finite(step(*data[number % 4])) for number in range(3 if machine.tiny else 200)])
    off = [abs(there - here) / here for here, there in zip(*curves)]
    found = {"steps": len(off), "first": curves[1][0], "last": curves[1][-1], "largest difference": max(off)}
    if max(off[:20]) > 1e-3 or max(off) > 0.05:  # what is rounded otherwise grows with the steps
        raise Wrong("the losses are not those of the CPU", found)
    return found


def finite(loss: Any) -> float:
    """The loss of a step as a number. Raises Wrong for one that is not finite: a step of NaN is fast."""
    value = float(loss)
    if not math.isfinite(value):
        raise Wrong(f"the loss of a step is {value}")
    return value


# ---- measurements -----------------------------------------------------------------------------------------------------------


def measure_ceilings(machine: Machine, state: State) -> State:
    """TFLOP/s of a large bf16 product and GB/s of a large copy: what shares are of."""
    n, size = (32, 1024) if machine.tiny else (8192, 1 << 30)
    a, b = machine.normal(n, n), machine.normal(n, n)
    source = torch.empty(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    times = machine.times({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 4.0)
    if machine.tiny:
        return {"tflops": None, "gbps": None}
    return {"tflops": 2e-12 * n**3 / times["product"]["graph"], "gbps": 2e-9 * size / times["copy"]["graph"]}


def measure_operations(machine: Machine, state: State, only: str = "") -> State:
    rows = []
    for make in (attention_benches, product_benches, row_benches):
        try:
            for bench in make(machine):
                if only and only not in bench.name:
                    continue
                rows.append(_row(machine, bench, state["ceilings"]))
                print(f"  {rows[-1]['name']}: {rows[-1]['ms'] if rows[-1]['ms'] is not None else 'not measured'}", flush=True)
        except Exception as error:  # one family that fails costs only itself
            traceback.print_exc()
            rows.append({"name": make.__name__, "failed": f"{type(error).__name__}: {error}"[:400]})
    return {"rows": rows, "absent": others.absent()}


def _row(machine: Machine, bench: Bench, ceilings: State) -> State:
    times = machine.times(bench.calls)
    row: State = {"name": bench.name, "times": times, "goal": bench.goal, "absent": bench.absent}
    if machine.tiny:
        return row | {"ms": None, "ratio": None, "best_peer": None, "share": None, "met": None}
    best = {name: each.get("graph", each["eager"]) for name, each in times.items()}
    ours = min(seconds for name, seconds in best.items() if name.startswith(OURS))
    peers = {name: seconds for name, seconds in best.items() if not name.startswith(OURS)}
    limit = max(bench.cost.flops / (ceilings["tflops"] * 1e12), bench.cost.bytes / (ceilings["gbps"] * 1e9))
    peer = min(peers, key=peers.__getitem__) if peers else None
    row |= {"ms": 1e3 * ours, "best_peer": peer, "ratio": peers[peer] / ours if peer else None, "share": limit / ours}
    row["met"] = None if bench.met is None or row["ratio"] is None else bench.met(row)
    bench.record(best, machine.dtype)
    return row


def measure_steps(machine: Machine, state: State) -> State:
    """Whole training steps against the plain GPT, compiled."""
    shapes = [Shape("tiny", 1, 2, 32, 97, 16, 2)] if machine.tiny else [
        Shape("gpt2 124 M", 12, 12, 768, 50304, 1024, 16), Shape("gpt2 350 M", 24, 16, 1024, 50304, 1024, 8),
    ]  # fmt: skip
    rows = []
    for shape in shapes:
        config = ModelConfig(
            vocab_size=shape.vocab_size, embed_dim=shape.embed_dim, num_layers=shape.num_layers, num_heads=shape.num_heads,
            max_seq_len=shape.seq_len, norm="layer", activation="gelu_tanh", tie_embeddings=True,
        )  # fmt: skip
        data = [torch.randint(shape.vocab_size, (shape.batch_size, shape.seq_len)) for _ in range(2)]
        there = [each.to(machine.device) for each in data]

        def ours(config: ModelConfig = config, data: list[torch.Tensor] = data) -> Callable[[], Any]:
            step = TrainStep(Model(config).to(machine.device), precision="bf16", learning_rate=1e-3)
            return lambda: step(*data)

        def plain(shape: Shape = shape, data: list[torch.Tensor] = there) -> Callable[[], Any]:
            step = PlainStep(shape, "bf16", compile=not machine.tiny, device=machine.device.type)
            return lambda: step(*data)

        row: State = {"name": shape.name}
        for who, make in (("cllm", ours), ("compiled", plain)):
            measured = time_step(machine, make)
            if not machine.tiny:
                row[who] = {"tokens_per_second": shape.tokens / measured["seconds"], "peak_bytes": measured["peak_bytes"]}
        if not machine.tiny:
            row["ratio"] = row["cllm"]["tokens_per_second"] / row["compiled"]["tokens_per_second"]
            row["memory_ratio"] = row["cllm"]["peak_bytes"] / row["compiled"]["peak_bytes"]
            row["goal"], row["met"] = ">= 1.10 tokens/s, <= 0.7 memory", row["ratio"] >= 1.1 and row["memory_ratio"] <= 0.7
        rows.append(row)
    return {"rows": rows}


def time_step(machine: Machine, make: Callable[[], Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of the steps of `make()`, and on a GPU the most bytes that they held. Nothing of them is left afterwards."""
    _free(machine)
    before = 0 if machine.tiny else torch.cuda.memory_allocated()
    if not machine.tiny:
        torch.cuda.reset_peak_memory_stats()
    step = make()
    seconds = []
    for number in range(2 if machine.tiny else 13):
        start = time.perf_counter()
        finite(step())  # ends by reading the loss back
        if number >= 3 or machine.tiny:
            seconds.append(time.perf_counter() - start)
    peak = 0 if machine.tiny else torch.cuda.max_memory_allocated() - before
    del step
    _free(machine)
    left = 0 if machine.tiny else torch.cuda.memory_allocated() - before
    if left > 64 << 20:
        raise Wrong(f"{left / 1e6:.0f} MB of a step are left, which the next one would be charged with")
    return {"seconds": statistics.median(seconds), "peak_bytes": peak}


def _free(machine: Machine) -> None:
    """Graphs and what they captured refer to each other in circles, which only the collector finds."""
    gc.collect()
    if not machine.tiny:
        torch.cuda.empty_cache()


# Nothing runs behind a step of CORRECTNESS that finds something wrong; a measurement that fails costs only itself.
CORRECTNESS: dict[str, Callable[[Machine, State], State]] = {
    "versions": check_versions, "captured": check_captured, "optimizer": check_optimizer_and_norms, "accuracy": check_accuracy,
    "hopper": check_hopper, "instrumented": check_instrumented, "determinism": check_determinism, "training": check_training,
    "gpu": check_everything_for_gpus,
}  # fmt: skip
MEASUREMENTS: dict[str, Callable[..., State]] = {"ceilings": measure_ceilings, "operations": measure_operations, "steps": measure_steps}
STEPS = {**CORRECTNESS, **MEASUREMENTS}


def run_all(machine: Machine, state: State, keep: Callable[[State], None], only: str | None = None, match: str = "") -> None:
    """The steps that `state` does not hold yet, in order, each kept as soon as it is done. With `only`, that one again, and no other."""
    for name, step in STEPS.items():
        if name != only if only else name in state and "failed" not in state[name]:
            continue
        print(f"{name} ...", flush=True)
        try:
            state[name] = step(machine, state, match) if name == "operations" else step(machine, state)
        except Exception as error:
            if not isinstance(error, Wrong):
                traceback.print_exc()
            text = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
            state[name] = {"failed": text[:400], **getattr(error, "found", {})}
        keep(state)
        if name in CORRECTNESS and "failed" in state[name]:
            print(
                f"{name}: {state[name]['failed']}\nNothing behind a wrong result is run. Mend it and start again: what is done is kept.",
                file=sys.stderr,
            )
            return


# ---- results ----------------------------------------------------------------------------------------------------------------


def about(machine: Machine) -> dict[str, Any]:
    if machine.tiny:
        return {"device": "Triton's interpreter", "note": "not measured: tiny shapes on the interpreter, to prove that the suite runs through"}
    clocks = "unknown"
    with contextlib.suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,driver_version", "--format=csv,noheader"]
        clocks = subprocess.run(query, capture_output=True, text=True).stdout.strip() or clocks
    return {"device": torch.cuda.get_device_name(), "clocks and driver": clocks, "torch": torch.__version__, "commit": report.commit()[0]}


def markdown(state: dict[str, Any]) -> str:
    def number(value: float | None, text: str) -> str:
        return "not measured" if value is None else format(value, text)

    lines = [f"# {state['about']['device']}", "", *(f"- {key}: {value}" for key, value in state["about"].items()), ""]
    lines += ["| operation | ms | best peer | ratio | share of limit | goal | met |", "|---|---|---|---|---|---|---|"]
    for row in state.get("operations", {}).get("rows", []):
        if "failed" in row:
            lines.append(f"| {row['name']} | failed: {row['failed'][:80]} | | | | | |")
            continue
        met = {True: "yes", False: "no", None: "not measured"}[row["met"]]
        figures = number(row["ms"], ".4g"), row["best_peer"] or "-", number(row["ratio"], ".2f"), number(row["share"], ".0%")
        lines.append(f"| {row['name']} | {' | '.join(figures)} | {row['goal']} | {met} |")
    for row in state.get("steps", {}).get("rows", []):
        speed, memory = number(row.get("ratio"), ".2f"), number(row.get("memory_ratio"), ".2f")
        lines.append(f"\n{row['name']}: {speed} of compiled PyTorch's tokens/s, {memory} of its memory")
    lines += [f"\n{name}: {json.dumps(state[name])[:300]}" for name in (*CORRECTNESS, "ceilings") if name in state]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on Triton's interpreter; nothing is measured")
    parser.add_argument("--only", choices=STEPS, help="run this step again, and no other")
    parser.add_argument("--match", default="", help="of the operations, those whose name holds this text")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the results")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here. python profiling/gpu_suite.py --tiny proves that the suite runs through")
    machine = Machine(options.tiny)
    name = "tiny" if options.tiny else "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name().lower())
    path = options.out / f"gpu-{name}.json"
    state: State = json.loads(path.read_text()) if path.exists() else {}
    state["about"] = about(machine)
    if options.only == "operations" and "ceilings" not in state:
        parser.error("the shares of operations are of the ceilings: run --only ceilings first")

    def keep(state: State) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(state, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(state))

    with runtime.use(backend="triton") if options.tiny else contextlib.nullcontext():
        run_all(machine, state, keep, options.only, options.match)
    print(markdown(state))
    print(f"wrote {path}")
    failed = [step for step in STEPS if "failed" in state.get(step, {})]
    failed += [row["name"] for row in state.get("operations", {}).get("rows", []) if "failed" in row]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    report.run(main)
