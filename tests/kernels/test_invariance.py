"""Bits that must not change: with the number of threads, with the other rows of a batch, between prefill and decoding."""

import pytest
import torch

from cllm import kernels, runtime


def _wide_cases(oracle):
    """One case of each operation, large enough that a plan gives it several workers."""
    i32 = torch.int32
    return {
        "attention": oracle.attention_case("wide", oracle.qkv(1, 260, 260, 4, 2, 64), causal=True, return_lse=True),
        "attention_packed": oracle.attention_case(
            "packed", oracle.qkv(1, 260, 260, 4, 2, 64), causal=True, cu_seqlens=torch.tensor([0, 100, 101, 260], dtype=i32)
        ),
        "attention_dropout": oracle.attention_dropout_case(
            "wide", oracle.qkv(1, 260, 260, 4, 2, 64), 0.2, cu_seqlens=torch.tensor([0, 100, 130, 260], dtype=i32), causal=True, period=130
        ),
        "norm_dropout": oracle.norm_dropout_case(
            "wide", lambda i: {"x": i.normal(700, 200), "weight": i.normal(200), "residual": i.normal(700, 200)}, 0.2
        ),
        "feed_forward": oracle.feed_forward_case("wide", oracle.gated(96, 200, 150), "silu"),
        "feed_forward_plain": oracle.feed_forward_case("wide_plain", oracle.plain_mlp(96, 200, 150), "gelu"),
        "rms_norm": oracle.rms_norm_case("wide", lambda i: {"x": i.normal(700, 200), "weight": i.normal(200), "residual": i.normal(700, 200)}),
        "layer_norm": oracle.layer_norm_case("wide", lambda i: {"x": i.normal(700, 200), "weight": i.normal(200), "bias": i.normal(200)}),
        "rotary": oracle.rotary_case("wide", (40, 64, 4, 32)),
        "rotary_norm": oracle.rotary_case("wide", (40, 64, 4, 32), norm=oracle.Inputs.master),
        "softmax": oracle.softmax_case("wide", lambda i: i.normal(500, 300)),
        "embedding": oracle.embedding_case("wide", lambda i: i.integers(90, 3000), lambda i: i.normal(90, 100)),
        "cross_entropy": oracle.cross_entropy_case(
            "wide", lambda i: {"logits": i.normal(700, 300), "targets": i.integers(300, 700)}, z_loss=1e-3, label_smoothing=0.1
        ),
        "linear_cross_entropy": oracle.linear_cross_entropy_case(
            "wide", lambda i: {"x": i.normal(300, 64), "weight": i.master(1100, 64), "targets": i.integers(1100, 300)}
        ),
        "linear_cross_entropy_rows": oracle.linear_cross_entropy_case(
            "wide", lambda i: {"x": i.normal(300, 64), "weight": i.master(1100, 64), "targets": i.integers(1100, 300)}, reduction="none"
        ),
        "matmul": oracle.matmul_case("wide", lambda i: {"a": i.normal(300, 300), "b": i.normal(260, 300).T, "bias": i.normal(260)}),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [
        "attention", "attention_packed", "attention_dropout", "norm_dropout", "feed_forward", "feed_forward_plain",
        "rms_norm", "layer_norm", "rotary", "rotary_norm", "softmax",
        "embedding", "cross_entropy", "linear_cross_entropy", "linear_cross_entropy_rows", "matmul",
    ],
)  # fmt: skip
def test_any_number_of_threads_gives_the_same_bits(name, dtype, oracle, serve):
    case = _wide_cases(oracle)[name]
    serve("numba", case.op)
    results = {}
    for threads in (1, 2, 3, 64):
        with runtime.use(threads=threads):
            results[threads] = oracle.run(case, case.ours, dtype, dtype)
    for threads, found in results.items():
        for key, expected in results[1].items():
            assert torch.equal(found[key], expected), f"{case} {key}: {threads} threads and 1 thread differ"


def test_loss_over_many_rows_does_not_depend_on_torch_threads(oracle):
    """torch splits one long sum over its threads: the reduction must not be left to it."""
    losses = oracle.Inputs(torch.float32, torch.float32).normal(200_000)
    from cllm.kernels.torch import fixed_order_sum

    before, sums = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.add(fixed_order_sum(losses).item())
    finally:
        torch.set_num_threads(before)
    assert len(sums) == 1


def test_the_gradient_of_a_norms_weight_repeated_for_many_heads_does_not_depend_on_torch_threads(oracle):
    """A model repeats one weight for all query heads and one for all key heads; autograd leaves the sum over the heads to torch."""
    i = oracle.Inputs(torch.float32, torch.float32)
    q_norm, k_norm, gradient = i.normal(256).requires_grad_(), i.normal(256).requires_grad_(), i.normal(320, 256)
    before, sums = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            repeated = torch.cat((q_norm.expand(256, -1), k_norm.expand(64, -1)))
            sums.append(torch.autograd.grad(repeated, (q_norm, k_norm), gradient))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in sums[1:] for a, b in zip(sums[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_of_a_product_has_the_same_bits_in_any_batch(dtype, oracle, serve):
    serve("numba", "matmul")
    i = oracle.Inputs(dtype, dtype)
    a, weight, bias = i.normal(70, 530), i.master(90, 530), i.master(90)
    whole = kernels.matmul(a, weight.T, bias)
    for rows in (slice(0, 1), slice(33, 34), slice(5, 12), slice(20, 69)):
        assert torch.equal(kernels.matmul(a[rows], weight.T, bias), whole[rows]), rows
    assert torch.equal(kernels.matmul(a, weight.T[:, 7:50], bias[7:50]), whole[:, 7:50]), "columns"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("window", [None, 21])
def test_prefill_and_decoding_give_the_same_bits(dtype, window, oracle, serve):
    serve("numba", "attention")
    i, length, prefix = oracle.Inputs(dtype, dtype), 140, 90
    q, k, v = i.normal(2, length, 4, 32), i.normal(2, length, 2, 32), i.normal(2, length, 2, 32)
    options = {"causal": True, "window": window, "return_lse": True}
    whole, whole_lse = kernels.attention(q, k, v, **options)
    out, lse = kernels.attention(q[:, :prefix], k[:, :prefix], v[:, :prefix], **options)
    assert torch.equal(out, whole[:, :prefix]) and torch.equal(lse, whole_lse[:, :, :prefix])
    cache_k, cache_v = torch.full((2, 200, 2, 32), float("nan"), dtype=dtype), torch.full((2, 200, 2, 32), float("nan"), dtype=dtype)
    for t in range(prefix, length, 7):
        cache_k[:, : t + 1], cache_v[:, : t + 1] = k[:, : t + 1], v[:, : t + 1]
        out, lse = kernels.attention(q[:, t : t + 1], cache_k[:, : t + 1], cache_v[:, : t + 1], **options)
        assert torch.equal(out, whole[:, t : t + 1]) and torch.equal(lse, whole_lse[:, :, t : t + 1]), t
    alone, _ = kernels.attention(q[1:], k[1:], v[1:], **options)
    assert torch.equal(alone, whole[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_of_the_other_operations_do_not_see_each_other(dtype, oracle, serve):
    i = oracle.Inputs(dtype, dtype)
    x, weight, gate, down = i.normal(50, 48), i.normal(48), i.normal(96, 48, scale=0.2), i.normal(48, 96, scale=0.2)
    vocabulary, targets, table = i.master(333, 48), i.integers(333, 50), i.master(1, 4)
    computed = {
        "rms_norm": lambda rows: kernels.rms_norm(x[rows], weight),
        "layer_norm": lambda rows: kernels.layer_norm(x[rows], weight),
        "rotary": lambda rows: kernels.rotary(x[rows].view(-1, 1, 6, 8), table, table, None, weight.view(6, 8)),
        "softmax": lambda rows: kernels.softmax(x[rows]),
        "feed_forward": lambda rows: kernels.feed_forward(x[rows], gate, gate, down),
        "cross_entropy": lambda rows: kernels.cross_entropy(x[rows], targets[rows] % 48, reduction="none"),
        "linear_cross_entropy": lambda rows: kernels.linear_cross_entropy(x[rows], vocabulary, targets[rows], reduction="none"),
    }
    for op, compute in computed.items():
        serve("numba", op)
        whole = compute(slice(None))
        for rows in (slice(0, 1), slice(31, 32), slice(11, 46)):
            assert torch.equal(compute(rows), whole[rows]), f"{op} {rows}"
