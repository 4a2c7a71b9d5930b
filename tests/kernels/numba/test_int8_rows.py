"""Rows of int8 in kernels: the bits of `quantize_rows` and `dequantize_rows`, and what these lose."""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("numba")

from cllm.kernels.numba.fields import fields
from cllm.kernels.numba.int8_rows import dequantize_rows as dequantize
from cllm.kernels.numba.int8_rows import quantize_row
from cllm.kernels.numba.launch import Kernel, is_half
from cllm.kernels.quantization import dequantize_rows, quantize_rows


class _Row(NamedTuple):
    x: int
    back: int
    half: int
    dim: int
    values: int
    scales: int


P, _row = fields(_Row)


def _there_and_back(p, f, task, worker):
    values, size = p[P.values] + task * p[P.dim], p[P.dim] * (2 if p[P.half] else 4)
    quantize_row(p[P.x] + task * size, p[P.half], p[P.dim], values, p[P.scales] + task * 4)
    dequantize(values, p[P.dim], p[P.scales] + task * 4, 4, 1, p[P.dim], p[P.half], p[P.back] + task * size)


_kernel = Kernel(_there_and_back)


def rows(dim: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(9, dim, generator=torch.Generator().manual_seed(dim))
    x[1], x[2], x[3] = 0.0, x[2] * 1e-41, x[3] * 1e-38
    x[4] = torch.arange(dim) % 3 - 0.5  # halves, once the largest is 127
    x[4, 0] = 127.0
    x[5, -1], x[6, 0], x[7, dim // 2] = torch.nan, torch.inf, -torch.inf
    x[8] = torch.where(x[8] > 0, 3e38, -3e38)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dim", [1, 20, 64])
def test_kernels_store_and_read_the_bits_of_the_definition(dtype, dim):
    x = rows(dim, dtype)
    values, scales = torch.full((len(x), dim), 99, dtype=torch.int8), torch.empty(len(x))
    back = torch.empty_like(x)
    addresses = {"x": x.data_ptr(), "back": back.data_ptr(), "values": values.data_ptr(), "scales": scales.data_ptr()}
    _kernel(len(x), 1, _row(**addresses, half=is_half(x), dim=dim))
    expected, of_rows = quantize_rows(x)
    assert torch.equal(values, expected) and torch.equal(scales.nan_to_num(-1.0), of_rows.nan_to_num(-1.0))
    assert torch.equal(back.nan_to_num(-1.0), dequantize_rows(expected, of_rows, dtype).nan_to_num(-1.0))


def test_an_element_is_off_by_half_a_step_at_most_and_a_damaged_row_shows():
    x = rows(64, torch.float32)
    back = dequantize_rows(*quantize_rows(x), torch.float64)
    whole = x.isfinite().all(1)
    assert whole.tolist() == [True] * 5 + [False] * 3 + [True]
    half_a_step = x[whole].double().abs().amax(1, keepdim=True) / 254 * (1 + 1e-6) + 1e-45
    assert ((back[whole] - x[whole]).abs() <= half_a_step).all()
    assert back[~whole].isnan().all()
