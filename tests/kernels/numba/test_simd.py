"""The vector operations of kernels/numba/simd.py: accuracy against float64, special values, edges of memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import PATIENCE
from numba import njit

from cllm.kernels.numba import simd
from cllm.kernels.numba.simd import W, vload, vload_masked, vstore, vstore_masked

SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 1e-45, 3e38, -3e38, 200.0, -200.0, 88.8, -103.5, -104.5, 128.0]


def _ulps(found, exact):
    """Distance from float64 values in units of the last place of float32; values that agree as infinities count 0."""
    with np.errstate(all="ignore"):
        rounded = exact.astype(np.float32)
        distance = np.abs(found.astype(np.float64) - exact) / np.spacing(np.abs(rounded)).astype(np.float64)
    return np.where((found == rounded) | (np.isnan(found) & np.isnan(rounded)), 0.0, distance)


def _mapped(op):
    @njit
    def apply(x, y):
        for i in range(0, x.size, W):
            vstore_masked(y, i, op(vload_masked(x, i, x.size - i)), x.size - i)

    def run(x):
        y = np.full_like(x, 7.0)
        apply(x, y)
        return y

    return run


def _float64(name):
    return lambda x: getattr(torch, name)(torch.from_numpy(x.astype(np.float64))).numpy()


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("exp", -104.0, 88.7), ("exp2", -149.5, 127.9), ("tanh", -12.0, 12.0), ("erf", -5.0, 5.0), ("log", -103.0, 88.0)],
)
def test_elementary_functions_are_within_two_units_in_the_last_place(name, low, high):
    x = np.linspace(low, high, 200_003)
    x = (np.exp(x) if name == "log" else x).astype(np.float32)
    run, exact = _mapped(getattr(simd, f"v{name}")), _float64(name)
    assert _ulps(run(x), exact(x)).max() <= 2.0
    special = np.array(SPECIAL, np.float32)
    assert _ulps(run(special), exact(special)).max() <= 2.0


def test_powers_within_the_normal_range_and_reciprocals():
    """What attention and the activations are made of: shorter ways, on the range that they need."""
    x = np.linspace(-126.0, 126.9, 300_003).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    assert _ulps(_mapped(simd.vexp2_normal)(x), exact).max() <= 3.0
    assert np.abs(_mapped(simd.vexp2_coarse)(x) / exact - 1.0).max() < 4e-6
    for op in (simd.vexp2_normal, simd.vexp2_coarse):
        found = _mapped(op)(np.array([np.nan, -np.inf, -126.5, -1e30, 0.0, -1.0, 3.0], np.float32))
        assert np.isnan(found[0]) and found[1:].tolist() == [0.0, 0.0, 0.0, 1.0, 0.5, 8.0]
    negative = np.linspace(-87.0, 1.0, 200_003).astype(np.float32)
    exact = np.exp(negative.astype(np.float64))
    assert (_ulps(_mapped(simd.vexp_normal)(negative), exact) <= 3.0 + 1.25 * np.abs(negative)).all()
    x = np.concatenate([np.exp2(x), -np.exp2(x[::7])]).astype(np.float32)
    assert _ulps(_mapped(simd.vreciprocal)(x), 1.0 / x.astype(np.float64)).max() <= 1.0


def test_rounding_by_the_cpus_own_instruction_differs_in_denormal_numbers_alone():
    @njit
    def run(x, to):
        for i in range(0, x.size, W):
            simd.vstore_flushed(to.ctypes.data, i, vload(x, i))

    generator = np.random.default_rng(0)
    x = generator.integers(0, 1 << 32, 64 * W * 16, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x[:4] = np.inf, -np.inf, 1e-40, -1e-40
    found = np.zeros(x.size, np.uint16)
    run(x, found)
    expected = torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()
    normal = ~(np.abs(x) < 1.2e-38) & ~np.isnan(x)
    np.testing.assert_array_equal(found[normal], expected[normal])
    values = torch.from_numpy(found).view(torch.bfloat16)
    assert values[torch.from_numpy(np.isnan(x))].isnan().all() and (values[torch.from_numpy(np.abs(x) < 1.1e-38)].abs() < 1.2e-38).all()


def test_maximum_and_minimum_say_what_they_do_with_nan():
    @njit
    def run(a, b, out):
        x, y = vload(a, 0), vload(b, 0)
        vstore(out, 0, simd.vmax(x, y))
        vstore(out, W, simd.vmin(x, y))
        vstore(out, 2 * W, simd.vmax_nan(x, y))
        vstore(out, 3 * W, simd.vmin_nan(x, y))
        return simd.vhmax(x), simd.vhmax(y)

    a, b = np.arange(W, dtype=np.float32), np.full(W, 1.5, np.float32)
    a[0], b[1] = np.nan, np.nan
    out = np.empty(4 * W, np.float32)
    largest = run(a, b, out)
    both = np.isnan(a) | np.isnan(b)
    np.testing.assert_array_equal(out[:W], np.where(both, b, np.maximum(a, b)))
    np.testing.assert_array_equal(out[W : 2 * W], np.where(both, b, np.minimum(a, b)))
    np.testing.assert_array_equal(out[2 * W : 3 * W], np.maximum(a, b))
    np.testing.assert_array_equal(out[3 * W :], np.minimum(a, b))
    assert np.isnan(largest).all()


def test_masked_access_touches_exactly_the_first_n():
    @njit
    def run(x, y, half, n):
        vstore_masked(y, W, vload_masked(x, 0, n), n)
        simd.vstore_bf16_masked(half, W, vload_masked(x, 0, n), n)
        vstore(x, W, simd.vload_bf16_masked(half, W, W))

    for n in (-3, 0, 1, W - 1, W, W + 5, 1 << 40):
        x, y, half = np.arange(1, 2 * W + 1, dtype=np.float32), np.zeros(3 * W, np.float32), np.zeros(3 * W, np.uint16)
        run(x, y, half, n)
        expected = np.where(np.arange(W) < n, np.arange(1, W + 1), 0)
        np.testing.assert_array_equal(y, np.concatenate([np.zeros(W), expected, np.zeros(W)]))
        np.testing.assert_array_equal(x[W:], expected)
        assert not half[:W].any() and not half[2 * W :].any()


def test_bfloat16_conversion_rounds_as_torch_and_keeps_nan():
    @njit
    def run(x, half, back):
        for i in range(0, x.size, W):
            vstore(half, i, vload(x, i))
            simd.vstore_bf16(half, i, vload(x, i))
            vstore(back, i, simd.vload_bf16(half, i))
        for i in range(x.size):
            if half[i] != simd.f32_to_bf16(x[i]) or not (back[i] == simd.bf16_to_f32(half[i]) or back[i] != back[i]):
                return i
        return -1

    bits = np.random.default_rng(0).integers(0, 1 << 32, 64 * W, dtype=np.uint32)
    bits[:6] = [0x7F800001, 0xFFFFFFFF, 0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x00000001]
    x = bits.view(np.float32)
    half, back = np.empty(x.size, np.uint16), np.empty_like(x)
    assert run(x, half, back) == -1
    expected = torch.from_numpy(x).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(back, expected)


def test_horizontal_sum_has_a_fixed_tree_order():
    @njit
    def run(x):
        return simd.vhsum(vload(x, 0))

    x = (10.0 ** np.random.default_rng(1).uniform(-4, 4, W)).astype(np.float32)
    tree = x.copy()
    while tree.size > 1:
        tree = tree[: tree.size // 2] + tree[tree.size // 2 :]
    assert run(x) == tree[0]


def test_comparisons_and_selection():
    @njit
    def run(a, b, out):
        x, y = vload(a, 0), vload(b, 0)
        for i, m in enumerate((simd.vgt(x, y), simd.vge(x, y), simd.vlt(x, y), simd.vle(x, y), simd.veq(x, y))):
            vstore(out, i * W, simd.vselect(m, x, y))
        vstore(out, 5 * W, simd.vselect(simd.visnan(x), y, x))
        vstore(out, 6 * W, simd.vselect(simd.vlanes_below(2), x, y))
        return simd.vany(simd.vgt(x, y)), simd.vany(simd.vgt(x, x))

    a, b = np.arange(W, dtype=np.float32), np.full(W, 1.0, np.float32)
    a[3] = np.nan
    out = np.empty(7 * W, np.float32)
    assert run(a, b, out) == (True, False)
    rows = (a > b, a >= b, a < b, a <= b, a == b, ~np.isnan(a), np.arange(W) < 2)
    for i, m in enumerate(rows):
        np.testing.assert_array_equal(out[i * W : (i + 1) * W], np.where(m, a, b))


def test_narrower_vectors_pass_the_same_tests(tmp_path):
    """The code for AVX2, compiled and run here: 8 lanes, without AVX-512 instructions."""
    if W != 16:
        pytest.skip(f"this CPU already uses {W} lanes")
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "CLLM_SIMD_LANES": "8",
        "CLLM_CACHE_DIR": str(tmp_path),
        "NUMBA_CACHE_DIR": str(tmp_path / "numba"),
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt,+sse4.2",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", "not narrower",
               *(str(here / f"test_{name}.py") for name in ("simd", "gemm", "attention"))]  # fmt: skip
    done = subprocess.run(command, cwd=here.parents[2], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
