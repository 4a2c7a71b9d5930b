"""Products with weights of few bits on a GPU: they are read as they are packed, and a row has the same bits beside any others."""

import pytest
import torch
from cllm_kernel_oracle import device  # loaded by conftest.py under this name
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from cllm.kernels.quantization import quantize, quantize4
from cllm.kernels.quantized import quantized_feed_forward, quantized_matmul
from cllm.kernels.triton.quantized import MOST_ROWS

KINDS = pytest.mark.parametrize("kind", [quantize, quantize4], ids=["int8", "int4"])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def packed(kind, columns, depth, seed=1):
    """What is packed on the CPU and then moved, as a model is."""
    return kind(normal(columns, depth, seed=seed)).moved(lambda each: each.to(device()))


@pytest.fixture(autouse=True)
def triton_kernels(serve):
    serve("triton", "quantized")


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(rows=st.sampled_from([1, 5, 20, MOST_ROWS + 3]), depth=st.integers(1, 300), columns=st.integers(1, 70), biased=st.booleans())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_products_agree_with_the_oracle(oracle, kind, dtype, rows, depth, columns, biased):
    x, weight = normal(rows, depth).to(device(), dtype), packed(kind, columns, depth)
    bias = normal(columns, seed=2).to(device()) if biased else None
    wide = weight.dense(torch.float64)
    exact = torch.nn.functional.linear(x.double(), wide, None if bias is None else bias.double())
    plain = torch.nn.functional.linear(x, wide.to(dtype), None if bias is None else bias.to(dtype))
    oracle.check_rule(f"{rows} {depth} {columns}", quantized_matmul(x, weight, bias), plain, exact, float32_slack=4.0)


@KINDS
@pytest.mark.parametrize("gated", [True, False])
def test_rows_of_a_feed_forward_do_not_see_each_other(oracle, kind, gated):
    x = normal(20, 100).to(device(), torch.bfloat16)
    gate, up, down = packed(kind, 130, 100, 1), packed(kind, 130, 100, 2), packed(kind, 90, 130, 3)
    bias = normal(130).to(device())

    def compute(x):
        return quantized_feed_forward(x, gate if gated else None, up, down, activation="silu" if gated else "gelu", b_up=bias)

    whole = compute(x)
    for rows in (slice(0, 1), slice(7, 19), slice(19, 20)):
        assert torch.equal(compute(x[rows]), whole[rows])
    z = x.double() @ up.dense(torch.float64).T + bias.double()
    hidden = torch.nn.functional.silu(x.double() @ gate.dense(torch.float64).T) * z if gated else torch.nn.functional.gelu(z)
    exact = hidden @ down.dense(torch.float64).T
    assert (whole.double() - exact).abs().max() < 0.03 * exact.abs().max()


@KINDS
def test_a_row_that_is_not_finite_spoils_no_other(kind):
    x = normal(3, 200).to(device(), torch.bfloat16)
    x[1, 70] = float("nan")
    y = quantized_matmul(x, packed(kind, 33, 200))
    assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()
