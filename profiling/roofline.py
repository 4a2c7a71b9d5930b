"""What each operation must do at least: floating-point operations and bytes from and to memory, by formula. All reports count by this table.

A multiply-add is two operations. Bytes count every input once and every output once. `with_backward` is the factor for forward and backward
together: 3 for matrix products (two more products for the two gradients), by bytes for the rest. Recomputation is not counted: it is our cost, not
the task's.

    python profiling/roofline.py                 # the table for the shapes of the GPU suite on an H200
    python profiling/roofline.py --gpu a100      # or another of the GPUs that runtime.gpu describes
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float
    with_backward: float = 3.0


def cost(op: str, size: int, *n: int) -> Cost:
    """size: bytes of one element; n: the numbers named beside each operation."""
    if op == "matmul":  # rows, depth, columns
        rows, depth, columns = n
        return Cost(2.0 * rows * depth * columns, size * (rows * depth + depth * columns + rows * columns))
    if op == "attention":  # batch, tokens, heads, kv_heads, head_dim; causal: half of the scores; the backward has five products for two
        batch, tokens, heads, kv_heads, dim = n
        return Cost(2.0 * batch * heads * tokens * tokens * dim, size * batch * tokens * dim * (2 * heads + 2 * kv_heads), 3.5)
    if op == "decode":  # sequences, cached tokens, heads, kv_heads, head_dim: every key and value is read once
        batch, tokens, heads, kv_heads, dim = n
        return Cost(4.0 * batch * heads * tokens * dim, size * batch * dim * (2 * tokens * kv_heads + 2 * heads), 1.0)
    if op == "feed_forward":  # rows, embed, hidden, matrices
        rows, embed, hidden, matrices = n
        return Cost(2.0 * matrices * rows * embed * hidden, size * (2 * rows * embed + matrices * embed * hidden))
    if op == "linear_cross_entropy":  # rows, embed, vocabulary
        rows, embed, vocabulary = n
        return Cost(2.0 * rows * embed * vocabulary, size * (rows * embed + vocabulary * embed))
    if op in ("norm", "softmax", "embedding"):  # rows, columns: read and write; the backward reads two and writes one
        return Cost(8.0 * n[0] * n[1], 2.0 * size * n[0] * n[1], 2.5)
    if op == "cross_entropy":  # rows, columns: read; the backward reads and writes
        return Cost(4.0 * n[0] * n[1], 1.0 * size * n[0] * n[1], 3.0)
    if op == "rotary":  # elements
        return Cost(3.0 * n[0], 2.0 * size * n[0], 2.0)
    if op == "norm_rotary":  # elements: a norm of each head and the rotation in one pass; the backward reads two and writes one
        return Cost(11.0 * n[0], 2.0 * size * n[0], 2.5)
    if op == "adamw":  # parameters: the gradient twice (norm, update), weight and moments read and written
        return Cost(12.0 * n[0], (2 * size + 24.0) * n[0], 1.0)
    raise ValueError(f"no formula for {op!r}")


# The shapes that gpu_suite.py measures, forward: label, operation, bytes of an element, numbers.
SHAPES: list[tuple[str, str, int, tuple[int, ...]]] = [
    *((f"attention causal D128 64/8 heads S{tokens}", "attention", 2, (1, tokens, 64, 8, 128)) for tokens in (2048, 4096, 8192)),
    *((f"attention causal D64 16 heads S{tokens}", "attention", 2, (16384 // tokens, tokens, 16, 16, 64)) for tokens in (1024, 2048, 4096)),
    ("feed-forward 16384x1024x2816 gated", "feed_forward", 2, (16384, 1024, 2816, 3)),
    ("linear cross entropy 4096x4096x128256", "linear_cross_entropy", 2, (4096, 4096, 128256)),
    ("linear cross entropy 16384x1024x50304", "linear_cross_entropy", 2, (16384, 1024, 50304)),
    ("product 4096x4096x4096", "matmul", 2, (4096, 4096, 4096)),
    ("rms_norm, layer_norm 16384x4096", "norm", 2, (16384, 4096)),
    ("softmax 16384x4096", "softmax", 2, (16384, 4096)),
    ("embedding 16384x1024", "embedding", 2, (16384, 1024)),
    ("cross entropy 16384x50304", "cross_entropy", 2, (16384, 50304)),
    ("rotary 16x1024x16x128", "rotary", 2, (16 * 1024 * 16 * 128,)),
    ("QK-norm and rotary 16x1024x16x128", "norm_rotary", 2, (16 * 1024 * 16 * 128,)),
    ("decoding attention, 8192 cached, 32 sequences, 64/8 heads D128", "decode", 2, (32, 8192, 64, 8, 128)),
    ("AdamW 124 M parameters, fp32 gradients", "adamw", 4, (124_000_000,)),
]
# Dense bf16 TFLOP/s and GB/s of memory, from the makers' data sheets; a suite on the GPU measures its own.
DATASHEET = {"a100": (312.0, 2039.0), "rtx4090": (165.0, 1008.0), "h200": (989.0, 4800.0), "b200": (2250.0, 8000.0)}


def table(gpu: str) -> list[tuple[str, ...]]:
    """Rows (operation, GFLOP, MB, FLOP per byte, least us forward, least us with backward, bound by) for one GPU."""
    tflops, gbps = DATASHEET[gpu]
    rows = []
    for label, op, size, n in SHAPES:
        each = cost(op, size, *n)
        compute, memory = each.flops / tflops / 1e6, each.bytes / gbps / 1e3  # microseconds
        least = max(compute, memory)
        both = "-" if op in ("adamw", "decode") else f"{least * each.with_backward:,.1f}"
        rows.append((
            label, f"{each.flops / 1e9:,.1f}", f"{each.bytes / 1e6:,.1f}", f"{each.flops / each.bytes:,.1f}", f"{least:,.1f}", both,
            "arithmetic" if compute > memory else "memory",
        ))  # fmt: skip
    return rows


def main() -> None:
    from report import print_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="h200", choices=DATASHEET)
    options = parser.parse_args()
    tflops, gbps = DATASHEET[options.gpu]
    print(f"{options.gpu}: {tflops:,.0f} TFLOP/s in bf16, {gbps:,.0f} GB/s, by data sheet; times are the least that any kernel can take")
    print_table(("operation", "GFLOP", "MB", "FLOP/byte", "us forward", "us with backward", "bound by"), table(options.gpu))


if __name__ == "__main__":
    main()
