"""What each operation must do at least: floating-point operations and bytes from and to memory, by formula. All reports count by this table.

A multiply-add is two operations. Bytes count every input once and every output once. `with_backward` is the factor for forward and backward
together: 3 for matrix products (two more products for the two gradients), by bytes for the rest. Recomputation is not counted: it is our cost, not
the task's.
"""

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
    if op == "adamw":  # parameters: the gradient twice (norm, update), weight and moments read and written
        return Cost(12.0 * n[0], (2 * size + 24.0) * n[0], 1.0)
    raise ValueError(f"no formula for {op!r}")
