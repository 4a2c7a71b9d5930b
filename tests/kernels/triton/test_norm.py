"""The Triton kernels of norms, rotary and softmax, where the shared cases do not reach: long rows, many groups of rows, float16, strides, grids."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from cllm import runtime
from cllm.kernels.torch import norm as plain_norm
from cllm.kernels.torch import rotary as plain_rotary
from cllm.kernels.torch import softmax as plain_softmax
from cllm.kernels.triton import norm, rotary, rows, softmax

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = [torch.float32, torch.bfloat16, torch.float16]
ONE_MULTIPROCESSOR = dataclasses.replace(runtime.gpu.INTERPRETED, num_sms=1)


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return values.to(dtype).to(DEVICE)


def _close(found, expected, dtype, roundings=1):
    """To a few roundings of the largest value: both compute in float32, in another order, and round to `dtype` that many times."""
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if theirs is None:
            assert ours is None
            continue
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, index
        largest = theirs.double().abs().max().item() if theirs.numel() else 0.0
        tolerance = 16 * torch.finfo(torch.float32).eps + (roundings * torch.finfo(dtype).eps if ours.dtype == dtype else 0.0)
        torch.testing.assert_close(ours.double(), theirs.double(), atol=tolerance * largest, rtol=0, msg=lambda text, i=index: f"result {i}: {text}")


def _both_norms(x, weight, bias, residual, dtype):
    dy, dh = _draw(*x.shape, dtype=dtype, seed=7), None if residual is None else _draw(*x.shape, dtype=dtype, seed=8)
    found = norm.rms_norm_forward(x, weight, 1e-6, residual)
    expected = plain_norm.rms_norm_forward(x, weight, 1e-6, residual)
    _close(found, expected, dtype)
    what = x if residual is None else expected[1]
    _close(norm.rms_norm_backward(dy, dh, what, weight, expected[2]), plain_norm.rms_norm_backward(dy, dh, what, weight, expected[2]), dtype)
    found = norm.layer_norm_forward(x, weight, bias, 1e-5, residual)
    expected = plain_norm.layer_norm_forward(x, weight, bias, 1e-5, residual)
    _close(found, expected, dtype)
    arguments = dy, dh, what, weight, bias is not None, *expected[2:]
    _close(norm.layer_norm_backward(*arguments), plain_norm.layer_norm_backward(*arguments), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("num_columns", [1, 5, 768, 2049, 8192])
def test_norms_of_every_tile(num_columns, residual, dtype):
    x, weight = _draw(3, 2, num_columns, dtype=dtype), _draw(num_columns, seed=1)
    bias = _draw(num_columns, seed=2) if num_columns != 768 else None
    _both_norms(x, weight, bias, _draw(3, 2, num_columns, dtype=dtype, seed=3) if residual else None, dtype)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("num_columns", [8193, 16_400])
def test_norms_of_long_rows(num_columns, residual):
    x, weight, bias = _draw(2, num_columns, dtype=torch.bfloat16), _draw(num_columns, seed=1), _draw(num_columns, seed=2)
    _both_norms(x, weight, bias, _draw(2, num_columns, dtype=torch.bfloat16, seed=3) if residual else None, torch.bfloat16)


def test_layer_norm_of_long_rows_far_from_zero_keeps_its_variance():
    x = _draw(2, 20_001) + 300.0
    _, _, mean, rstd = norm.layer_norm_forward(x, torch.ones(20_001, device=DEVICE), None, 1e-5, None)
    torch.testing.assert_close(mean.double(), x.double().mean(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(rstd.double(), x.double().var(-1, correction=0).rsqrt(), rtol=1e-5, atol=0)


def test_sums_over_many_groups_of_rows():
    """More rows than one group per block, a ragged last group, and rows that are few in each tile."""
    for num_rows, num_columns in ((1500, 24), (700, 96), (5, 9000)):
        _both_norms(_draw(num_rows, num_columns), _draw(num_columns, seed=1), _draw(num_columns, seed=2), None, torch.float32)


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    batch=st.integers(0, 3), tokens=st.integers(0, 9), heads=st.integers(1, 5), width=st.integers(1, 70), slack=st.integers(0, 3),
    transposed=st.booleans(), dtype=st.sampled_from(HALVES),
)  # fmt: skip
def test_norms_and_softmax_of_slices(batch, tokens, heads, width, slack, transposed, dtype):
    x = _draw(batch, tokens, heads + slack, width + slack, dtype=dtype)[:, :, :heads, slack:]
    x = x.transpose(1, 2) if transposed else x
    residual = _draw(*x.shape[::-1], dtype=dtype, seed=3).permute(3, 2, 1, 0)
    _both_norms(x, _draw(width, seed=1), _draw(width, seed=2), residual, dtype)
    _both_norms(x, _draw(width, seed=1), None, None, dtype)
    _close([softmax.forward(x)], [plain_softmax.forward(x)], dtype)


def test_rows_are_views_where_two_levels_of_strides_reach_them():
    fused = _draw(4, 6, 5, 8)
    for view, levels in ((fused, None), (fused[:, :, 1:3], 2), (fused[:, :, 0], None), (fused[:1, 2:, 1:3, 1:5], 2), (fused[2, 3, 4], None)):
        found = rows.rows_of(view)
        assert found.tensor.data_ptr() == view.data_ptr() and found.inner == levels, view.shape
    for view in (fused[:, 1:, 1:], fused[..., ::2], fused.transpose(1, 3), fused[:, ::2, 1:3].transpose(0, 1)):
        found = rows.rows_of(view)
        for row in (0, 3, 7):
            inner = found.inner or 1
            start = found.tensor.storage_offset() + row // inner * found.outer_stride + row % inner * found.inner_stride
            flat = found.tensor.as_strided((view.shape[-1],), (1,), start)
            assert torch.equal(flat, view.reshape(-1, view.shape[-1])[row])
    assert rows.rows_of(torch.ones(1, 40).expand(9, 40)).outer_stride == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_grid_nor_a_row_on_the_others(dtype):
    x, weight, dy = _draw(300, 80, dtype=dtype), _draw(80, seed=1), _draw(300, 80, dtype=dtype, seed=2)
    y, _, mean, rstd = norm.layer_norm_forward(x, weight, weight, 1e-5, None)
    gradients = norm.layer_norm_backward(dy, None, x, weight, True, mean, rstd)
    with runtime.gpu.described(ONE_MULTIPROCESSOR):
        again = norm.layer_norm_backward(dy, None, x, weight, True, mean, rstd)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again))
    for part in (slice(0, 1), slice(77, 78), slice(31, 260)):
        assert torch.equal(norm.layer_norm_forward(x[part], weight, weight, 1e-5, None)[0], y[part])
        assert torch.equal(norm.layer_norm_backward(dy[part], None, x[part], weight, True, mean[part], rstd[part])[0], gradients[0][part])
        assert torch.equal(softmax.forward(x[part]), softmax.forward(x)[part])


def test_nan_stays_in_its_row_and_in_the_sums():
    x, weight, dy = _draw(40, 20), _draw(20, seed=1), _draw(40, 20, seed=2)
    x[17, 3] = float("nan")
    y, _, rstd = norm.rms_norm_forward(x, weight, 1e-6, None)
    dx, dweight = norm.rms_norm_backward(dy, None, x, weight, rstd)
    for found in (y, dx):
        assert torch.isnan(found).any(-1).nonzero().flatten().tolist() == [17]
    assert torch.isnan(dweight).all()


def test_no_rows_and_no_columns():
    for shape in ((0, 8), (2, 0, 8), (3, 0)):
        x, weight = _draw(*shape), _draw(shape[-1], seed=1)
        y, h, rstd = norm.rms_norm_forward(x, weight, 1e-6, x)
        dx, dweight, dbias = norm.layer_norm_backward(x, x, x, weight, True, rstd, rstd)
        assert y.shape == h.shape == dx.shape == x.shape and not dweight.any() and not dbias.any()
        assert softmax.forward(x).shape == softmax.backward(x, x).shape == x.shape


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("num_columns", [1, 3, 130, 2049, 8193, 17_000, 33_000, 66_000])
def test_softmax_of_every_tile(num_columns, dtype):
    x, dy = _draw(3, num_columns, dtype=dtype, scale=3.0), _draw(3, num_columns, dtype=dtype, seed=1)
    x[1, : num_columns // 2] = float("-inf")
    y = plain_softmax.forward(x.double()).to(dtype)  # float32 sums of a long row differ between processors by more than is allowed here
    _close([softmax.forward(x), softmax.backward(dy, y)], [y, plain_softmax.backward(dy.double(), y.double()).to(dtype)], dtype)


def test_long_softmax_rows_of_infinities_and_nan_are_those_of_torch():
    x = _draw(4, 17_000)
    x[0], x[1, 16_999], x[2, 5] = float("-inf"), float("nan"), float("inf")
    torch.testing.assert_close(softmax.forward(x), torch.softmax(x, -1), equal_nan=True)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    batch=st.integers(0, 3), tokens=st.integers(1, 40), heads=st.integers(1, 18), half=st.integers(1, 66), kind=st.integers(0, 2),
    inverse=st.booleans(), layout=st.integers(0, 2), dtype=st.sampled_from(HALVES),
)  # fmt: skip
def test_rotary_of_any_shape_with_and_without_a_norm(batch, tokens, heads, half, kind, inverse, layout, dtype):
    if layout == 0:
        x = _draw(batch, tokens, heads + 3, 2 * half, dtype=dtype)[:, :, 2 : 2 + heads]  # one part of a fused projection
    elif layout == 1:
        x = _draw(batch, heads, tokens, 2 * half, dtype=dtype).transpose(1, 2)
    else:
        x = _draw(2 * half, 1, tokens, batch, dtype=dtype).permute(3, 2, 1, 0).expand(batch, tokens, heads, 2 * half)
    angles = _draw(50, 2 * half, seed=1)
    cos, sin = angles.cos()[:, ::2], angles.sin()[:, :half]
    generator = torch.Generator().manual_seed(2)
    positions = (None, torch.randint(50, (2 * tokens,), generator=generator)[::2], torch.randint(50, (tokens, batch), generator=generator).T)[kind]
    positions = None if positions is None else positions.to(DEVICE)
    found, expected = rotary.apply(x, cos, sin, positions, inverse), plain_rotary.apply(x, cos, sin, positions, inverse)
    assert found.is_contiguous()
    _close([found], [expected], dtype)
    weight = _draw(heads, 2 * half, seed=4) if inverse else _draw(1, 2 * half, dtype=dtype, seed=4).expand(heads, 2 * half)
    dy, tables = _draw(*x.shape, dtype=dtype, seed=5), (cos, sin, positions)
    expected = plain_rotary.norm_forward(x, weight, 1e-6, *tables)
    _close(rotary.norm_forward(x, weight, 1e-6, *tables), expected, dtype, roundings=2)
    saved = x, weight, expected[1]
    _close(rotary.norm_backward(dy, *saved, *tables), plain_rotary.norm_backward(dy, *saved, *tables), dtype, roundings=2)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_head_behind_a_norm_has_the_same_bits_among_any_others(dtype):
    x, weight, dy = _draw(2, 50, 11, 24, dtype=dtype), _draw(11, 24, seed=1), _draw(2, 50, 11, 24, dtype=dtype, seed=2)
    angles = _draw(50, 12, seed=3)
    tables = angles.cos(), angles.sin(), None
    y, rstd = rotary.norm_forward(x, weight, 1e-6, *tables)
    dx, dweight = rotary.norm_backward(dy, x, weight, rstd, *tables)
    _close((dx, dweight), plain_rotary.norm_backward(dy, x, weight, rstd, *tables), dtype, roundings=2)
    for heads in (slice(0, 8), slice(8, 11), slice(4, 5)):  # queries and keys of one call in training, of two in generation
        part = rotary.norm_forward(x[:1, :40, heads], weight[heads], 1e-6, *tables)
        assert torch.equal(part[0], y[:1, :40, heads]) and torch.equal(part[1], rstd[:1, :40, heads])
        dy_part, rstd_part = dy[:, :, heads].contiguous(), rstd[:, :, heads].contiguous()
        dx_part, dweight_part = rotary.norm_backward(dy_part, x[:, :, heads], weight[heads], rstd_part, *tables)
        assert torch.equal(dx_part, dx[:, :, heads])
        torch.testing.assert_close(dweight_part, dweight[heads], rtol=1e-5, atol=1e-4)


def test_sums_behind_a_norm_run_over_many_groups_of_tokens_whatever_the_grid():
    tokens = 8300  # 130 groups of 64, more than are added up at once
    x, weight, dy = _draw(1, tokens, 1, 24), _draw(1, 24, seed=1), _draw(1, tokens, 1, 24, seed=2)
    angles = _draw(tokens, 12, seed=3)
    tables = angles.cos(), angles.sin(), None
    rstd = plain_rotary.norm_forward(x, weight, 1e-6, *tables)[1]
    found = rotary.norm_backward(dy, x, weight, rstd, *tables)
    _close(found, plain_rotary.norm_backward(dy, x, weight, rstd, *tables), torch.float32, roundings=2)
    with runtime.gpu.described(ONE_MULTIPROCESSOR):
        again = rotary.norm_backward(dy, x, weight, rstd, *tables)
    assert torch.equal(again[0], found[0]) and torch.equal(again[1], found[1])


def test_rotary_at_a_position_outside_the_table_is_nan():
    x, table = _draw(1, 4, 2, 8), _draw(10, 4, seed=1)
    found = rotary.apply(x, table, table, torch.tensor([0, 10, -1, 9], device=DEVICE), False)
    assert torch.isnan(found).all(-1).all(-1).tolist() == [[False, True, True, False]]
