"""Everything there is to know of the GPU kernels on the GPU of this machine, in one command of under ten minutes that goes on where it was stopped.

    python profiling/gpu_suite.py                                  # tests, operations, determinism, whole steps
    python profiling/gpu_suite.py --only operations                # one section, measured again
    TRITON_INTERPRET=1 python profiling/gpu_suite.py --tiny        # without a GPU: runs through on the interpreter, measures nothing

Each section is kept as soon as it is done (results/gpu-NAME.json and .md) and skipped when the script starts again. Operations are timed against
what torch ships (attention pinned to cuDNN and to flash and as torch chooses, FlexAttention, torch.compile for the rest) and against the libraries of
rivals.py where they are installed; absent ones are named. Times are medians, eager and as a CUDA graph, interleaved, on random data with the L2 cache
emptied; shares are of the rates measured in the same run. What was fastest is recorded for the plan (`runtime.choice`), which then prefers it.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import report
import rivals as others
import roofline
import torch
import torch.nn.functional as F
from peers import PlainStep, Shape

from cllm import Model, ModelConfig, TrainStep, kernels, runtime
from cllm.kernels._register import backend_serves
from cllm.runtime import choice

SECTIONS = ("tests", "ceilings", "operations", "determinism", "steps")
SECTION_SECONDS = {"tests": 150.0, "operations": 200.0, "determinism": 60.0, "steps": 150.0}


@dataclass
class Bench:
    """One operation on one shape. calls: contestants, "cllm" ours. goal: (what must ship, in words; a test of the row)."""

    name: str
    calls: dict[str, Callable[[], Any]]
    cost: roofline.Cost
    goal: str = ""
    met: Callable[[dict[str, Any]], bool] | None = None
    choose: tuple[str, tuple[tuple[int, ...], ...]] | None = None
    absent: list[str] = field(default_factory=list)


class Machine:
    """Where the suite runs: a GPU, or Triton's interpreter on the CPU with tiny shapes, whose times mean nothing."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.bfloat16
        self.flush = torch.empty(1 if tiny else 256 << 20, dtype=torch.uint8, device=self.device)

    def normal(self, *shape: int, grad: bool = False, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(dtype or self.dtype).requires_grad_(grad)

    def times(self, calls: dict[str, Callable[[], Any]], seconds: float = 3.0) -> dict[str, dict[str, float]]:
        """Eager and graph medians with their 20th and 80th percentile, in seconds."""
        if self.tiny:
            for call in calls.values():
                call()
            return {name: {} for name in calls}
        graphs = {name: _graph(call) for name, call in calls.items()}
        found: dict[str, dict[str, list[float]]] = {name: {"eager": [], "graph": []} for name in calls}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(next(iter(found.values()))["eager"]) < 5:
            for name, call in calls.items():
                found[name]["eager"].append(self._once(call))
                if graphs[name] is not None:
                    found[name]["graph"].append(self._once(graphs[name].replay))
        result: dict[str, dict[str, float]] = {}
        for name, kinds in found.items():
            result[name] = {}
            for kind, values in kinds.items():
                if values:
                    ordered = sorted(values)
                    low, high = ordered[len(ordered) // 5], ordered[4 * len(ordered) // 5]
                    result[name] |= {kind: statistics.median(values), f"{kind}_p20": low, f"{kind}_p80": high}
        return result

    def _once(self, call: Callable[[], Any]) -> float:
        self.flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3


def _graph(call: Callable[[], Any]) -> Any:
    """The call as a CUDA graph; None where it cannot be captured."""
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph
    except RuntimeError:
        torch.cuda.synchronize()
        return None


# ---- operations -----------------------------------------------------------------------------------------------------------


def _with_gradients(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Callable[[], Any]:
    out = function(*inputs)
    gradient = torch.randn_like(out)
    leaves = [each for each in inputs if each.requires_grad]
    return lambda: torch.autograd.grad(function(*inputs), leaves, gradient)


def attention_benches(machine: Machine) -> Iterator[Bench]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cases = [(1, tokens, 64, 8, 128) for tokens in (2048, 4096, 8192)] + [(16384 // tokens, tokens, 16, 16, 64) for tokens in (1024, 2048, 4096)]
    for batch, tokens, heads, kv_heads, dim in [(1, 40, 2, 1, 16)] if machine.tiny else cases:
        for backward in (False, True):
            q = machine.normal(batch, tokens, heads, dim, grad=backward)
            k, v = (machine.normal(batch, tokens, kv_heads, dim, grad=backward) for _ in range(2))

            def ours(q, k, v):
                return kernels.attention(q, k, v, causal=True)

            def torchs(q, k, v, backend=None):
                with sdpa_kernel(backend) if backend is not None else contextlib.nullcontext():
                    views = (x.transpose(1, 2) for x in (q, k, v))
                    return F.scaled_dot_product_attention(*views, is_causal=True, enable_gqa=True).transpose(1, 2)

            rivals: dict[str, Callable[..., torch.Tensor]] = {"cllm": ours}
            rivals["sdpa"] = torchs
            if not machine.tiny:
                rivals |= others.attention()
                rivals["sdpa-cudnn"] = lambda q, k, v: torchs(q, k, v, SDPBackend.CUDNN_ATTENTION)
                rivals["sdpa-flash"] = lambda q, k, v: torchs(q, k, v, SDPBackend.FLASH_ATTENTION)
                if backend_serves("attention", "gluon", (q.shape, k.shape), q.dtype, "cuda"):
                    rivals["cllm-gluon"] = _through("gluon", ours)
            calls: dict[str, Callable[[], Any]] = {}
            absent = []
            for name, rival in rivals.items():
                try:
                    call = _with_gradients(rival, q, k, v) if backward else (lambda rival=rival, q=q, k=k, v=v: rival(q, k, v))
                    call()
                    calls[name] = call
                except Exception as error:  # of whatever kind: other people's packages
                    absent.append(f"{name}: {type(error).__name__} {str(error).splitlines()[:1]}"[:120])
            cost = roofline.cost("attention", 2, batch, tokens, heads, kv_heads, dim)
            if backward:
                cost = roofline.Cost(cost.flops * cost.with_backward, cost.bytes * cost.with_backward)
            yield Bench(
                f"attention {'forward+backward' if backward else 'forward'} causal D{dim} {heads}/{kv_heads} heads S{tokens} B{batch}", calls, cost,
                ">= 0.95 of cuDNN, else dispatched", lambda row: row["ratio"] >= 0.95,
                None if backward else ("attention", (tuple(q.shape), tuple(k.shape))), absent,
            )  # fmt: skip


def _through(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: torch.Tensor) -> Any:
        with runtime.use(backend=backend):
            return function(*inputs)

    return call


def _join(
    calls: dict[str, Callable[[], Any]], machine: Machine, make: Callable[[], dict[str, Any]], ready: Callable[[Any], Callable[[], Any]]
) -> list[str]:
    """Adds other people's kernels to the contestants; what of them does not run, and why. The interpreter has none of them."""
    absent: list[str] = []
    try:
        found = {} if machine.tiny else make()
    except Exception as error:
        return [f"{make}: {type(error).__name__} {error}"[:120]]
    for name, rival in found.items():
        try:
            call = ready(rival)
            call()
            calls[name] = call
        except Exception as error:
            absent.append(f"{name}: {type(error).__name__} {str(error).splitlines()[:1]}"[:120])
    return absent


def product_benches(machine: Machine) -> Iterator[Bench]:
    rows, width, hidden = (32, 32, 48) if machine.tiny else (16384, 1024, 2816)
    x = machine.normal(rows, width, grad=True)
    gate, up, down = (machine.normal(*shape, grad=True) for shape in ((hidden, width), (hidden, width), (width, hidden)))

    def plain(x, gate, up, down):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    compiled = plain if machine.tiny else torch.compile(plain)
    cost = roofline.cost("feed_forward", 2, rows, width, hidden, 3)
    with torch.no_grad():
        calls = {"cllm": lambda: kernels.feed_forward(x, gate, up, down), "compiled": lambda: compiled(x, gate, up, down)}
        missing = _join(calls, machine, others.swiglu, lambda rival: partial(rival, x, gate, up, down))
        name = f"feed-forward forward {rows}x{width}x{hidden}"
        yield Bench(name, calls, cost, ">= 1.05 of compiled", lambda row: row["ratio"] >= 1.05, absent=missing)
    calls = {"cllm": _with_gradients(kernels.feed_forward, x, gate, up, down), "compiled": _with_gradients(compiled, x, gate, up, down)}
    missing = _join(calls, machine, others.swiglu, lambda rival: _with_gradients(rival, x, gate, up, down))
    both = roofline.Cost(3 * cost.flops, 3 * cost.bytes)
    name = f"feed-forward forward+backward {rows}x{width}x{hidden}"
    yield Bench(name, calls, both, ">= 1.00 of compiled", lambda row: row["ratio"] >= 1.0, absent=missing)
    for rows, width, vocabulary, limit in [(48, 32, 97, 1.0)] if machine.tiny else [(4096, 4096, 128256, 0.019), (16384, 1024, 50304, 0.0077)]:
        x, weight = machine.normal(rows, width, grad=True), machine.normal(vocabulary, width, grad=True)
        targets = torch.randint(vocabulary, (rows,), device=machine.device)

        def fused(x, weight, targets=targets):
            return kernels.linear_cross_entropy(x, weight, targets, divisor=float(targets.numel()))

        def full(x, weight, targets=targets):
            return F.cross_entropy(F.linear(x, weight), targets)

        calls = {"cllm": _with_gradients(fused, x, weight)}
        calls["compiled"] = _with_gradients(full if machine.tiny else torch.compile(full), x, weight)
        missing = _join(calls, machine, partial(others.linear_cross_entropy, targets), lambda rival, x=x, w=weight: _with_gradients(rival, x, w))
        cost = roofline.cost("linear_cross_entropy", 2, rows, width, vocabulary)
        yield Bench(
            f"linear cross entropy forward+backward {rows}x{width}x{vocabulary}", calls, roofline.Cost(3 * cost.flops, 3 * cost.bytes),
            f"<= {1e3 * limit:.3g} ms", lambda row, limit=limit: row["ms"] <= 1e3 * limit, absent=missing,
        )  # fmt: skip


def row_benches(machine: Machine) -> Iterator[Bench]:
    rows, width = (24, 40) if machine.tiny else (16384, 4096)
    x, weight, residual = machine.normal(rows, width, grad=True), machine.normal(width, grad=True), machine.normal(rows, width, grad=True)
    maybe = (lambda function: function) if machine.tiny else torch.compile
    size = rows * width

    def bandwidth(row: dict[str, Any]) -> bool:
        return row["share"] is not None and row["share"] >= 0.85

    def norm_plain(x, weight):
        return F.rms_norm(x, (width,), weight, 1e-6)

    def sum_plain(x, weight, residual):
        return F.rms_norm(x + residual, (width,), weight, 1e-6)

    def sum_ours(x, weight, residual):
        return kernels.rms_norm(x, weight, residual=residual)[0]

    pairs: list[tuple[str, Callable[..., torch.Tensor], Callable[..., torch.Tensor], tuple[torch.Tensor, ...], float, float]] = [
        ("rms_norm", kernels.rms_norm, maybe(norm_plain), (x, weight), 4.0 * size, 10.0 * size),
        ("add + rms_norm", sum_ours, maybe(sum_plain), (x, weight, residual), 8.0 * size, 18.0 * size),
        ("layer_norm", kernels.layer_norm, maybe(lambda x, w: F.layer_norm(x, (width,), w)), (x, weight), 4.0 * size, 10.0 * size),
        ("softmax", kernels.softmax, maybe(lambda x: torch.softmax(x, -1)), (x,), 4.0 * size, 10.0 * size),
    ]  # fmt: skip
    rivals_of = {"rms_norm": others.rms_norm, "add + rms_norm": others.add_rms_norm, "layer_norm": others.layer_norm, "softmax": others.softmax}
    limits = {"rms_norm forward": 72e-6, "rms_norm forward+backward": 197e-6}
    for name, ours, plain, inputs, forward_bytes, both_bytes in pairs:
        for backward in (False, True):
            label = f"{name} {'forward+backward' if backward else 'forward'}"
            with contextlib.nullcontext() if backward else torch.no_grad():
                both = {"cllm": ours, "compiled": plain}
                calls = {who: _with_gradients(f, *inputs) if backward else partial(f, *inputs) for who, f in both.items()}
                way, make = _with_gradients if backward else partial, rivals_of[name]
                missing = _join(calls, machine, make, lambda rival, way=way, inputs=inputs: way(rival, *inputs))
                limit = limits.get(label)
                yield Bench(
                    f"{label} {rows}x{width}", calls, roofline.Cost(4.0 * size, both_bytes if backward else forward_bytes),
                    f"<= {1e6 * limit:.0f} us" if limit else ">= 85 % of bandwidth",
                    (lambda row, limit=limit: row["ms"] <= 1e3 * limit) if limit else bandwidth, absent=missing,
                )  # fmt: skip
    batch, tokens, heads, dim = (1, 8, 2, 16) if machine.tiny else (16, 1024, 16, 128)
    q = machine.normal(batch, tokens, heads, dim)
    angles = torch.randn(tokens, dim // 2, device=machine.device)
    cos, sin = angles.cos(), angles.sin()

    def rotate_plain(x):
        a, b = x.float().chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((a * c - b * s, b * c + a * s), -1).to(x.dtype)

    plain_rotary = maybe(rotate_plain)
    calls = {"cllm": lambda: kernels.rotary(q, cos, sin), "compiled": lambda: plain_rotary(q)}
    yield Bench(f"rotary {batch}x{tokens}x{heads}x{dim}", calls, roofline.cost("rotary", 2, q.numel()), ">= 85 % of bandwidth", bandwidth)
    head_weight = machine.normal(dim)
    plain_norm_rotary = maybe(lambda x: rotate_plain(F.rms_norm(x, (dim,), head_weight, 1e-6)))
    calls = {
        "cllm": lambda: kernels.rotary(q, cos, sin, norm_weight=head_weight.expand(heads, dim)), "compiled": lambda: plain_norm_rotary(q),
    }  # fmt: skip
    cost = roofline.cost("norm_rotary", 2, q.numel())
    yield Bench(f"QK-norm and rotary {batch}x{tokens}x{heads}x{dim}", calls, cost, ">= 85 % of bandwidth", bandwidth)
    vocabulary = 97 if machine.tiny else 50304
    logits = machine.normal(rows, vocabulary, grad=True)
    targets = torch.randint(vocabulary, (rows,), device=machine.device)
    loss_plain = maybe(lambda z: F.cross_entropy(z.float(), targets))
    calls = {"cllm": _with_gradients(lambda z: kernels.cross_entropy(z, targets), logits), "compiled": _with_gradients(loss_plain, logits)}
    missing = _join(calls, machine, partial(others.cross_entropy, targets), lambda rival: _with_gradients(rival, logits))
    cost = roofline.cost("cross_entropy", 2, rows, vocabulary)
    cost = roofline.Cost(cost.flops, 3 * cost.bytes)
    yield Bench(f"cross entropy forward+backward {rows}x{vocabulary}", calls, cost, ">= 85 % of bandwidth", bandwidth, absent=missing)
    count = 4096 if machine.tiny else 124_000_000
    params, grads, firsts, seconds = ([machine.normal(count // 4, dtype=torch.float32) for _ in range(4)] for _ in range(4))
    seconds = [each.square() for each in seconds]
    fused = torch.optim.AdamW([each.clone().requires_grad_() for each in params], lr=1e-3, fused=not machine.tiny)
    for parameter, gradient in zip(fused.param_groups[0]["params"], grads):
        parameter.grad = gradient.clone()

    def step_ours():
        options = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decays": [0.1] * 4, "step": 10, "max_norm": 1.0}
        kernels.adamw_(params, grads, firsts, seconds, **options)

    def step_plain():
        torch.nn.utils.clip_grad_norm_(fused.param_groups[0]["params"], 1.0)
        fused.step()

    calls = {"cllm": step_ours, "clip + fused AdamW": step_plain}
    yield Bench(f"AdamW with clip, {count:,} parameters", calls, roofline.cost("adamw", 4, count), ">= 85 % of bandwidth", bandwidth)


# ---- sections ------------------------------------------------------------------------------------------------------------


def run_tests(machine: Machine) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]
    where = ["tests/kernels/test_accuracy.py", "-k", "triton and softmax" if machine.tiny else "triton"] + ([] if machine.tiny else ["tests/gpu"])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *where], cwd=root, capture_output=True, text=True, timeout=SECTION_SECONDS["tests"]
    )  # fmt: skip
    return {"status": done.returncode, "tail": done.stdout.splitlines()[-3:]}


def run_ceilings(machine: Machine) -> dict[str, Any]:
    """TFLOP/s of a large bf16 product and GB/s of a large copy: what shares are of."""
    n, size = (32, 1024) if machine.tiny else (8192, 1 << 30)
    a, b = machine.normal(n, n), machine.normal(n, n)
    source = torch.empty(size, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    times = machine.times({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 4.0)
    if machine.tiny:
        return {"tflops": None, "gbps": None}
    return {"tflops": 2e-12 * n**3 / times["product"]["graph"], "gbps": 2e-9 * size / times["copy"]["graph"]}


def run_operations(machine: Machine, ceilings: dict[str, Any], only: str = "") -> dict[str, Any]:
    rows = []
    for make in (attention_benches, product_benches, row_benches):
        try:
            for bench in make(machine):
                if only and only not in bench.name:
                    continue
                rows.append(_row(machine, bench, ceilings))
                print(f"  {rows[-1]['name']}: {rows[-1]['ms'] if rows[-1]['ms'] is not None else 'not measured'}", flush=True)
        except Exception as error:  # one family that fails costs only itself
            traceback.print_exc()
            rows.append({"name": make.__name__, "failed": f"{type(error).__name__}: {error}"[:400]})
    return {"rows": rows, "absent": others.absent()}


def _row(machine: Machine, bench: Bench, ceilings: dict[str, Any]) -> dict[str, Any]:
    times = machine.times(bench.calls)
    row: dict[str, Any] = {"name": bench.name, "times": times, "goal": bench.goal, "absent": bench.absent}
    if machine.tiny:
        return row | {"ms": None, "ratio": None, "best_peer": None, "share": None, "met": None}
    best = {name: each.get("graph", each["eager"]) for name, each in times.items()}
    peers = {name: seconds for name, seconds in best.items() if not name.startswith("cllm")}
    limit = max(bench.cost.flops / (ceilings["tflops"] * 1e12), bench.cost.bytes / (ceilings["gbps"] * 1e9))
    peer = min(peers, key=peers.__getitem__) if peers else None
    row |= {"ms": 1e3 * best["cllm"], "best_peer": peer, "ratio": peers[peer] / best["cllm"] if peer else None, "share": limit / best["cllm"]}
    row["met"] = None if bench.met is None or row["ratio"] is None else bench.met(row)
    if bench.choose is not None:
        names = {"triton": "cllm", "gluon": "cllm-gluon", "sdpa": "sdpa"}
        measured = {backend: best[name] for backend, name in names.items() if name in best}
        choice.record(bench.choose[0], "cuda", str(machine.dtype).removeprefix("torch."), bench.choose[1], measured)
    return row


def run_determinism(machine: Machine) -> dict[str, Any]:
    """The backward of attention again and again: the same bits."""
    shape = (1, 24, 2, 16) if machine.tiny else (4, 1024, 16, 64)
    q, k, v, dout = (machine.normal(*shape, grad=True) for _ in range(4))
    repeats = 3 if machine.tiny else 1000
    first = torch.autograd.grad(kernels.attention(q, k, v, causal=True), (q, k, v), dout.detach())
    same = all(
        all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(kernels.attention(q, k, v, causal=True), (q, k, v), dout.detach())))
        for _ in range(repeats)
    )
    return {"repeats": repeats, "bitwise": same}


def run_steps(machine: Machine) -> dict[str, Any]:
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
        tokens, targets = (torch.randint(shape.vocab_size, (shape.batch_size, shape.seq_len)) for _ in range(2))
        on_device = tokens.to(machine.device), targets.to(machine.device)
        row: dict[str, Any] = {"name": shape.name}
        for who in ("cllm", "compiled"):
            if not machine.tiny:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            if who == "cllm":
                step: Callable[[], Any] = _our_step(Model(config).to(machine.device), tokens, targets)
            else:
                plain = PlainStep(shape, "bf16", compile=not machine.tiny, device=machine.device.type)
                step = lambda plain=plain, data=on_device: plain(*data)  # noqa: E731
            seconds = []
            for number in range(2 if machine.tiny else 13):
                start = time.perf_counter()
                step()  # ends by reading the loss back
                if number >= 3:
                    seconds.append(time.perf_counter() - start)
            if not machine.tiny:
                row[who] = {"tokens_per_second": shape.tokens / statistics.median(seconds), "peak_bytes": torch.cuda.max_memory_allocated()}
            del step
        if not machine.tiny:
            row["ratio"] = row["cllm"]["tokens_per_second"] / row["compiled"]["tokens_per_second"]
            row["memory_ratio"] = row["cllm"]["peak_bytes"] / row["compiled"]["peak_bytes"]
            row["goal"], row["met"] = ">= 1.10 tokens/s, <= 0.7 memory", row["ratio"] >= 1.1 and row["memory_ratio"] <= 0.7
        rows.append(row)
    return {"rows": rows}


def _our_step(model: Model, tokens: torch.Tensor, targets: torch.Tensor) -> Callable[[], Any]:
    step = TrainStep(model, precision="bf16", learning_rate=1e-3)
    return lambda: step(tokens, targets)


# ---- results -------------------------------------------------------------------------------------------------------------


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
    for name in SECTIONS:
        lines.append(f"\n{name}: {json.dumps(state[name])[:300]}" if name in ("tests", "determinism", "ceilings") and name in state else "")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on Triton's interpreter; nothing is measured")
    parser.add_argument("--only", choices=SECTIONS, help="run this section again, and no other")
    parser.add_argument("--match", default="", help="of the operations, those whose name holds this text")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the results")
    options = parser.parse_args()
    if options.tiny and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--tiny runs on the interpreter: TRITON_INTERPRET=1 python profiling/gpu_suite.py --tiny")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here. TRITON_INTERPRET=1 python profiling/gpu_suite.py --tiny proves that the suite runs through")
    machine = Machine(options.tiny)
    name = "tiny" if options.tiny else "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name().lower())
    path = options.out / f"gpu-{name}.json"
    state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    state["about"] = about(machine)
    with runtime.use(backend="triton") if options.tiny else contextlib.nullcontext():
        for section in SECTIONS:
            if (options.only and section != options.only) or (not options.only and section in state and "failed" not in state[section]):
                continue
            print(f"{section} ...", flush=True)
            try:
                if section == "tests":
                    state[section] = run_tests(machine)
                elif section == "ceilings":
                    state[section] = run_ceilings(machine)
                elif section == "operations":
                    state[section] = run_operations(machine, state["ceilings"], options.match)
                elif section == "determinism":
                    state[section] = run_determinism(machine)
                else:
                    state[section] = run_steps(machine)
            except Exception as error:
                traceback.print_exc()
                state[section] = {"failed": f"{type(error).__name__}: {error}"[:400]}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(state, indent=1) + "\n")
            path.with_suffix(".md").write_text(markdown(state))
    print(markdown(state))
    print(f"wrote {path}")
    failed = [section for section in SECTIONS if "failed" in state.get(section, {})]
    failed += [row["name"] for row in state.get("operations", {}).get("rows", []) if "failed" in row]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    report.run(main)
