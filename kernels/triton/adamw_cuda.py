"""The launches of `adamw.py` in CUDA C++, compiled by NVRTC through CuPy: the main path on NVIDIA.

The text has three parts: how 16-bit numbers become float32, in a way that only a GPU compiles; the arithmetic, portable C++, which a test compiles
for the CPU too; the kernels. It is compiled without fused multiply-adds other than those written as fmaf, with IEEE division and square root, and
keeps denormal numbers, so that an update has the same bits as that of the Triton kernels. Nothing is included: NVRTC needs no headers then.
"""

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cllm.kernels.triton import adamw_table
from cllm.runtime.gpu import gpu_of

OPTIONS = ("--std=c++17", "--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false")
THREADS = 256
FINISH_THREADS = 1024

CONVERSIONS = r"""
__device__ inline float float16_to_float(unsigned short bits) { float value; asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits)); return value; }
__device__ inline unsigned short float_to_float16(float value) {
  unsigned short bits; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value)); return bits;
}
__device__ inline unsigned int bits_of(float value) { return __float_as_uint(value); }
__device__ inline float float_of(unsigned int bits) { return __uint_as_float(bits); }
"""

ARITHMETIC = r"""
enum Kind { FLOAT32, BFLOAT16, FLOAT16 };

__device__ inline float half_to_float(unsigned short bits, int kind) {
  return kind == BFLOAT16 ? float_of((unsigned int)bits << 16) : float16_to_float(bits);
}

__device__ inline unsigned short float_to_half(float value, int kind) {
  if (kind == FLOAT16) return float_to_float16(value);
  const unsigned int bits = bits_of(value);
  if (value != value) return 0x7fff;
  return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to nearest, ties to even
}

struct Update { float scale, beta1, rest1, beta2, rest2, root, eps, step, keep; };

__device__ inline void update_element(float g, float& p, float& m, float& v, const Update& u) {
  g = g * u.scale;
  m = fmaf(g, u.rest1, m * u.beta1);
  v = fmaf(g * g, u.rest2, v * u.beta2);
  p = fmaf(m / fmaf(sqrtf(v), u.root, u.eps), -u.step, p * u.keep);
}

__device__ inline double power(double base, int exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result *= base;
    base *= base;
  }
  return result;
}

// What one thread does once all sums are there: statistics, whether to skip, what the update multiplies with, the next state.
template <class Real>
__device__ inline void finish(double total, float largest, long long nonfinite, const Real* hyper, Real* state, double* coefficients, float* stats) {
  const double interval = hyper[GROWTH_INTERVAL], inverse = hyper[LOSS_SCALE_INVERSE] / (double)state[LOSS_SCALE];
  const double max_norm = hyper[MAX_NORM], norm = sqrt(total) * inverse;
  const bool found = nonfinite > 0 || inverse - inverse != 0.0;  // a factor that is not finite ruins the weights whatever the gradients are
  const bool skip = found && hyper[SKIP_NONFINITE] != (Real)0;
  double clip = max_norm > 0 ? max_norm / (norm + 1e-6) : 1.0;
  if (clip > 1.0) clip = 1.0;
  stats[0] = (float)norm;
  stats[1] = total != total ? (float)total : (float)((double)largest * inverse);
  stats[2] = (float)nonfinite;
  const double step = (double)state[UPDATES] + 1.0;
  coefficients[GRAD_SCALE] = clip * inverse;
  coefficients[RATE] = hyper[LEARNING_RATE];
  coefficients[STEP_SIZE] = (double)hyper[LEARNING_RATE] / (1.0 - power(hyper[BETA1], (int)step));
  coefficients[ROOT] = 1.0 / sqrt(1.0 - power(hyper[BETA2], (int)step));
  coefficients[KEEP1] = hyper[BETA1];
  coefficients[KEEP2] = hyper[BETA2];
  coefficients[EPSILON] = hyper[EPS];
  coefficients[SKIP] = skip;
  if (skip) state[SKIPPED] += (Real)1; else state[UPDATES] = (Real)step;
  if (interval > 0) {
    const double scale = state[LOSS_SCALE], good = (double)state[GOOD_STEPS] + 1.0;
    const bool grow = !found && good >= interval;
    const double next = found ? scale * 0.5 : grow ? scale * 2.0 : scale;
    state[LOSS_SCALE] = (Real)(next > LARGEST_SCALE ? LARGEST_SCALE : next > SMALLEST_SCALE ? next : SMALLEST_SCALE);  // NaN: the smallest
    state[GOOD_STEPS] = (Real)(found || grow ? 0.0 : good);
  }
}
"""

KERNELS = r"""
// N values from address[at] on, of which `count` are there; the others read as 0. Vectors of 16 or 8 bytes where all are there and aligned.
template <int N>
__device__ inline void load(long long address, int kind, long long at, int count, bool aligned, float* out) {
  if (count >= N && aligned) {
    if (kind == FLOAT32) {
      const float4* from = (const float4*)((const float*)address + at);
#pragma unroll
      for (int k = 0; k < N / 4; ++k) {
        const float4 four = __ldcs(from + k);
        out[4 * k] = four.x; out[4 * k + 1] = four.y; out[4 * k + 2] = four.z; out[4 * k + 3] = four.w;
      }
    } else {
      const uint2* from = (const uint2*)((const unsigned short*)address + at);
#pragma unroll
      for (int k = 0; k < N / 4; ++k) {
        const uint2 four = __ldcs(from + k);
        out[4 * k] = half_to_float(four.x & 0xffff, kind); out[4 * k + 1] = half_to_float(four.x >> 16, kind);
        out[4 * k + 2] = half_to_float(four.y & 0xffff, kind); out[4 * k + 3] = half_to_float(four.y >> 16, kind);
      }
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < N; ++k) {
    out[k] = k >= count ? 0.0f
           : kind == FLOAT32 ? ((const float*)address)[at + k] : half_to_float(((const unsigned short*)address)[at + k], kind);
  }
}

__device__ inline void store4(float* to, int count, bool aligned, const float* values) {
  if (count >= 4 && aligned) { *(float4*)to = make_float4(values[0], values[1], values[2], values[3]); return; }
  for (int k = 0; k < 4; ++k) if (k < count) to[k] = values[k];
}

__device__ inline bool is_aligned(long long address, int kind) { return (address & (kind == FLOAT32 ? 15 : 7)) == 0; }

// Sums over a block in a fixed tree: lanes of a warp, then the warps in order. The result is thread 0's.
template <int NUM_WARPS>
__device__ inline void sum_block(double& total, float& largest, long long& nonfinite) {
  __shared__ double totals[NUM_WARPS];
  __shared__ float largests[NUM_WARPS];
  __shared__ long long nonfinites[NUM_WARPS];
  for (int distance = 16; distance > 0; distance >>= 1) {
    total += __shfl_down_sync(0xffffffffu, total, distance);
    largest = fmaxf(largest, __shfl_down_sync(0xffffffffu, largest, distance));
    nonfinite += __shfl_down_sync(0xffffffffu, nonfinite, distance);
  }
  const int warp = threadIdx.x >> 5;
  if ((threadIdx.x & 31) == 0) { totals[warp] = total; largests[warp] = largest; nonfinites[warp] = nonfinite; }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int other = 1; other < NUM_WARPS; ++other) {
      total += totals[other];
      largest = fmaxf(largest, largests[other]);
      nonfinite += nonfinites[other];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) measure(
    const long long* table, const long long* grads, const int* block_tensor, double* squares, float* largests, int* nonfinites) {
  const int tensor = block_tensor[blockIdx.x];
  const long long* row = table + (long long)tensor * NUM_FIELDS;
  const long long start = (blockIdx.x - row[FIRST_BLOCK]) * BLOCK_ELEMENTS, left = row[SIZE] - start;
  const int count = left < BLOCK_ELEMENTS ? (int)left : BLOCK_ELEMENTS;
  const long long address = grads[2 * tensor];
  const int kind = (int)grads[2 * tensor + 1];
  const bool aligned = is_aligned(address, kind);
  double total = 0.0;
  float largest = 0.0f;
  long long nonfinite = 0;
  for (int i = threadIdx.x * 8; i < count; i += THREADS * 8) {
    float g[8];
    load<8>(address, kind, start + i, count - i, aligned, g);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      total = fma((double)g[k], (double)g[k], total);  // the square is exact in float64, fused or not
      largest = fmaxf(largest, fabsf(g[k]));  // passes over NaN, which the sum keeps
      nonfinite += g[k] - g[k] != 0.0f;
    }
  }
  sum_block<THREADS / 32>(total, largest, nonfinite);
  if (threadIdx.x == 0) { squares[blockIdx.x] = total; largests[blockIdx.x] = largest; nonfinites[blockIdx.x] = (int)nonfinite; }
}

template <class Real>
__device__ inline void finish_block(const double* squares, const float* largests, const int* nonfinites, int num_blocks, const Real* hyper,
                                    Real* state, double* coefficients, float* stats) {
  double total = 0.0;
  float largest = 0.0f;
  long long nonfinite = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < num_blocks; i += FINISH_THREADS) {
    total += squares[i];
    largest = fmaxf(largest, largests[i]);
    nonfinite += nonfinites[i];
  }
  sum_block<FINISH_THREADS / 32>(total, largest, nonfinite);
  if (threadIdx.x == 0) finish(total, largest, nonfinite, hyper, state, coefficients, stats);
}

extern "C" __global__ void __launch_bounds__(FINISH_THREADS) finish_float32(
    const double* squares, const float* largests, const int* nonfinites, int num_blocks, const float* hyper, float* state, double* coefficients,
    float* stats) {
  finish_block(squares, largests, nonfinites, num_blocks, hyper, state, coefficients, stats);
}

extern "C" __global__ void __launch_bounds__(FINISH_THREADS) finish_float64(
    const double* squares, const float* largests, const int* nonfinites, int num_blocks, const double* hyper, double* state,
    double* coefficients, float* stats) {
  finish_block(squares, largests, nonfinites, num_blocks, hyper, state, coefficients, stats);
}

extern "C" __global__ void __launch_bounds__(THREADS) update(
    const long long* table, const long long* grads, const int* block_tensor, const double* coefficients) {
  const int tensor = block_tensor[blockIdx.x];
  const long long* row = table + (long long)tensor * NUM_FIELDS;
  if (coefficients[SKIP] != 0.0 || !row[PARAM]) return;
  const long long start = (blockIdx.x - row[FIRST_BLOCK]) * BLOCK_ELEMENTS, left = row[SIZE] - start;
  const int count = left < BLOCK_ELEMENTS ? (int)left : BLOCK_ELEMENTS;
  const long long grad = grads[2 * tensor], param = row[PARAM], avg = row[AVG], avg_sq = row[AVG_SQ], half = row[HALF];
  const int kind = (int)grads[2 * tensor + 1], half_kind = (int)row[HALF_KIND];
  const bool grad_aligned = is_aligned(grad, kind), aligned = is_aligned(param | avg | avg_sq, FLOAT32), half_aligned = is_aligned(half, half_kind);
  Update u;
  u.scale = (float)coefficients[GRAD_SCALE];
  u.beta1 = (float)coefficients[KEEP1];
  u.rest1 = (float)(1.0 - coefficients[KEEP1]);
  u.beta2 = (float)coefficients[KEEP2];
  u.rest2 = (float)(1.0 - coefficients[KEEP2]);
  u.root = (float)coefficients[ROOT];
  u.eps = (float)coefficients[EPSILON];
  u.step = (float)coefficients[STEP_SIZE];
  u.keep = (float)(1.0 - coefficients[RATE] * __longlong_as_double(row[DECAY]));
  for (int i = threadIdx.x * 4; i < count; i += THREADS * 4) {
    const int here = count - i;
    const long long at = start + i;
    float g[4], p[4], m[4], v[4];
    if (here >= 4 && aligned) {  // one piece of code without a branch, so that the three loads are under way together
      load<4>(param, FLOAT32, at, 4, true, p);
      load<4>(avg, FLOAT32, at, 4, true, m);
      load<4>(avg_sq, FLOAT32, at, 4, true, v);
    } else {
      load<4>(param, FLOAT32, at, here, false, p);
      load<4>(avg, FLOAT32, at, here, false, m);
      load<4>(avg_sq, FLOAT32, at, here, false, v);
    }
    load<4>(grad, kind, at, here, grad_aligned, g);
#pragma unroll
    for (int k = 0; k < 4; ++k) update_element(g[k], p[k], m[k], v[k], u);
    store4((float*)param + at, here, aligned, p);
    store4((float*)avg + at, here, aligned, m);
    store4((float*)avg_sq + at, here, aligned, v);
    if (half) {
      unsigned short* to = (unsigned short*)half + at;
      unsigned int h[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) h[k] = float_to_half(p[k], half_kind);
      if (here >= 4 && half_aligned) *(uint2*)to = make_uint2(h[0] | h[1] << 16, h[2] | h[3] << 16);
      else for (int k = 0; k < 4; ++k) if (k < here) to[k] = (unsigned short)h[k];
    }
  }
}
"""


def constants() -> str:
    """The numbers that both languages share, from `adamw_table.py`."""
    names = [f"enum {{ {', '.join(names)} }};" for names in (adamw_table.FIELDS, adamw_table.HYPER, adamw_table.STATE, adamw_table.COEFFICIENTS)]
    sizes = f"enum {{ NUM_FIELDS = {len(adamw_table.FIELDS)}, BLOCK_ELEMENTS = {adamw_table.BLOCK_ELEMENTS} }};"
    sizes += f" enum {{ THREADS = {THREADS}, FINISH_THREADS = {FINISH_THREADS} }};"
    scales = f"#define SMALLEST_SCALE {float(adamw_table.SMALLEST_SCALE)!r}\n#define LARGEST_SCALE {float(adamw_table.LARGEST_SCALE)!r}"
    return "\n".join([*names, sizes, scales])


def source() -> str:
    return constants() + CONVERSIONS + ARITHMETIC + KERNELS


def compile(nvrtc: Any, arch: int) -> bytes:
    """The kernels for compute capability `arch` (90 is Hopper): a cubin, or where this NVRTC is older than the GPU, PTX for the driver to compile.

    nvrtc: `cupy.cuda.nvrtc`, which takes exactly the options it is given. `cupy.RawModule` would append -ftz=true to them, and the last one counts.
    Raises what NVRTC raises, with its log.
    """
    known = nvrtc.getSupportedArchs()
    newest = max((each for each in known if each <= arch), default=arch)
    program = nvrtc.createProgram(source(), "adamw.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture={'sm' if newest == arch else 'compute'}_{newest}", *OPTIONS))
        return bytes(nvrtc.getCUBIN(program) if newest == arch else nvrtc.getPTX(program))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{error}: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


class _Stream:
    """torch's current stream, as CuPy takes streams of others."""

    def __init__(self, device: torch.device):
        self.pointer = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


@lru_cache(maxsize=64)
def _functions(index: int) -> dict[str, Any] | None:
    """The kernels on one device, or None where they cannot be had there: Triton serves then."""
    gpu = gpu_of(torch.device("cuda", index))
    if gpu.vendor != "nvidia" or importlib.util.find_spec("cupy") is None:
        return None
    try:
        import cupy

        code = compile(cupy.cuda.nvrtc, gpu.arch)
        with cupy.cuda.Device(index):
            module = cupy.cuda.function.Module()
            module.load(code)
            return {name: module.get_function(name) for name in ("measure", "finish_float32", "finish_float64", "update")}
    except Exception as error:  # CuPy for another CUDA, no NVRTC, an old driver: it says so when first used
        warnings.warn(f"AdamW runs as Triton kernels: CuPy could not compile its CUDA kernels ({type(error).__name__}: {error})", stacklevel=2)
        return None


@contextmanager
def _launching(device: torch.device) -> Iterator[dict[str, Any] | None]:
    """The kernels, while what is launched goes to torch's current stream on `device`; None where CUDA C++ cannot be had."""
    index = torch.cuda.current_device() if device.index is None else device.index
    functions = _functions(index)
    if functions is None:
        yield None
        return
    import cupy

    stream = _Stream(device)
    new = hasattr(cupy.cuda.Stream, "from_external")
    with cupy.cuda.Device(index), cupy.cuda.Stream.from_external(stream) if new else cupy.cuda.ExternalStream(stream.pointer, index):
        yield functions


def measure(
    table: Tensor, grads: Tensor, block_tensor: Tensor, num_blocks: int, squares: Tensor, largest: Tensor, nonfinite: Tensor, coefficients: Tensor,
    hyper: Tensor, state: Tensor, stats: Tensor,
) -> bool:  # fmt: skip
    """The launches before an update; False, with nothing done, where CUDA C++ cannot be had."""
    with _launching(table.device) as functions:
        if functions is None:
            return False
        import cupy

        sums = squares.data_ptr(), largest.data_ptr(), nonfinite.data_ptr()
        if num_blocks:
            functions["measure"]((num_blocks,), (THREADS,), (table.data_ptr(), grads.data_ptr(), block_tensor.data_ptr(), *sums))
        finish = functions["finish_float32" if hyper.dtype == torch.float32 else "finish_float64"]
        finish(
            (1,), (FINISH_THREADS,), (*sums, cupy.int32(num_blocks), hyper.data_ptr(), state.data_ptr(), coefficients.data_ptr(), stats.data_ptr())
        )
    return True


def update(table: Tensor, grads: Tensor, block_tensor: Tensor, num_blocks: int, coefficients: Tensor) -> bool:
    """The update after `measure`; False, with nothing done, where CUDA C++ cannot be had."""
    with _launching(table.device) as functions:
        if functions is not None and num_blocks:
            what = table.data_ptr(), grads.data_ptr(), block_tensor.data_ptr(), coefficients.data_ptr()
            functions["update"]((num_blocks,), (THREADS,), what)
    return functions is not None
