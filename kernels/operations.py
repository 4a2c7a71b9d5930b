"""The operations that a backend can serve: the file that holds each in a backend's folder, the inputs it takes, and how much work it is.

Work is floating-point operations, or bytes moved where that is more. It decides how many workers share a call, and it is counted here alone: the
kernels, `runtime.plan` and `runtime.explain` all ask for it by the operation's name. A count takes the shapes of the inputs, the size of an
activation in bytes, and by name whatever else changes it; `backward` is the gradient's.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cllm.runtime as runtime
from cllm.runtime.errors import UserError

Shapes = tuple[tuple[int, ...], ...]

PAGE = 128
"""Tokens of a page of keys and values. The CPU kernels walk over blocks of as many keys, so that a block never lies in two pages."""


class Operation(NamedTuple):
    file: str
    """The module in each backend's folder."""
    inputs: str
    """What `work` takes as shapes, in words."""
    work: Callable[..., float]
    example: Shapes
    """Shapes of a model of about a hundred million parameters, which `cllm doctor` asks about."""


def _elements(shapes: Shapes) -> int:
    (shape,) = shapes
    return math.prod(shape)


def visible_pairs(num_queries: Any, num_keys: Any, causal: bool, window: int | None) -> Any:
    """Pairs of a query and a key that it sees: `num_queries` (an int or an integer array) are the last positions of `num_keys`.

    Query t sees the keys up to its own position when causal, and with a window only so many before. Both bounds are clipped to the keys, so their
    sums over t are differences of triangular numbers.
    """

    def triangular(n: Any) -> Any:  # 1 + 2 + ... + n, and 0 below
        return n * (n + 1) // 2 * (n > 0)

    before = num_keys - num_queries
    pairs = triangular(num_keys) - triangular(before) if causal else num_queries * num_keys
    return pairs - (triangular(num_keys - window) - triangular(before - window) if window else 0)


def first_page(num_keys: Any, num_queries: Any, window: int) -> Any:
    """The first page of a sequence (ints), or of several (integer arrays), that one of its last `num_queries` positions sees; window 0: none."""
    first = (num_keys - num_queries - window + 1) // PAGE
    return first * (first > 0) * bool(window)


def _attention(
    shapes: Shapes, itemsize: int, *, causal: bool = False, window: int | None = None, pairs: int | None = None, backward: bool = False
) -> float:
    """Two products forward, five backward. `pairs`: the visible pairs of all packed documents of a batch."""
    (batch, num_queries, num_heads, head_dim), (_, num_keys, _, _) = shapes if len(shapes) == 2 else (*shapes, *shapes)
    if pairs is None:
        pairs = batch * visible_pairs(num_queries, num_keys, causal, window)
    return (10.0 if backward else 4.0) * num_heads * head_dim * pairs


def _cached_attention(shapes: Shapes, itemsize: int) -> float:
    """All keys and values of the cache are read, once; the host does not know how many of them are seen."""
    _, (batch, num_places, num_kv_heads, head_dim) = shapes
    return 2.0 * batch * num_places * num_kv_heads * head_dim * itemsize


def _paged_attention(shapes: Shapes, itemsize: int, *, pairs: int | None = None) -> float:
    """Two products of each query with each key that it sees. Without `pairs` one query sees each place of the pool: decoding that fills it."""
    (_, num_heads, head_dim), (num_pages, page, _, _) = shapes
    return 4.0 * num_heads * head_dim * (num_pages * page if pairs is None else pairs)


def _matmul(shapes: Shapes, itemsize: int) -> float:
    """Of the product itself: a gradient is a product of other shapes."""
    (*rows, depth), (num_rows, num_columns) = shapes
    if depth != num_rows:
        raise UserError(f"matmul: a has {depth} columns and b {num_rows} rows. They must be the same.")
    return 2.0 * math.prod(rows) * depth * num_columns


def _quantized(shapes: Shapes, itemsize: int) -> float:
    (*rows, depth), (num_outputs, num_columns) = shapes
    if depth != num_columns:
        raise UserError(f"quantized: x has {depth} columns and the weight {num_columns}. They must be the same.")
    return 2.0 * math.prod(rows) * depth * num_outputs


def _feed_forward(shapes: Shapes, itemsize: int, *, gated: bool = True, backward: bool = False, recompute: bool = False) -> float:
    """Two products, three when gated; each has two gradients, and with `recompute` is made once more before them."""
    (*rows, embed), (hidden, num_columns) = shapes
    if embed != num_columns:
        raise UserError(f"feed_forward: x has {embed} columns and w_up {num_columns}. They must be the same.")
    times = (3.0 if recompute else 2.0) if backward else 1.0
    return times * 2.0 * (3.0 if gated else 2.0) * math.prod(rows) * embed * hidden


def _linear_cross_entropy(shapes: Shapes, itemsize: int, *, gradients: bool = False) -> float:
    """The logits, and the two gradients where they are asked for."""
    (*rows, embed), (vocabulary, num_columns) = shapes
    if embed != num_columns:
        raise UserError(f"linear_cross_entropy: x has {embed} columns and the weight {num_columns}. They must be the same.")
    return (6.0 if gradients else 2.0) * math.prod(rows) * embed * vocabulary


def _cross_entropy(shapes: Shapes, itemsize: int, *, backward: bool = False) -> float:
    """The logits are read twice forward; they are read and their gradient is written backward."""
    return 2.0 * _elements(shapes) * itemsize


def _softmax(shapes: Shapes, itemsize: int, *, backward: bool = False) -> float:
    return (3.0 if backward else 2.0) * _elements(shapes) * itemsize


def _norm(shapes: Shapes, itemsize: int, *, residual: bool = False, backward: bool = False) -> float:
    """With a residual one tensor more is read and one more is written."""
    return (4.0 if backward or residual else 2.0) * _elements(shapes) * itemsize


def _rotary(shapes: Shapes, itemsize: int, *, backward: bool = False) -> float:
    """`backward` is that of the norm before the rotation; the rotation alone is turned back by another rotation."""
    return (4.0 if backward else 2.0) * _elements(shapes) * itemsize


def _embedding(shapes: Shapes, itemsize: int, *, backward: bool = False) -> float:
    """A row for each token; the gradient also writes the whole table, in float32 as a rule."""
    tokens, (num_rows, num_columns) = shapes
    rows = math.prod(tokens) * num_columns * itemsize
    return float(rows + 4 * num_rows * num_columns) if backward else 2.0 * rows


def _adamw(shapes: Shapes, itemsize: int, *, update: bool = True) -> float:
    """Seven float32 numbers move for each parameter; only the gradient where it is measured and nothing is updated."""
    return (28.0 if update else 4.0) * sum(map(math.prod, shapes))


OPERATIONS = {
    "attention": Operation("attention", "q (B, T, H, D) and, where they are others, k (B, S, Hkv, D)", _attention, ((1, 1024, 12, 64),)),
    "attention_dropout": Operation("attention_dropout", "q (B, T, H, D) and, where others, k (B, S, Hkv, D)", _attention, ((1, 1024, 12, 64),)),
    "cached_attention": Operation(
        "cached_attention", "q (B, 1, H, D) and keys (B, S, Hkv, D)", _cached_attention, ((1, 1, 12, 64), (1, 1024, 12, 64))
    ),
    "paged_attention": Operation("paged_attention", "q (N, H, D) and keys (P, 128, Hkv, D)", _paged_attention, ((16, 12, 64), (128, 128, 12, 64))),
    "feed_forward": Operation("feed_forward", "x (..., E) and w_up (F, E)", _feed_forward, ((1024, 768), (3072, 768))),
    "rms_norm": Operation("norm", "x (..., E)", _norm, ((1024, 768),)),
    "layer_norm": Operation("norm", "x (..., E)", _norm, ((1024, 768),)),
    "norm_dropout": Operation("norm_dropout", "x (..., E)", _norm, ((1024, 768),)),
    "rotary": Operation("rotary", "x (B, T, H, D)", _rotary, ((1, 1024, 12, 64),)),
    "softmax": Operation("softmax", "x (..., E)", _softmax, ((1024, 768),)),
    "embedding": Operation("embedding", "tokens (...) and weight (V, E)", _embedding, ((1024,), (50304, 768))),
    "cross_entropy": Operation("cross_entropy", "logits (..., V)", _cross_entropy, ((1024, 50304),)),
    "linear_cross_entropy": Operation("linear_cross_entropy", "x (..., E) and weight (V, E)", _linear_cross_entropy, ((1024, 768), (50304, 768))),
    "matmul": Operation("matmul", "a (..., K) and b (K, N)", _matmul, ((1024, 768), (768, 3072))),
    "quantized": Operation("quantized", "x (..., K) and weight (N, K)", _quantized, ((1, 768), (3072, 768))),
    "adamw": Operation("adamw", "each parameter", _adamw, ((3072, 768),)),
}

for _name, _operation in OPERATIONS.items():
    runtime.register_operation(_name, _operation.work, _operation.inputs, _operation.example)
