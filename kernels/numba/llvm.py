"""LLVM vector instructions, emitted by hand: what simd.py, the micro-kernels and the packing are made of.

numba's own vectoriser leaves most of a CPU unused. A function here takes llvmlite's builder first and returns the value that the instructions
compute. `W` lanes of float32 fill a register: 16 with AVX-512, 8 with AVX2, 4 elsewhere.
"""

import os
from typing import Any

from cllm.runtime import compiler

compiler.numba_setup()

import numpy as np  # noqa: E402
from llvmlite import ir  # noqa: E402
from numba.core import cgutils  # noqa: E402
from numba.extending import intrinsic as _intrinsic  # noqa: E402

intrinsic: Any = _intrinsic  # numba annotates it with the signature of the function that it hides

FEATURES = frozenset(name.replace("-", "").replace("_", "").lower() for name in compiler.cpu_features())


def _lanes() -> int:
    # CLLM_SIMD_LANES narrows the vectors, so that the code for a smaller machine can be tested on a larger one.
    forced = os.environ.get("CLLM_SIMD_LANES")
    if forced:
        return int(forced)
    if "avx512f" in FEATURES:
        return 16
    return 8 if "avx2" in FEATURES else 4


W = _lanes()
HAS_SCALEF = W == 16 and "avx512f" in FEATURES

F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VF, VI, VH = ir.VectorType(F32, W), ir.VectorType(I32, W), ir.VectorType(I16, W)
VB = ir.VectorType(ir.IntType(1), W)


def const(value: float) -> ir.Constant:
    return ir.Constant(VF, [float(np.float32(value))] * W)


def const_int(value: int, vector: ir.VectorType = VI) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def call(bld: Any, name: str, result: Any, *args: Any) -> Any:
    """Call an LLVM intrinsic by its full name."""
    function_type = ir.FunctionType(result, [a.type for a in args])
    return bld.call(cgutils.get_or_insert_function(bld.module, function_type, name), args)


def fma(bld: Any, a: Any, b: Any, c: Any) -> Any:
    return call(bld, f"llvm.fma.v{W}f32", VF, a, b, c)


def splat(bld: Any, scalar: Any, vector: ir.VectorType = VF) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    first = bld.insert_element(undefined, scalar, I32(0))
    return bld.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count))


def load(bld: Any, ptr: Any, ty: ir.Type, align: int = 4) -> Any:
    return bld.load(bld.bitcast(ptr, ty.as_pointer()), align=align)


def store(bld: Any, value: Any, ptr: Any, align: int = 4) -> None:
    bld.store(value, bld.bitcast(ptr, value.type.as_pointer()), align=align)


def widen_bf16(bld: Any, half: Any) -> Any:
    """<n x i16> of bfloat16 -> <n x float>, exact."""
    n = half.type.count
    wide = ir.VectorType(I32, n)
    return bld.bitcast(bld.shl(bld.zext(half, wide), const_int(16, wide)), ir.VectorType(F32, n))


def round_bf16_bits(bld: Any, x: Any) -> Any:
    """<n x float> -> <n x i32> whose low 16 bits are the bfloat16, rounded to nearest even; NaN stays NaN."""
    n = x.type.count
    wide = ir.VectorType(I32, n)
    bits = bld.bitcast(x, wide)
    upper = bld.lshr(bits, const_int(16, wide))
    bias = bld.add(bld.and_(upper, const_int(1, wide)), const_int(0x7FFF, wide))
    rounded = bld.lshr(bld.add(bits, bias), const_int(16, wide))
    return bld.select(bld.fcmp_unordered("uno", x, x), bld.or_(upper, const_int(0x40, wide)), rounded)


def round_bf16(bld: Any, x: Any) -> Any:
    return bld.trunc(round_bf16_bits(bld, x), ir.VectorType(I16, x.type.count))


class BFloat(ir.Type):
    """llvmlite has no bfloat type; this one prints as LLVM's."""

    intrinsic_name = "bf16"

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


HAS_PAIRS = W == 16 and "avx512bf16" in FEATURES


def flush_bf16(bld: Any, x: Any) -> Any:
    """W float32 -> W bfloat16 by the CPU's own instruction where it has one, a fifth of the work: as round_bf16, but denormal numbers become 0.
    That is what the CPU's products of bfloat16 make of them too."""
    if not HAS_PAIRS:
        return round_bf16(bld, x)
    return bld.bitcast(call(bld, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(BFloat(), W), x), VH)


def lane_mask(bld: Any, n: Any) -> Any:
    # Clamped first: the comparison is made in 32 bits, n may be larger.
    n = bld.select(bld.icmp_signed("<", n, I64(W)), n, I64(W))
    n = bld.select(bld.icmp_signed(">", n, I64(0)), n, I64(0))
    lanes = ir.Constant(VI, list(range(W)))
    return bld.icmp_signed("<", lanes, splat(bld, bld.trunc(n, I32), VI))


def _name(element: ir.Type) -> str:
    return "f32" if element is F32 else str(element)


def _bytes(element: ir.Type) -> int:
    return 4 if element is F32 else int(element.width) // 8


def masked_load(bld: Any, ptr: Any, ty: ir.VectorType, n: Any) -> Any:
    name, align = f"llvm.masked.load.v{ty.count}{_name(ty.element)}.p0", I32(_bytes(ty.element))
    zero = ir.Constant(ty, [0.0 if ty.element is F32 else 0] * ty.count)
    return call(bld, name, ty, bld.bitcast(ptr, ty.as_pointer()), align, lane_mask(bld, n), zero)


def masked_store(bld: Any, value: Any, ptr: Any, n: Any) -> None:
    ty = value.type
    name, align = f"llvm.masked.store.v{ty.count}{_name(ty.element)}.p0", I32(_bytes(ty.element))
    call(bld, name, ir.VoidType(), value, bld.bitcast(ptr, ty.as_pointer()), align, lane_mask(bld, n))


def greater(bld: Any, a: Any, b: Any) -> Any:
    """The larger of two, in one instruction on x86: NaN in a is dropped, NaN in b is kept."""
    return bld.select(bld.fcmp_ordered(">", a, b), a, b)


def less(bld: Any, a: Any, b: Any) -> Any:
    return bld.select(bld.fcmp_ordered("<", a, b), a, b)


def halving(bld: Any, v: Any, combine: Any) -> Any:
    """Reduce the lanes by a fixed tree: lane i with lane i + n/2, until one is left."""
    n = W
    while n > 1:
        n //= 2
        index = ir.VectorType(I32, n)
        undefined = ir.Constant(v.type, ir.Undefined)
        low = bld.shuffle_vector(v, undefined, ir.Constant(index, list(range(n))))
        high = bld.shuffle_vector(v, undefined, ir.Constant(index, list(range(n, 2 * n))))
        v = combine(low, high)
    return bld.extract_element(v, I32(0))
