"""Triton's interpreter as CLLM makes it quicker: types and shapes that are made once change no number, and what was refused is refused."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton
import triton.language as tl

import cllm.kernels.triton.launch  # noqa: F401  repairs the interpreter

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a GPU runs the kernels here")


@pytest.fixture(autouse=True, scope="module")
def overflows_are_errors():
    builder = triton.runtime.interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
        yield


@triton.jit
def arithmetic_kernel(x, y, sums, differences, products, N: tl.constexpr):
    place = tl.arange(0, N)
    a, b = tl.load(x + place), tl.load(y + place)
    tl.store(sums + place, a + b)
    tl.store(differences + place, a - b)
    tl.store(products + place, a * b)


def arithmetic(a: list[int], b: list[int], dtype: torch.dtype) -> list[list[int]]:
    x, y = torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype)
    results = [torch.zeros_like(x) for _ in range(3)]
    arithmetic_kernel[(1,)](x, y, *results, N=len(a))
    return [result.tolist() for result in results]


@given(st.sampled_from((torch.int16, torch.int32, torch.int64)), st.data())
def test_whole_numbers_are_exact_or_refused(dtype, data):
    info = torch.iinfo(dtype)
    most = info.max if dtype != torch.int64 else 2**31
    numbers = st.one_of(st.integers(-most, most), st.integers(-300, 300), st.sampled_from((info.min if dtype != torch.int64 else -most, most)))
    a, b = data.draw(st.lists(numbers, min_size=4, max_size=4)), data.draw(st.lists(numbers, min_size=4, max_size=4))
    exact = [[p + q for p, q in zip(a, b, strict=True)], [p - q for p, q in zip(a, b, strict=True)], [p * q for p, q in zip(a, b, strict=True)]]
    if all(info.min <= value <= info.max for row in exact for value in row):
        assert arithmetic(a, b, dtype) == exact
    else:
        with pytest.raises(Exception, match=rf"int{info.bits} overflow detected for operation (add|sub|mul)"):
            arithmetic(a, b, dtype)


@triton.jit
def outer_kernel(x, y, out, M: tl.constexpr, N: tl.constexpr, ROW: tl.constexpr):
    """Broadcasts a column against a row, a vector against a matrix, and a number against a block."""
    column = tl.load(x + tl.arange(0, M))[:, None]
    row = tl.load(y + tl.arange(0, N))
    both = (column - row[None, :]) * ROW + row
    tl.store(out + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], both + 1)


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 8), (8, 1), (4, 8), (16, 16)])
def test_blocks_are_broadcast_as_torch_does(rows, columns):
    x, y = torch.randn(rows), torch.randn(columns)
    out = torch.empty(rows, columns)
    outer_kernel[(1,)](x, y, out, M=rows, N=columns, ROW=3)
    assert torch.equal(out, (x[:, None] - y) * 3 + y + 1)


@triton.jit
def shapes_kernel(out, M: tl.constexpr, N: tl.constexpr):
    tl.store(out + tl.arange(0, M), tl.arange(0, M) + tl.arange(0, N))


@triton.jit
def filled_kernel(out, M: tl.constexpr, N: tl.constexpr):
    block = tl.zeros((M, N), tl.float32)
    tl.static_assert(block.shape[0] == M and block.shape[1] == N and block.numel == M * N)
    tl.store(out + tl.arange(0, M), tl.sum(block + 1, axis=1))


def test_blocks_that_do_not_fit_are_refused():
    out = torch.zeros(64)
    with pytest.raises(Exception, match="incompatible dimensions"):
        shapes_kernel[(1,)](out, M=4, N=8)
    for _ in range(2):  # what was refused is not remembered as a shape
        with pytest.raises(Exception, match="power of 2"):
            filled_kernel[(1,)](out, M=4, N=3)
        filled_kernel[(1,)](out, M=4, N=16)
    assert out[:5].tolist() == [16, 16, 16, 16, 0]
