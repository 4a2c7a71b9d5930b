"""Grids of blocks: the hardware takes 2^31 - 1 of them along the first dimension and 65,535 along the others."""

import pytest
import torch

pytest.importorskip("triton")

from cllm.kernels.triton import attention, cross_entropy, embedding, feed_forward, linear_cross_entropy, matmul, norm, rotary, softmax
from cllm.kernels.triton.launch import recording
from cllm.runtime.gpu import DESCRIBED, described

MANY = 100_000  # more than 65,535


def empty(*shape: int, of: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=of, device="meta")


def attention_of(batch: int, queries: int, keys: int, heads: int, kv_heads: int, dim: int) -> None:
    q, k = empty(batch, queries, heads, dim), empty(batch, keys, kv_heads, dim)
    options = (True, 0.1, 0, 0.0, None)
    out, lse = attention.forward(q, k, k, *options)
    attention.backward(q, None, q, k, k, out, lse, *options)


def many_rows(rows: int, columns: int) -> None:
    x, weight, one = empty(rows, columns), empty(columns), empty(rows, of=torch.float32)
    softmax.backward(x, softmax.forward(x))
    norm.layer_norm_backward(x, x, *norm.layer_norm_forward(x, weight, weight, 1e-5, x)[1:2], weight, True, one, one)
    cross_entropy.forward(x, empty(rows, of=torch.int64), -100, 0.1, 1e-4, 0.0)
    embedding.backward(embedding.forward(empty(rows, of=torch.int64), empty(50, columns), x.dtype), empty(rows, of=torch.int64), 50, torch.float32)
    matmul.column_sums(x, torch.float32)


def many_heads(batch: int, tokens: int, heads: int) -> None:
    x, table, weight = empty(batch, tokens, heads, 16), empty(tokens, 8), empty(heads, 16)
    rotary.apply(x, table, table, None, False)
    rotary.norm_backward(x, x, weight, rotary.norm_forward(x, weight, 1e-6, table, table, None)[1], table, table, None)


def many_products(rows: int, width: int, hidden: int) -> None:
    x, up, down = empty(rows, width), empty(hidden, width), empty(width, hidden)
    feed_forward.forward(x, up, up, down, "silu", None, None, True)
    matmul.product(x, up.T, None, x.dtype)
    linear_cross_entropy.forward_with_grads(x, up, empty(rows, of=torch.int64), -100, 0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("gpu", DESCRIBED)
@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        (attention_of, (MANY, 40, 40, 1, 1, 16)),  # many sequences
        (attention_of, (1, 40, 40, MANY, MANY, 16)),  # many heads
        (attention_of, (4096, 40, 40, 32, 8, 128)),
        (attention_of, (1, 40, 40, MANY, 1, 16)),
        (attention_of, (1, 64 * MANY, 64 * MANY, 2, 1, 256)),  # many blocks
        (attention_of, (MANY, 1, 5000, 4, 2, 64)),  # decoding
        (attention_of, (2, 4, 512 * MANY, 4, 2, 64)),
        (attention_of, (1, 16, 600, MANY, 1, 64)),
        (many_rows, (40 * MANY, 33)),
        (many_rows, (3, 20 * MANY)),
        (many_heads, (MANY, 3, 2)),
        (many_heads, (2, MANY, 3)),
        (many_heads, (1, 2, MANY)),
        (many_products, (128 * MANY, 32, 48)),
        (many_products, (64, 32, 128 * MANY)),
    ],
)
def test_no_grid_is_longer_than_the_hardware_takes(gpu, call, sizes):
    with described(DESCRIBED[gpu]), recording() as launches:
        call(*sizes)
    assert launches
    for launch in launches:
        first, *others = launch.grid
        assert 0 < first < 2**31 and all(0 < size <= 65_535 for size in others), f"{launch.name}: {launch.grid}"


@pytest.mark.parametrize("queries", [1, 20])
def test_many_heads_and_sequences_are_computed_where_they_belong(oracle, serve, queries):
    """The blocks of all pairs of batch and head follow each other along one dimension of the grid."""
    serve("triton", "attention")
    case = oracle.attention_case("pairs", oracle.qkv(3, queries, 23, 6, 2, 16), causal=True, return_lse=True)
    oracle.check_case(case, torch.float32)
