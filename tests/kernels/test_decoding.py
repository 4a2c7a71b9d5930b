"""Products of a few rows that read the weights in place, and int8 weights: the bits of gemm.py, and the float64 oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import runtime
from cllm.kernels.quantization import SCALE_BLOCK, SCALE_GROUP, quantize, quantize4
from cllm.kernels.quantized import quantized_feed_forward, quantized_matmul
from cllm.kernels.strips import pack
from cllm.runtime.errors import UserError

gemm = pytest.importorskip("cllm.kernels.numba.gemm").gemm
from cllm.kernels.numba import matvec  # noqa: E402

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@DTYPES
@given(rows=st.integers(1, matvec.MOST_ROWS), depth=st.integers(1, 700), columns=st.integers(1, 150), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_a_few_rows_get_the_bits_of_a_packed_product(dtype, rows, depth, columns, seed):
    x, weight, bias = normal(rows, depth, seed=seed).to(dtype), normal(columns, depth, seed=seed + 1), normal(columns)
    for stored in (weight, weight.to(dtype), weight.to(dtype).T.contiguous().T):
        expected = gemm(x, stored.T, bias=bias)
        for workers in (1, 3):
            assert torch.equal(matvec.matvec(x, stored, bias, workers), expected), (stored.dtype, stored.stride(), workers)


@DTYPES
@given(rows=st.integers(1, 70), depth=st.integers(1, 700), columns=st.integers(1, 150), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_weights_in_strips_give_the_bits_of_the_matrix(dtype, rows, depth, columns, seed):
    x, weight, bias = normal(rows, depth, seed=seed).to(dtype), normal(columns, depth, seed=seed + 1).to(dtype), normal(columns)
    strips = pack(weight, dtype)
    expected = gemm(x, weight.T, bias=bias)
    assert torch.equal(gemm(x, strips.t(), bias=bias), expected), "many rows"
    begin, end = columns // 3, columns // 3 + (columns + 1) // 2
    assert torch.equal(strips.dense(dtype), weight) and torch.equal(strips.rows(begin, end).dense(dtype), weight[begin:end])
    for workers in (1, 3):
        assert torch.equal(matvec.matvec(x[: matvec.MOST_ROWS], strips, bias, workers), expected[: matvec.MOST_ROWS]), workers
    if dtype == torch.bfloat16:
        assert torch.equal(gemm(x.float(), strips.t()), gemm(x.float(), weight.T)), "float32 activations"


@DTYPES
def test_long_sums_and_strided_operands_get_the_bits_of_a_packed_product(dtype):
    for depth in (4096, 4097, 9000):
        x, weight = normal(3, 2 * depth).to(dtype)[:, :depth], normal(70, depth + 5, seed=1).to(dtype)[::2, 5:]
        assert torch.equal(matvec.matvec(x, weight), gemm(x, weight.T)), depth
        strips = pack(weight, dtype)
        assert torch.equal(matvec.matvec(x, strips), gemm(x, weight.T)) and torch.equal(gemm(x, strips.t()), gemm(x, weight.T)), depth


@pytest.mark.parametrize("rows", [1, 4, 7, 64])
def test_int8_products_are_sums_of_exact_integers(rows, monkeypatch):
    """The definition in Python's integers; and where the CPU multiplies tiles of int8, its other instructions give the same bits."""
    depth, columns = 300, 50
    x, weight = normal(rows, depth).bfloat16(), quantize(normal(columns, depth, seed=1))
    x[0, :64], x[-1, 70] = 0, 1e4
    blocks = torch.nn.functional.pad(x.float(), (0, -depth % SCALE_BLOCK)).unflatten(1, (-1, SCALE_BLOCK))
    largest = blocks.abs().amax(2)
    inverse = torch.where(largest < 1e-33, 0.0, 32512 / largest)
    integers = (blocks * inverse[..., None]).round().to(torch.int64)  # (rows, blocks, SCALE_BLOCK)
    values = weight.values.permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)[:columns].to(torch.int64)
    scales = weight.scales.transpose(1, 2).flatten(0, 1)[:columns]
    exact = torch.einsum("mbk,nbk->mnb", integers.double(), values.double())  # integers below 2**53
    total = torch.zeros(rows, columns, dtype=torch.float64)
    for block in range(exact.shape[2]):
        scale = (scales[:, block] * (largest[:, block, None] / 32512)).double()
        total = (exact[:, :, block].float().double() * scale + total).float().double()
    found = matvec.matvec(x, weight, None, 2)
    close = (found.double() - total).abs() <= 2.0**-8 * total.abs() + 1e-6 * total.abs().max()  # one rounding to bfloat16
    assert close.all() and (found == total.bfloat16()).float().mean() > 0.99
    monkeypatch.setenv("CLLM_BF16_KERNEL", "widened")
    assert torch.equal(matvec.matvec(x, weight, None, 2), found)


def test_nan_and_infinity_reach_their_row_only():
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = normal(3, 200).to(dtype), quantize(normal(33, 200))
        x[1, 70] = float("nan")
        y = quantized_matmul(x, weight)
        assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()
        x[1, 70] = float("inf")
        assert not quantized_matmul(x, weight)[1].isfinite().any()


@DTYPES
@pytest.mark.parametrize("quantize", [quantize, quantize4], ids=["int8", "int4"])
def test_products_of_integers_are_as_close_to_the_oracle_as_plain_torch(dtype, oracle, quantize):
    for backend_name in ("numba", "torch"):
        for rows, depth, columns in ((1, 64, 16), (5, 333, 37), (100, 640, 50), (1, 9000, 20), (2, 1, 1)):
            x, quantized, bias = normal(rows, depth).to(dtype), quantize(normal(columns, depth, seed=1)), normal(columns).to(dtype)
            weight = quantized.dense(torch.float64)
            exact = x.double() @ weight.T + bias.double()
            plain = torch.nn.functional.linear(x, weight.to(dtype), bias)
            with runtime.use(backend=backend_name):
                found = quantized_matmul(x, quantized, bias)
            # The scales are float32, so the oracle's own weights are products of 32 bits: two roundings of float32 more.
            oracle.check_rule(f"{backend_name} {rows} {depth} {columns}", found, plain, exact, float32_slack=4.0)


@DTYPES
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("quantize", [quantize, quantize4], ids=["int8", "int4"])
def test_feed_forward_rows_do_not_see_each_other_or_the_workers(dtype, gated, quantize):
    x = normal(2, 70, 100).to(dtype)
    gate, up, down = quantize(normal(130, 100, seed=1) / 10), quantize(normal(130, 100, seed=2) / 10), quantize(normal(100, 130, seed=3) / 10)

    def compute(x):
        return quantized_feed_forward(x, gate if gated else None, up, down, activation="silu" if gated else "gelu", b_up=normal(130))

    with runtime.use(backend="numba"):
        whole = compute(x)
        for rows in (slice(0, 1), slice(9, 27), slice(69, 70)):
            for threads in (1, 64):
                with runtime.use(threads=threads):
                    assert torch.equal(compute(x[:, rows]), whole[:, rows]), (rows, threads)
    with runtime.use(backend="torch"):
        assert torch.allclose(compute(x).float(), whole.float(), rtol=0.05, atol=0.05)


@given(rows=st.integers(1, 70), depth=st.integers(1, 200), power=st.integers(-30, 30))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_quantised_weights_are_within_half_a_step(rows, depth, power):
    weight = normal(rows, depth) * 2.0**power
    quantized = quantize(weight)
    assert quantized.shape == (rows, depth)
    found = quantized.dense(torch.float64)
    for first in range(0, depth, SCALE_BLOCK):
        block, again = weight[:, first : first + SCALE_BLOCK].double(), found[:, first : first + SCALE_BLOCK]
        step = block.abs().amax(1, keepdim=True) / 127
        assert ((block - again).abs() <= 0.5001 * step).all()
    begin, end = rows // 3, rows // 3 + (rows + 1) // 2
    assert torch.equal(quantized.rows(begin, end).dense(torch.float64), found[begin:end])


@given(rows=st.integers(1, 70), depth=st.integers(1, 200), power=st.integers(-30, 30))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_four_bits_are_no_worse_than_the_largest_at_minus_eight(rows, depth, power):
    """In squared error, of every group of a row: GGUF's q4_0 with a scale of bfloat16."""
    weight = normal(rows, depth) * 2.0**power
    quantized = quantize4(weight)
    found = quantized.dense(torch.float64)
    for first in range(0, depth, SCALE_GROUP):
        group, again = weight[:, first : first + SCALE_GROUP], found[:, first : first + SCALE_GROUP]
        scale = (group.gather(1, group.abs().argmax(1, keepdim=True)) / -8).bfloat16().float()
        plain = (group / scale).round().clamp(-8, 7).double() * scale.double()
        assert ((group - again).square().sum(1) <= 1.001 * (group - plain).square().sum(1)).all()
    begin, end = rows // 3, rows // 3 + (rows + 1) // 2
    assert torch.equal(quantized.rows(begin, end).dense(torch.float64), found[begin:end])
    assert torch.equal(quantize4(found).dense(torch.float64), found), "what it can say it says again"


@pytest.mark.parametrize("quantize", [quantize, quantize4], ids=["int8", "int4"])
def test_what_cannot_be_quantised_is_refused(quantize):
    for wrong in (torch.ones(3), torch.ones(3, 3, dtype=torch.int64), torch.full((2, 2), float("nan"))):
        with pytest.raises(UserError, match="quantize"):
            quantize(wrong)
    with pytest.raises(UserError, match="do not fit"):
        quantized_matmul(torch.ones(2, 5), quantize(torch.ones(3, 4)))
    assert not quantize(torch.zeros(3, 4)).dense(torch.float32).any()
