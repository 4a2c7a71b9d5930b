"""AdamW on the GPU: the Triton kernels against the reference, what the device decides alone, and the CUDA C++ compiled without a GPU."""

import contextlib
import ctypes
import importlib.machinery
import shutil
import site
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from cllm import runtime
from cllm.kernels.torch import adamw as reference
from cllm.kernels.triton import adamw, adamw_cuda
from cllm.runtime.errors import UserError

# The interpreter computes with numpy, which warns of the NaN and infinities that these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 5000), (8192,), (7,), (0, 4), (130, 67), (2, 3, 4)]
DECAYS = [0.1, 0.0, 0.3, 0.0, 0.1, 0.0]
# (loss_scale_inverse, loss scale) whose quotient, which multiplies the gradients, is not finite
NONFINITE_FACTORS = [(float("nan"), 1.0), (float("inf"), 1.0), (float("-inf"), 8.0), (1.0, float("nan")), (1.0, 0.0), (0.0, 0.0)]
HYPER = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6}


def _draw(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).float().to(DEVICE)


def _sets():
    params = [_draw(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    params[4] = params[4].T.contiguous().T  # dense, in another order
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    return params, moments


def _grads(seed: int, mixed: bool = True) -> list[torch.Tensor]:
    grads = [_draw(*shape, seed=100 * seed + i) for i, shape in enumerate(SHAPES)]
    return [g.to(dtype) for g, dtype in zip(grads, (torch.float32, torch.bfloat16, torch.float16) * 2)] if mixed else grads


def _hyper(max_norm=1.0, inverse=1.0, skip=1.0, interval=0.0) -> torch.Tensor:
    return torch.tensor([*HYPER.values(), max_norm, inverse, skip, interval], dtype=torch.float32, device=DEVICE)


def _close(found: list[torch.Tensor], expected: list[torch.Tensor], rtol: float = 2e-6) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-7)


def _reference_step(params, grads, moments, step, max_norm=1.0):
    return reference.step(params, [g.float() for g in grads], *moments, *HYPER.values(), DECAYS, step, max_norm, True)


@pytest.mark.parametrize("unaligned", [False, True])
def test_step_is_that_of_the_reference(unaligned):
    ours, theirs = _sets(), _sets()
    if unaligned:  # views into one buffer, as a flat bucket of gradients or weights gives them
        ours = [torch.empty(p.numel() + 1, device=DEVICE)[1:].view(p.shape).copy_(p) for p in ours[0]], ours[1]
    for step in (1, 2, 3):
        grads = _grads(step)
        stats = adamw.step(ours[0], grads, *ours[1], *HYPER.values(), DECAYS, step, 1.0, True)
        torch.testing.assert_close(stats, _reference_step(theirs[0], grads, theirs[1], step), rtol=2e-7, atol=0)
    _close(ours[0], theirs[0])
    _close(ours[1][0] + ours[1][1], theirs[1][0] + theirs[1][1])


def test_tensors_with_holes_are_updated():
    base, grad = _draw(40, 6), _draw(40, 3, seed=5)
    ours, theirs = base.clone(), base.clone()
    moments = [[torch.zeros(40, 3, device=DEVICE)] for _ in range(4)]
    adamw.step([ours[:, ::2]], [grad], *moments[:2], *HYPER.values(), [0.1], 1, 1.0, True)
    reference.step([theirs[:, ::2]], [grad], *moments[2:], *HYPER.values(), [0.1], 1, 1.0, True)
    _close([ours], [theirs])
    assert torch.equal(ours[:, 1::2], base[:, 1::2])


def test_the_device_counts_updates_and_skips():
    (params, moments), (expected, expected_moments) = _sets(), _sets()
    halves = [torch.empty_like(p, dtype=torch.bfloat16 if i % 2 else torch.float16) for i, p in enumerate(params)]
    fused, stats = adamw.Fused(params, *moments, DECAYS, halves), torch.empty(3, device=DEVICE)
    for step in range(1, 4):
        bad = _grads(step)
        bad[1][8191] = float("inf")
        before = [t.clone() for t in (*params, *moments[0], *moments[1], *halves)]
        fused.step(bad, _hyper(), stats)
        assert stats[2] == 1 and torch.isinf(stats[:2]).all()
        assert all(torch.equal(a, b) for a, b in zip(before, (*params, *moments[0], *moments[1], *halves)))
        fused.step(_grads(step), _hyper(), stats)
        _reference_step(expected, _grads(step), expected_moments, step)
        assert fused.state.tolist() == [step, 1.0, 0.0, step]
    _close(params, expected, rtol=1e-5)  # betas in float32 here, in float64 there
    assert all(torch.equal(half, param.to(half.dtype)) for half, param in zip(halves, params))


def test_without_skipping_the_damage_is_done_and_counted():
    params, moments = _sets()
    fused, stats, grads = adamw.Fused(params, *moments, DECAYS), torch.empty(3, device=DEVICE), _grads(1, mixed=False)
    grads[0][0, 0] = float("nan")
    fused.step(grads, _hyper(max_norm=0.0, skip=0.0), stats)
    assert torch.isnan(stats[:2]).all() and stats[2] == 1 and fused.state.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert torch.isnan(params[0][0, 0]) and torch.isfinite(params[0]).sum() == params[0].numel() - 1


@pytest.mark.parametrize("inverse, loss_scale", NONFINITE_FACTORS)
@pytest.mark.parametrize("gradient", ["zero", "finite"])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_loss_factor_that_is_not_finite_changes_no_weight(inverse, loss_scale, gradient, max_norm):
    """A loss that is not finite reaches AdamW as a factor of NaN, also when every gradient is 0: so it is before the update is captured."""
    params, moments = _sets()
    halves = [torch.empty_like(p, dtype=torch.bfloat16) for p in params]
    fused, stats = adamw.Fused(params, *moments, DECAYS, halves), torch.empty(3, device=DEVICE)
    fused.state[1] = loss_scale
    grads = _grads(1) if gradient == "finite" else [torch.zeros_like(g) for g in _grads(1)]
    before = [t.clone() for t in (*params, *moments[0], *moments[1], *halves)]
    fused.step(grads, _hyper(max_norm=max_norm, inverse=inverse), stats)
    assert all(torch.equal(a, b) for a, b in zip(before, (*params, *moments[0], *moments[1], *halves)))
    assert fused.state[[0, 3]].tolist() == [0.0, 1.0]


def test_a_loss_factor_that_is_not_finite_counts_as_an_overflow_of_the_loss_scale():
    params, moments = _sets()
    fused, stats = adamw.Fused(params, *moments, DECAYS), torch.empty(3, device=DEVICE)
    fused.state[1], fused.state[2] = 1024.0, 2.0
    fused.step(_grads(1), _hyper(inverse=float("nan"), interval=3.0), stats)
    assert fused.state.tolist() == [0.0, 512.0, 0.0, 1.0]


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_good_steps():
    params, moments = _sets()
    fused, stats = adamw.Fused(params, *moments, DECAYS), torch.empty(3, device=DEVICE)
    fused.state[1] = 1024.0
    scales = []
    for step in range(7):
        grads = [g * fused.state[1] for g in _grads(step, mixed=False)]
        if step == 1:
            grads[4][0, 0] = float("inf")
        fused.step(grads, _hyper(interval=3.0), stats)
        scales.append(fused.state[1].item())
        if step != 1:
            flat = torch.cat([g.flatten() for g in _grads(step, mixed=False)]).double()
            torch.testing.assert_close(stats[:2].double(), torch.stack([flat.norm(), flat.abs().max()]), rtol=1e-6, atol=0)
    assert scales == [1024.0, 512.0, 512.0, 512.0, 1024.0, 1024.0, 1024.0]
    assert fused.state.tolist() == [6.0, 1024.0, 2.0, 1.0]
    fused.state[1] = adamw.LARGEST_SCALE
    for _ in range(3):
        fused.step(_grads(1, mixed=False), _hyper(interval=1.0), stats)
    assert fused.state[1] == adamw.LARGEST_SCALE


def test_an_inverse_scale_divides_gradients_and_statistics():
    (params, moments), (scaled, scaled_moments) = _sets(), _sets()
    stats, scaled_stats = torch.empty(3, device=DEVICE), torch.empty(3, device=DEVICE)
    adamw.Fused(params, *moments, DECAYS).step(_grads(1, mixed=False), _hyper(), stats)
    adamw.Fused(scaled, *scaled_moments, DECAYS).step([8 * g for g in _grads(1, mixed=False)], _hyper(inverse=0.125), scaled_stats)
    torch.testing.assert_close(stats, scaled_stats, rtol=1e-6, atol=0)
    _close(params, scaled)


def test_sets_of_tensors_are_remembered_and_forgotten():
    adamw._sets.clear()
    for _ in range(2):
        for size in range(10):
            params, moments = [torch.ones(size + 1, device=DEVICE)], [[torch.zeros(size + 1, device=DEVICE)] for _ in range(2)]
            adamw.step(params, [torch.ones(size + 1, device=DEVICE)], *moments, *HYPER.values(), [0.0], 1, 0.0, True)
            torch.testing.assert_close(params[0], torch.full_like(params[0], 0.99), rtol=1e-5, atol=0)
    assert len(adamw._sets) <= 8


def test_tensors_that_do_not_fit_are_refused():
    p = [torch.zeros(4, 4)]
    with pytest.raises(UserError, match="lists of one length"):
        adamw.Fused(p, p, p, [])
    with pytest.raises(UserError, match="strides"):
        adamw.Fused(p, [torch.zeros(4, 4).T], p, [0.0])
    with pytest.raises(UserError, match="without holes"):
        adamw.Fused([torch.zeros(4, 8)[:, ::2]], *[[torch.zeros(4, 8)[:, ::2]]] * 2, [0.0])
    with pytest.raises(UserError, match="half copy"):
        adamw.Fused(p, p, p, [0.0], p)
    fused = adamw.Fused(p, p, p, [0.0])
    with pytest.raises(UserError, match="a gradient is"):
        fused.step([torch.zeros(4)], _hyper(), torch.zeros(3))
    with pytest.raises(UserError, match="hyper must be"):
        fused.step(p, torch.zeros(3), torch.zeros(3))


# ---- the CUDA C++ ---------------------------------------------------------------------------------------------------------------------

ARCHITECTURES = (80, 89, 90, 100)
ON_THE_HOST = r"""
#include <cmath>
#include <cstring>
#define __device__
static float float_of(unsigned int bits) { float value; std::memcpy(&value, &bits, 4); return value; }
static unsigned int bits_of(float value) { unsigned int bits; std::memcpy(&bits, &value, 4); return bits; }
static float float16_to_float(unsigned short bits) { return (float)bits; }  // an instruction on the GPU
static unsigned short float_to_float16(float value) { return (unsigned short)value; }
"""
ENTRIES = r"""
extern "C" void update_all(int n, const float* g, float* p, float* m, float* v, const double* c, double decay) {
  Update u = {(float)c[GRAD_SCALE], (float)c[KEEP1], (float)(1.0 - c[KEEP1]), (float)c[KEEP2], (float)(1.0 - c[KEEP2]), (float)c[ROOT],
              (float)c[EPSILON], (float)c[STEP_SIZE], (float)(1.0 - c[RATE] * decay)};
  for (int i = 0; i < n; ++i) update_element(g[i], p[i], m[i], v[i], u);
}
extern "C" void round_all(int n, const float* values, unsigned short* halves) {
  for (int i = 0; i < n; ++i) halves[i] = float_to_half(values[i], BFLOAT16);
}
extern "C" void finish_all(double total, float largest, long long bad, const double* hyper, double* state, double* c, float* stats) {
  finish(total, largest, bad, hyper, state, c, stats);
}
"""


class NVRTCError(Exception):
    pass


class NVRTC:
    """`cupy.cuda.nvrtc` over the library itself, which compiles without a GPU; CuPy needs a driver to be imported. Remembers the options."""

    NVRTCError = NVRTCError

    def __init__(self, library: ctypes.CDLL, supported: tuple[int, ...] = ARCHITECTURES) -> None:
        self.library, self.supported, self.options = library, supported, ()

    def getSupportedArchs(self) -> tuple[int, ...]:
        return self.supported

    def createProgram(self, text: str, name: str, headers: tuple[str, ...], include_names: tuple[str, ...]) -> ctypes.c_void_p:
        program = ctypes.c_void_p()
        assert not headers and not include_names
        assert self.library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None) == 0
        return program

    def compileProgram(self, program: ctypes.c_void_p, options: tuple[str, ...]) -> None:
        self.options = options
        if self.library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options))):
            raise NVRTCError("NVRTC_ERROR_COMPILATION")

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        assert getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
        text = ctypes.create_string_buffer(size.value)
        assert getattr(self.library, f"nvrtcGet{what}")(program, text) == 0
        return text.raw

    def getCUBIN(self, program: ctypes.c_void_p) -> bytes:
        self.ptx = self._text(program, "PTX").decode()
        return self._text(program, "CUBIN")

    def getPTX(self, program: ctypes.c_void_p) -> bytes:
        return self._text(program, "PTX")

    def getProgramLog(self, program: ctypes.c_void_p) -> str:
        return self._text(program, "ProgramLog").decode()

    def destroyProgram(self, program: ctypes.c_void_p) -> None:
        assert self.library.nvrtcDestroyProgram(ctypes.byref(program)) == 0


@pytest.fixture(scope="module")
def nvrtc() -> ctypes.CDLL:
    for folder in (*site.getsitepackages(), site.getusersitepackages()):
        for library in sorted(Path(folder).glob("nvidia/*/lib/libnvrtc.so.*")):
            return ctypes.CDLL(str(library))
    try:
        return ctypes.CDLL("libnvrtc.so")
    except OSError:
        pytest.skip("NVRTC is not here (pip install nvidia-cuda-nvrtc)")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_cuda_source_compiles_and_keeps_denormal_numbers(arch, nvrtc):
    compiler = NVRTC(nvrtc)
    assert adamw_cuda.compile(compiler, arch).startswith(b"\x7fELF")
    assert "fma.rn.f32" in compiler.ptx and "div.rn.f32" in compiler.ptx and ".ftz" not in compiler.ptx


def test_a_gpu_newer_than_nvrtc_gets_ptx(nvrtc):
    assert b".target sm_80" in adamw_cuda.compile(NVRTC(nvrtc, (75, 80)), 90)


def test_a_source_that_does_not_compile_is_told_with_nvrtcs_log(nvrtc, monkeypatch):
    monkeypatch.setattr(adamw_cuda, "source", lambda: "this is not CUDA")
    with pytest.raises(RuntimeError, match=r"NVRTC_ERROR_COMPILATION: .*adamw\.cu\(1\)"):
        adamw_cuda.compile(NVRTC(nvrtc), 90)


def test_the_cuda_source_does_not_spill(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not here")
    for arch in ARCHITECTURES:
        (tmp_path / "adamw.cu").write_text(adamw_cuda.source())
        command = ["nvcc", "-cubin", f"-arch=sm_{arch}", "-std=c++17", *adamw_cuda.OPTIONS[1:], "-Xptxas", "-v", "adamw.cu", "-o", "adamw.cubin"]
        built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        assert built.stderr.count("0 bytes spill stores, 0 bytes spill loads") == 4, built.stderr


def test_cupy_is_handed_what_nvrtc_made_of_our_options_and_no_others(monkeypatch):
    """CuPy's own compilation appends -ftz=true: what it is given must be compiled already."""
    given = []

    class Recorder:
        NVRTCError = NVRTCError

        def __getattr__(self, name):
            answers = {"getSupportedArchs": (75, 80, 90), "createProgram": "program", "getCUBIN": b"a cubin"}
            return lambda *arguments: given.append((name, *arguments)) or answers.get(name)

    class Module:
        def load(self, code):
            given.append(("load", code))

        def get_function(self, name):
            return name

    cuda = types.SimpleNamespace(nvrtc=Recorder(), Device=lambda index: contextlib.nullcontext(), function=types.SimpleNamespace(Module=Module))
    cupy = types.ModuleType("cupy")
    cupy.__spec__, cupy.cuda = importlib.machinery.ModuleSpec("cupy", None), cuda
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with runtime.gpu.described(runtime.gpu.DESCRIBED["h200"]):
        functions = adamw_cuda._functions.__wrapped__(0)
    assert set(functions) == {"measure", "finish_float32", "finish_float64", "update"}
    (options,) = [call[2] for call in given if call[0] == "compileProgram"]
    assert options == ("--gpu-architecture=sm_90", *adamw_cuda.OPTIONS)
    assert [each for each in options if "ftz" in each] == ["--ftz=false"]
    assert ("load", b"a cubin") in given and given[-2] == ("destroyProgram", "program")


@pytest.fixture(scope="module")
def on_the_host(tmp_path_factory) -> ctypes.CDLL:
    """The arithmetic of the CUDA source, compiled for the CPU."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler is here")
    folder = tmp_path_factory.mktemp("adamw")
    (folder / "adamw.cpp").write_text(ON_THE_HOST + adamw_cuda.constants() + adamw_cuda.ARITHMETIC + ENTRIES)
    command = [compiler, "-O2", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "adamw.cpp", "-o", "adamw.so"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(folder / "adamw.so"))


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _finish_on_the_host(library, total, largest, bad, hyper, state):
    coefficients, stats = np.zeros(len(adamw.COEFFICIENTS)), np.zeros(3, np.float32)
    sums = ctypes.c_double(total), ctypes.c_float(largest), ctypes.c_longlong(bad)
    library.finish_all(*sums, *map(_pointer, (hyper, state, coefficients, stats)))
    return coefficients, stats


def test_the_cuda_arithmetic_is_that_of_the_reference(on_the_host):
    param, avg, avg_sq = _draw(5000).cpu(), torch.zeros(5000), torch.zeros(5000)
    p, m, v = param.numpy().copy(), np.zeros(5000, np.float32), np.zeros(5000, np.float32)
    hyper, state = np.array([*HYPER.values(), 1.0, 1.0, 1.0, 0.0]), np.array([0.0, 1.0, 0.0, 0.0])
    for step in (1, 2, 3):
        grad = _draw(5000, seed=step).cpu()
        g = grad.numpy()
        expected = reference.step([param], [grad], [avg], [avg_sq], *HYPER.values(), [0.1], step, 1.0, True)
        coefficients, stats = _finish_on_the_host(on_the_host, float(np.square(g.astype(np.float64)).sum()), np.abs(g).max(), 0, hyper, state)
        on_the_host.update_all(5000, _pointer(g), _pointer(p), _pointer(m), _pointer(v), _pointer(coefficients), ctypes.c_double(0.1))
        torch.testing.assert_close(torch.from_numpy(stats), expected, rtol=2e-7, atol=0)
    assert state.tolist() == [3.0, 1.0, 0.0, 0.0]
    _close([torch.from_numpy(t) for t in (p, m, v)], [param, avg, avg_sq])


@pytest.mark.parametrize("bad", [0, 3])
@pytest.mark.parametrize("interval", [0.0, 2.0])
@pytest.mark.parametrize("total", [0.0, 4.0, float("inf"), float("nan")])
@pytest.mark.parametrize("inverse, loss_scale", [(0.25, 64.0), *NONFINITE_FACTORS])
def test_both_languages_finish_alike(on_the_host, bad, interval, total, inverse, loss_scale):
    """Decisions, coefficients and the next state, bit for bit; NaN and infinities too."""
    hyper, state = np.array([*HYPER.values(), 0.5, inverse, 1.0, interval]), np.array([41.0, loss_scale, 1.0, 2.0])
    device_state, stats = torch.tensor(state, device=DEVICE), torch.empty(3, device=DEVICE)
    coefficients = torch.zeros(len(adamw.COEFFICIENTS), dtype=torch.float64, device=DEVICE)
    sums = torch.tensor([total], dtype=torch.float64), torch.tensor([1.5]), torch.tensor([bad], dtype=torch.int32)
    adamw.launch(
        adamw.finish_kernel, (1,), *(t.to(DEVICE) for t in sums), 1, torch.tensor(hyper, device=DEVICE), device_state, coefficients, stats, TILE=16,
        num_warps=1,
    )  # fmt: skip
    host_coefficients, host_stats = _finish_on_the_host(on_the_host, total, 1.5, bad, hyper, state)
    for found, expected in ((coefficients, host_coefficients), (stats, host_stats), (device_state, state)):
        np.testing.assert_array_equal(found.cpu().numpy(), expected)
    skipped = bool(bad) or not np.isfinite(inverse / loss_scale if loss_scale else np.nan)
    assert (host_coefficients[adamw.COEFFICIENTS.index("SKIP")] == 1.0) == skipped
    assert state[0] == (41.0 if skipped else 42.0) and state[3] == (3.0 if skipped else 2.0)


def test_the_cuda_rounding_to_bfloat16_is_that_of_torch(on_the_host):
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).int()
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.4e38, 1e-45, 1.00390625, 1.01171875])
    values = torch.cat([bits.view(torch.float32), special]).numpy()
    halves = np.zeros(len(values), np.uint16)
    on_the_host.round_all(len(values), _pointer(values), _pointer(halves))
    found, expected = torch.from_numpy(halves).view(torch.bfloat16), torch.from_numpy(values).bfloat16()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
