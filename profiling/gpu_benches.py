"""What the GPU suite times: our operations beside what torch ships and other people's kernels, and how one call is timed on a GPU.

Each family of operations is a generator of `Bench`, so that one whose contestants do not run costs only itself. Used by `gpu_suite.py`.
"""

import contextlib
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import rivals as others
import roofline
import torch
import torch.nn.functional as F

from cllm import kernels, runtime
from cllm.kernels._register import backend_serves
from cllm.runtime import choice

OURS = "cllm"  # the name of our contestant, or how the names begin of several: "cllm triton", "cllm gluon"


@dataclass
class Bench:
    """One operation on one shape. calls: the contestants. goal: (what must ship, in words; a test of the row).

    choose: (operation, shapes) for which the fastest backend is recorded. backends: the contestant that ran on each backend, because it was forced.
    """

    name: str
    calls: dict[str, Callable[[], Any]]
    cost: roofline.Cost
    goal: str = ""
    met: Callable[[dict[str, Any]], bool] | None = None
    choose: tuple[str, tuple[tuple[int, ...], ...]] | None = None
    backends: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)

    def record(self, seconds: dict[str, float], dtype: torch.dtype) -> None:
        """Keeps what was measured of each backend for the plan."""
        measured = {backend: seconds[name] for backend, name in self.backends.items() if name in seconds}
        if self.choose is not None and measured:
            choice.record(self.choose[0], "cuda", str(dtype).removeprefix("torch."), self.choose[1], measured)


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
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # what the call reads may still be on its way there
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph
    except Exception:  # of whatever kind: a call that cannot be captured says so in its own way, and is timed without a graph
        with contextlib.suppress(RuntimeError):
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

            rivals: dict[str, Callable[..., torch.Tensor]] = {"cllm triton": through("triton", ours), "sdpa": torchs}
            if not machine.tiny:
                rivals |= others.attention()
                rivals["sdpa cudnn"] = lambda q, k, v: torchs(q, k, v, SDPBackend.CUDNN_ATTENTION)
                rivals["sdpa flash"] = lambda q, k, v: torchs(q, k, v, SDPBackend.FLASH_ATTENTION)
                if backend_serves("attention", "gluon", (q.shape, k.shape), q.dtype, "cuda"):
                    rivals["cllm gluon"] = through("gluon", ours)
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
                ("attention", (tuple(q.shape), tuple(k.shape))) if backward else None,  # training has both directions, and decides
                {"triton": "cllm triton", "gluon": "cllm gluon", "sdpa": "sdpa"}, absent,
            )  # fmt: skip
    yield from packed_attention_benches(machine)


def packed_attention_benches(machine: Machine) -> Iterator[Bench]:
    """What training runs: a batch as one row of packed documents, forward and backward. Torch's kernels cannot."""
    cases = [(20, 2, 2, 1, 16)] if machine.tiny else [(1024, 16, 16, 16, 64), (1024, 16, 16, 4, 128)]
    for tokens, documents, heads, kv_heads, dim in cases:
        q = machine.normal(1, tokens * documents, heads, dim, grad=True)
        k, v = (machine.normal(1, tokens * documents, kv_heads, dim, grad=True) for _ in range(2))
        bounds = torch.arange(0, tokens * documents + 1, tokens, dtype=torch.int32, device=machine.device)

        def ours(q, k, v, bounds=bounds):
            return kernels.attention(q, k, v, causal=True, cu_seqlens=bounds)

        served = [name for name in ("triton", "gluon") if backend_serves("attention", name, (q.shape, k.shape), q.dtype, machine.device.type)]
        calls = {f"{OURS} {name}": _with_gradients(through(name, ours), q, k, v) for name in served}
        cost = roofline.cost("attention", 2, documents, tokens, heads, kv_heads, dim)
        yield Bench(
            f"attention forward+backward packed D{dim} {heads}/{kv_heads} heads, {documents} documents of {tokens}", calls,
            roofline.Cost(cost.flops * cost.with_backward, cost.bytes * cost.with_backward),
            choose=("attention", (tuple(q.shape), tuple(k.shape))), backends={name: f"{OURS} {name}" for name in served},
        )  # fmt: skip


def through(backend: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on that backend, its gradient too: a gradient runs under the settings of its forward pass."""

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

    # What a captured training step calls; `kernels.adamw_` takes its numbers from the host and cannot be captured.
    ours = importlib.import_module("cllm.kernels.triton.adamw").Fused(params, firsts, seconds, [0.1] * 4)
    hyper = torch.tensor([1e-3, 0.9, 0.95, 1e-8, 1.0, 1.0, 1.0, 0.0], device=machine.device)
    stats = torch.empty(3, device=machine.device)

    def step_ours():
        ours.step(grads, hyper, stats)

    def step_plain():
        torch.nn.utils.clip_grad_norm_(fused.param_groups[0]["params"], 1.0)
        fused.step()

    calls = {"cllm": step_ours, "clip + fused AdamW": step_plain}
    yield Bench(f"AdamW with clip, {count:,} parameters", calls, roofline.cost("adamw", 4, count), ">= 85 % of bandwidth", bandwidth)
