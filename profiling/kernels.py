"""Every operation against PyTorch, forward and backward, interleaved in one run; nothing is timed before its result was compared.

    python profiling/kernels.py                              # all operations, fp32 and bf16
    python profiling/kernels.py --ops matmul attention --threads 1
    python profiling/kernels.py --write kernels              # keep the figures: profiling/results/kernels.json

"ratio" is PyTorch's time / ours: above 1 we are faster. "share" is the rate against the best matrix-product rate of this run, or the bytes moved
against the copy bandwidth of this run (see roofline.py for what is counted).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import plots
import torch
from report import add_output_options, finish, interleaved, percent, print_table, run
from roofline import Cost, cost
from torch import Tensor
from torch.nn import functional as F

from cllm import kernels, runtime


@dataclass(frozen=True)
class Contest:
    """One operation on one shape: the same function, ours and PyTorch's, of the same tensors."""

    op: str
    shape: str
    cost: Cost
    tensors: list[Tensor]
    ours: Callable[..., Tensor]
    peer: Callable[..., Tensor]
    backward: bool = True


def contests(dtype: torch.dtype, tiny: bool) -> list[Contest]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    size = dtype.itemsize
    found = []
    rows, width, hidden, vocab = (64, 32, 48, 101) if tiny else (1024, 768, 2304, 50304)
    for n, k, m in ((rows, width, hidden), (rows, 4 * width, width)):
        a, b = randn(n, k), randn(m, k, scale=k**-0.5)
        found.append(Contest("matmul", f"{n} x {k} x {m}", cost("matmul", size, n, k, m), [a, b], lambda a, b: kernels.matmul(a, b.T), F.linear))
    for length, heads, kv_heads, dim in ((32, 4, 2, 16),) if tiny else ((1024, 12, 12, 64), (2048, 12, 3, 64), (1024, 8, 8, 128)):
        q, k, v = randn(1, length, heads, dim), randn(1, length, kv_heads, dim), randn(1, length, kv_heads, dim)
        found.append(
            Contest(
                "attention",
                f"T {length}, {heads}/{kv_heads} heads of {dim}",
                cost("attention", size, 1, length, heads, kv_heads, dim),
                [q, k, v],
                lambda q, k, v: kernels.attention(q, k, v, causal=True),
                lambda q, k, v: F.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
                ).transpose(1, 2),
            )
        )
    ffn = (2 * width // 3) * 4
    gate, up = randn(ffn, width, scale=width**-0.5), randn(ffn, width, scale=width**-0.5)
    down, x = randn(width, ffn, scale=ffn**-0.5), randn(rows, width)
    found.append(
        Contest(
            "feed_forward",
            f"SwiGLU {rows} x {width} x {ffn}",
            cost("feed_forward", size, rows, width, ffn, 3),
            [x, gate, up, down],
            lambda x, g, u, d: kernels.feed_forward(x, g, u, d),
            lambda x, g, u, d: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d),
        )
    )
    weight, targets = randn(vocab, width, scale=width**-0.5), torch.randint(vocab, (rows,), generator=generator)
    found.append(
        Contest(
            "linear_cross_entropy",
            f"{rows} x {width} x {vocab}",
            cost("linear_cross_entropy", size, rows, width, vocab),
            [x, weight],
            lambda x, w: kernels.linear_cross_entropy(x, w, targets),
            lambda x, w: F.cross_entropy(F.linear(x, w).float(), targets),
        )
    )
    for n, e in ((64, 32),) if tiny else ((4096, 768), (512, 4096)):
        x, scale, shift = randn(n, e), randn(e), randn(e)
        labels = torch.randint(e, (n,), generator=generator)
        tokens = torch.randint(n, (n,), generator=generator)
        shape = f"{n} x {e}"
        found += [
            Contest(
                "rms_norm",
                shape,
                cost("norm", size, n, e),
                [x, scale],
                lambda x, w: kernels.rms_norm(x, w),
                lambda x, w: F.rms_norm(x, (x.shape[1],), w, 1e-6),
            ),
            Contest(
                "layer_norm",
                shape,
                cost("norm", size, n, e),
                [x, scale, shift],
                lambda x, w, b: kernels.layer_norm(x, w, b),
                lambda x, w, b: F.layer_norm(x, (x.shape[1],), w, b),
            ),
            Contest("softmax", shape, cost("softmax", size, n, e), [x], lambda x: kernels.softmax(x), lambda x: torch.softmax(x, -1)),
            Contest(
                "cross_entropy",
                shape,
                cost("cross_entropy", size, n, e),
                [x],
                lambda x, y=labels: kernels.cross_entropy(x, y),
                lambda x, y=labels: F.cross_entropy(x.float(), y),
            ),
            Contest(
                "embedding",
                shape,
                cost("embedding", size, n, e),
                [x],
                lambda x, t=tokens: kernels.embedding(t, x),
                lambda x, t=tokens: F.embedding(t, x),
            ),
        ]
    length, heads, dim = (16, 2, 16) if tiny else (1024, 12, 64)
    x = randn(4, length, heads, dim)
    angles = torch.outer(torch.arange(length).float(), 10000 ** (-torch.arange(dim // 2) / (dim // 2)))
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((first * c - second * s, second * c + first * s), -1).to(x.dtype)

    shape = f"4 x {length} x {heads} x {dim}"
    found.append(Contest("rotary", shape, cost("rotary", size, x.numel()), [x], lambda x: kernels.rotary(x, cos, sin), rotate))
    found.append(
        Contest(
            "norm_rotary",
            shape,
            cost("norm_rotary", size, x.numel()),
            [x, randn(dim)],
            lambda x, w: kernels.rotary(x, cos, sin, norm_weight=w.expand(heads, dim)),
            lambda x, w: rotate(F.rms_norm(x, (dim,), w, 1e-6)),
        )
    )
    return found


def check(contest: Contest, dtype: torch.dtype) -> None:
    """Ours must agree with PyTorch in float32 to the dtype's accuracy, forward and backward; a wrong kernel has no speed.

    In float32, because PyTorch adds up some bfloat16 gradients (a norm's, over the rows) in bfloat16.
    """
    tolerance = 2e-3 if dtype == torch.float32 else 6e-2
    outs, grads = [], []
    for function, compute in ((contest.ours, dtype), (contest.peer, torch.float32)):
        leaves = [t.detach().to(compute, copy=True).requires_grad_() for t in contest.tensors]
        out = function(*leaves)
        # A random direction: along a norm's own output the true gradient nearly vanishes and only rounding is left to compare.
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (out.float() * direction).sum().backward()
        outs.append(out.detach().float())
        grads.append([t.grad.float() for t in leaves])
    for mine, theirs in [(outs[0], outs[1]), *zip(*grads)]:
        error = (mine - theirs).norm() / theirs.norm().clamp_min(1e-20)
        if not error < tolerance:
            raise SystemExit(f"{contest.op} {contest.shape} {dtype}: differs from PyTorch by {error:.1e}; it is not timed")


def measure(contest: Contest, dtype: torch.dtype, rounds: int) -> list[dict]:
    check(contest, dtype)
    rows = []
    with torch.no_grad():
        forward = interleaved({name: lambda f=f: f(*contest.tensors) for name, f in (("ours", contest.ours), ("peer", contest.peer))}, rounds)
    rows.append(("forward", forward, 1.0))
    if contest.backward:
        calls = {}
        for name, function in (("ours", contest.ours), ("peer", contest.peer)):
            leaves = [t.detach().clone().requires_grad_() for t in contest.tensors]
            seed = torch.ones_like(function(*leaves))
            calls[name] = lambda f=function, leaves=leaves, seed=seed: torch.autograd.grad(f(*leaves), leaves, seed)
        rows.append(("forward+backward", interleaved(calls, rounds), contest.cost.with_backward))
    return [
        {
            "op": contest.op,
            "shape": contest.shape,
            "dtype": str(dtype).removeprefix("torch."),
            "direction": direction,
            "ours_ms": seconds["ours"] * 1e3,
            "peer_ms": seconds["peer"] * 1e3,
            "ratio": seconds["peer"] / seconds["ours"],
            "flops": contest.cost.flops * factor,
            "bytes": contest.cost.bytes * factor,
        }
        for direction, seconds, factor in rows
    ]


def adamw(rounds: int, parameters: int) -> dict:
    """One optimizer update with clipping over tensors of a GPT-2-like mixture of sizes."""
    sizes = [parameters // 3, parameters // 3, parameters // 6, parameters // 6 - 3072, 768, 768, 768, 768]
    ours = [torch.randn(n) for n in sizes]
    theirs = [torch.nn.Parameter(t.clone()) for t in ours]
    grads = [torch.randn(n) * 1e-3 for n in sizes]
    moments = [[torch.zeros(n) for n in sizes] for _ in range(2)]
    for parameter, gradient in zip(theirs, grads):
        parameter.grad = gradient.clone()
    optimizer = torch.optim.AdamW(theirs, lr=1e-4, weight_decay=0.1, fused=True)
    step = 0

    def mine() -> None:
        nonlocal step
        step += 1
        options = {"learning_rate": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decays": [0.1] * len(sizes), "step": step, "max_norm": 1.0}
        kernels.adamw_(ours, grads, *moments, **options)

    def peer() -> None:
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()

    seconds = interleaved({"ours": mine, "peer": peer}, rounds)
    total = cost("adamw", 4, sum(sizes))
    return {
        "op": "adamw_",
        "shape": f"{sum(sizes):,} parameters, clip",
        "dtype": "float32",
        "direction": "update",
        "ours_ms": seconds["ours"] * 1e3,
        "peer_ms": seconds["peer"] * 1e3,
        "ratio": seconds["peer"] / seconds["ours"],
        "flops": total.flops,
        "bytes": total.bytes,
    }


def draw(path: Path, rows: list[dict]) -> None:
    """PyTorch's time / ours, one bar for each precision."""
    places = list(dict.fromkeys((r["op"], r["shape"], r["direction"]) for r in rows))
    ratios = {(r["op"], r["shape"], r["direction"], r["dtype"]): r["ratio"] for r in rows}
    series = {dtype: [ratios.get((*place, dtype)) for place in places] for dtype in dict.fromkeys(r["dtype"] for r in rows)}
    plots.bars(path, "Speed of each operation against PyTorch", [", ".join(place) for place in places], series, "PyTorch's time / ours", line=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", nargs="+", help="only these operations")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    rows: list[dict] = []
    with runtime.use(threads=options.threads):
        torch.set_num_threads(options.threads or runtime.device.usable_cores())
        for name in options.dtypes:
            dtype = getattr(torch, name)
            chosen = [contest for contest in contests(dtype, options.tiny) if not options.ops or contest.op in options.ops]
            for contest in runtime.progress.track(chosen, len(chosen), f"{name}: timing operations"):
                rows += measure(contest, dtype, options.rounds)
        if not options.ops or "adamw_" in options.ops:
            with runtime.progress.Stage("timing the optimizer"):
                rows.append(adamw(options.rounds, 40_000 if options.tiny else 124_000_000))
    ceilings = runtime.ceilings()
    fastest = {"float32": ceilings.fp32_gflops * 1e9, "bfloat16": ceilings.bf16_gflops * 1e9}
    for row in rows:
        if row["op"] == "matmul":
            reached = row["flops"] / min(row["ours_ms"], row["peer_ms"]) * 1e3
            fastest[row["dtype"]] = max(fastest[row["dtype"]], reached)
    for row in rows:
        seconds = row["ours_ms"] / 1e3
        row["share"] = max(row["flops"] / seconds / fastest[row["dtype"]], row["bytes"] / seconds / (ceilings.copy_gbps * 1e9))
    print_table(
        ("operation", "shape", "dtype", "direction", "ours ms", "PyTorch ms", "ratio", "share"),
        [
            (r["op"], r["shape"], r["dtype"], r["direction"], f"{r['ours_ms']:.3f}", f"{r['peer_ms']:.3f}", f"{r['ratio']:.2f}", percent(r["share"]))
            for r in rows
        ],
    )
    finish(options, rows, lambda path: draw(path, rows), threads=options.threads)


if __name__ == "__main__":
    run(main)
