"""The matrix product of kernels/numba/gemm.py and what is composed from it: exactness, strides, and bits that never move."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import runtime
from cllm.kernels.numba import feed_forward, gemm, linear_cross_entropy, sums
from cllm.kernels.numba.gemm import FP32, PAIRS, TILES, WIDENED, Packed
from cllm.runtime.errors import BackendError

F32, BF16 = torch.float32, torch.bfloat16
KERNELS = [FP32, WIDENED] + ([PAIRS] if gemm.HAS_PAIRS else []) + ([TILES] if gemm.HAS_TILES else [])


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    if request.param != FP32:
        monkeypatch.setenv("CLLM_BF16_KERNEL", request.param)
    return request.param


def _dtype(kernel):
    return F32 if kernel == FP32 else BF16


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _views(t):
    """The same matrix in several memory layouts."""
    rows, columns = t.shape
    wide = torch.full((rows + 3, columns + 5), float("nan"), dtype=t.dtype)
    sliced = wide[2 : 2 + rows, 3 : 3 + columns].copy_(t)
    return {
        "rows": t.contiguous(),
        "columns": t.t().contiguous().t(),
        "sliced": sliced,
        "stepped": _stepped(t),
    }


def _stepped(t):
    rows, columns = t.shape
    wide = torch.full((2 * rows, 3 * columns), float("nan"), dtype=t.dtype)
    return wide[::2, ::3].copy_(t)


def _assert_close(found, a, b, compute, extra=None):
    a, b = a.to(compute).double(), b.to(compute).double()
    exact, magnitude = a @ b, a.abs() @ b.abs()
    if extra is not None:
        exact, magnitude = exact + extra.double(), magnitude + extra.double().abs()
    rounding = 2.0**-8 if found.dtype == BF16 else 2.0**-24
    bound = 2.0**-24 * (4 + a.shape[1] ** 0.5) * magnitude + rounding * exact.abs()
    assert ((found.double() - exact).abs() <= bound).all()


SHAPES = [(1, 1, 1), (1, 33, 50), (5, 7, 9), (17, 64, 48), (37, 300, 203), (130, 515, 97), (530, 70, 210)]


def test_product_is_exact_for_odd_shapes(kernel):
    dtype = _dtype(kernel)
    for rows, depth, columns in SHAPES:
        a, b, bias = _random(rows, depth).to(dtype), _random(depth, columns, seed=1).to(dtype), _random(columns, seed=2)
        _assert_close(gemm.gemm(a, b, out_dtype=F32), a, b, dtype)
        _assert_close(gemm.gemm(a, b, bias=bias), a, b, dtype, bias)


def test_memory_layout_does_not_change_a_bit(kernel):
    dtype = _dtype(kernel)
    a, b = _random(45, 67).to(dtype), _random(67, 83, seed=1).to(dtype)
    expected = gemm.gemm(a, b, out_dtype=F32)
    for a_view in _views(a).values():
        for b_view in _views(b).values():
            assert torch.equal(gemm.gemm(a_view, b_view, out_dtype=F32), expected)
    across = torch.empty(83, 45).t()
    gemm.gemm(a, b, out=across)
    assert torch.equal(across, expected)
    row = gemm.gemm(a[:1].expand(45, 67), b, out_dtype=F32)
    assert torch.equal(row, expected[:1].expand(45, 83))


def test_operands_of_the_other_dtype_are_converted_while_packing(kernel):
    dtype = _dtype(kernel)
    other = F32 if dtype == BF16 else BF16
    a, b = _random(40, 50).to(dtype), _random(50, 60, seed=1).to(other)
    for a_view, b_view in ((a, b), (a.t().contiguous().t(), b.t().contiguous().t()), (_stepped(a), _stepped(b))):
        assert torch.equal(gemm.gemm(a_view, b_view, out_dtype=F32), gemm.gemm(a, b.to(dtype), out_dtype=F32))
    mixed = gemm.gemm(b.t(), a.t(), out_dtype=F32, compute=dtype)
    assert torch.equal(mixed, gemm.gemm(b.t().to(dtype), a.t(), out_dtype=F32))


def test_an_element_depends_on_its_row_and_column_only(kernel):
    """Workers, neighbours, tile edges, packing before or during: same bits. 4,200 deep, so that K has two parts."""
    dtype = _dtype(kernel)
    a, b = _random(600, 4200).to(dtype), _random(4200, 250, seed=1).to(dtype)
    expected = gemm.gemm(a, b, out_dtype=F32, workers=1)
    _assert_close(expected, a, b, dtype)
    for workers in (2, 3, 64):
        assert torch.equal(gemm.gemm(a, b, out_dtype=F32, workers=workers), expected)
    for rows in (slice(0, 1), slice(599, 600), slice(7, 40), slice(100, 613)):
        assert torch.equal(gemm.gemm(a[rows], b, out_dtype=F32), expected[rows])
    assert torch.equal(gemm.gemm(a[:20], b[:, 33:34], out_dtype=F32), expected[:20, 33:34])
    assert torch.equal(gemm.gemm(a, Packed(b, dtype, 2), out_dtype=F32, workers=2), expected)
    assert torch.equal(gemm.gemm(b.t(), a.t(), out_dtype=F32).t(), expected)
    assert torch.equal(gemm.gemm(a, b, out_dtype=BF16), expected.to(BF16))


@pytest.mark.parametrize("depth", [1, 33, 256, 600, 1100, 5000])
@pytest.mark.parametrize("out_dtype", [F32, BF16])
@pytest.mark.parametrize(("biased", "adding"), [(False, False), (True, False), (False, True), (True, True)])
def test_whole_and_ragged_tiles_have_the_same_bits(kernel, depth, out_dtype, biased, adding):
    """Whole tiles are written in another way on AMX: while the next ones are computed."""
    rows, columns, dtype = 96, 128, _dtype(kernel)
    a, b, bias = _random(rows + 1, depth).to(dtype), _random(depth, columns + 1, seed=1).to(dtype), _random(columns + 1, seed=2)
    add = _random(rows + 1, columns + 1, seed=3)
    ragged = gemm.gemm(a, b, out_dtype=out_dtype, bias=bias if biased else None, add=add if adding else None)
    a, b, bias, add = a[:rows], b[:, :columns], bias[:columns], add[:rows, :columns].contiguous()
    whole = gemm.gemm(a, b, out_dtype=out_dtype, bias=bias if biased else None, add=add if adding else None)
    assert torch.equal(whole, ragged[:rows, :columns])
    if not (biased and adding):  # two roundings more
        _assert_close(whole, a, b, dtype, add * adding + bias * biased)


def test_adding_to_what_is_there(kernel):
    dtype = _dtype(kernel)
    a, b, start = _random(33, 4100).to(dtype), _random(4100, 40, seed=1).to(dtype), _random(33, 40, seed=2)
    total = gemm.gemm(a, b, out=start.clone(), add=start)
    _assert_close(total, a, b, dtype, start)
    place = start.clone()
    gemm.gemm(a, b, out=place, add=place)
    assert torch.equal(place, total)
    assert torch.equal(gemm.gemm(a, b, add=start, out_dtype=BF16), total.to(BF16))


def test_packing_large_operands_in_pieces_does_not_change_a_bit(kernel, monkeypatch):
    dtype = _dtype(kernel)
    a, b = _random(1200, 64).to(dtype), _random(64, 500, seed=1).to(dtype)
    expected = gemm.gemm(a, b, out_dtype=F32)
    monkeypatch.setattr(gemm, "PACK_BYTES", 1 << 14)
    assert torch.equal(gemm.gemm(a, b, out_dtype=F32), expected)


def test_the_work_space_lives_until_the_workers_are_done(monkeypatch):
    """That of very many workers is too large to be kept between calls."""
    taken, run = [], gemm._run

    def take(name, size):
        space = torch.empty(size, dtype=torch.uint8)
        taken.append(weakref.ref(space))
        return space

    def checked(p, workers):
        assert taken and all(space() is not None for space in taken)
        run(p, workers)

    monkeypatch.setattr(gemm._buffers, "take", take)
    monkeypatch.setattr(gemm, "_run", checked)
    a, b = _random(100, 70), _random(70, 90, seed=1)
    _assert_close(gemm.gemm(a, b), a, b, F32)


def test_empty_and_non_finite_inputs(kernel):
    dtype = _dtype(kernel)
    assert gemm.gemm(torch.empty(0, 4, dtype=dtype), torch.empty(4, 3, dtype=dtype)).shape == (0, 3)
    nothing = gemm.gemm(torch.empty(2, 0, dtype=dtype), torch.empty(0, 3, dtype=dtype), bias=torch.ones(3))
    assert torch.equal(nothing, torch.ones(2, 3, dtype=dtype))
    a, b = torch.ones(3, 5, dtype=dtype), torch.ones(5, 4, dtype=dtype)
    a[1, 2], b[0, 3] = float("inf"), float("nan")
    found = gemm.gemm(a, b)
    assert torch.equal(torch.isnan(found), torch.arange(4).expand(3, 4) == 3)
    assert torch.isinf(found[1, :3]).all() and torch.isfinite(found[::2, :3]).all()


def test_a_bfloat16_kernel_that_the_cpu_lacks_is_an_error(monkeypatch):
    monkeypatch.setenv("CLLM_BF16_KERNEL", "abacus")
    with pytest.raises(BackendError, match="abacus"):
        gemm.gemm(torch.ones(2, 2, dtype=BF16), torch.ones(2, 2, dtype=BF16))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_composed_operations_do_not_depend_on_workers(dtype, monkeypatch):
    """Several row blocks, with edges; feed-forward and linear cross entropy, forward and backward."""
    monkeypatch.setattr(feed_forward, "_HIDDEN_BYTES", 1 << 12)
    monkeypatch.setattr(linear_cross_entropy, "_LOGIT_BYTES", 1 << 15)
    x, dy = _random(300, 24).to(dtype), _random(300, 24, seed=1).to(dtype)
    gate, up, down, b_up, b_down = (_random(*s, seed=3) for s in ((40, 24), (40, 24), (24, 40), (40,), (24,)))
    vocabulary = _random(75, 24, seed=4)
    targets = torch.arange(300) % 75
    targets[::9] = -100

    def results(workers):
        for module in (feed_forward, linear_cross_entropy):
            monkeypatch.setattr(module, "num_workers", lambda *_, **__: workers)
        found = [*feed_forward.forward(x, gate, up, down, "silu", b_up, b_down, True)]
        again = feed_forward.backward(dy, x, gate, up, down, "silu", b_up, b_down, None, None)
        found += feed_forward.backward(dy, x, gate, up, down, "silu", b_up, b_down, *found[1:3])
        assert all(torch.equal(kept, made) for kept, made in zip(found[3:], again))
        found += linear_cross_entropy.forward_with_grads(x, vocabulary, targets, -100, 0.1, 1e-3, 20.0, 1 / 300)
        return found

    expected = results(1)
    for workers in (2, 3, 64):
        for found, wanted in zip(results(workers), expected):
            assert torch.equal(found, wanted)
    part = feed_forward.forward(x[100:103], gate, up, down, "silu", b_up, b_down, False)
    assert torch.equal(part[0], expected[0][100:103]) and part[1:] == (None, None)
    alone = linear_cross_entropy.forward(x[50:61], vocabulary, targets[50:61], -100, 0.1, 1e-3, 20.0)
    for found, wanted in zip(alone, expected[9:13]):
        assert torch.equal(found, wanted[50:61])


def test_a_strided_weight_serves_feed_forward():
    x = _random(20, 24)
    up, down = _random(24, 40, seed=1), _random(40, 24, seed=2)
    expected = feed_forward.forward(x, None, up.t().contiguous(), down.t().contiguous(), "gelu_tanh", None, None, False)[0]
    assert torch.equal(feed_forward.forward(x, None, up.t(), down.t(), "gelu_tanh", None, None, False)[0], expected)


def test_vocabulary_statistics_of_hard_rows():
    """Ties go to the lowest index; overflow, one column, and rows without a target behave."""
    weight = torch.eye(4)
    x = torch.tensor([[2.0, 2.0, 1.0, 0.0], [2.0, 2.0, 1.0, 0.0], [1e30, 0.0, 0.0, 0.0], [0.0, float("nan"), 0.0, 0.0]])
    targets = torch.tensor([0, 1, 0, 1])
    losses, plain, correct, lse = linear_cross_entropy.forward(x, weight, targets, -100, 0.0, 0.0, 0.0)
    assert correct.tolist() == [True, False, True, False]
    assert plain[2] == 0.0 and lse[2] == torch.tensor(1e30) and torch.isnan(losses[3])
    one = linear_cross_entropy.forward(x[:2], weight[:1], torch.tensor([0, -100]), -100, 0.0, 0.0, 0.0)
    assert one[0].tolist() == [0.0, 0.0] and one[2].tolist() == [True, False]


@given(rows=st.integers(0, 700), columns=st.integers(1, 150), half=st.booleans())
@settings(deadline=None, max_examples=25, derandomize=True)
def test_column_sums_are_those_of_float64_for_any_number_of_workers(rows, columns, half):
    x = _random(rows, columns).to(BF16 if half else F32)
    with runtime.use(threads=1):
        found = sums.column_sums(x, F32)
    wanted = x.double().sum(0)
    assert (found.double() - wanted).abs().max() <= 1e-6 * (1 + x.double().abs().sum(0).max())
    with runtime.use(threads=5):
        assert torch.equal(sums.column_sums(x, F32), found)
    assert torch.equal(sums.column_sums(x[:, ::2], F32), found[::2])
