"""Explicit SIMD vectors for numba: a vector type held in registers, and the operations on it.

numba's own vectoriser leaves most of a CPU unused; here LLVM vector instructions are emitted directly. `W` lanes of
float32 (16 with AVX-512, 8 with AVX2, 4 elsewhere) make a `vec`. Memory operands are flat C-contiguous numpy arrays
with an element offset, or a raw address (an integer) with an element offset: `vload(a, i)` reads a[i:i+W].
bfloat16 lives in memory only, as uint16: it is widened when loaded and rounded (nearest even) when stored.

Never compile callers with fastmath: NaN and infinity keep their meaning here.
"""

import os
from typing import Any

from cllm.runtime import compiler

compiler.numba_setup()

import numpy as np  # noqa: E402
from llvmlite import ir  # noqa: E402
from numba import types  # noqa: E402
from numba.core import cgutils  # noqa: E402
from numba.extending import intrinsic as _intrinsic  # noqa: E402
from numba.extending import models, register_model  # noqa: E402

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
_SCALEF = W == 16 and "avx512f" in FEATURES

F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VF, VI, VH = ir.VectorType(F32, W), ir.VectorType(I32, W), ir.VectorType(I16, W)
VB = ir.VectorType(ir.IntType(1), W)


class _VectorType(types.Type):
    def __init__(self, name: str):
        super().__init__(name=f"{name}x{W}")


vec = _VectorType("f32")  # W float32
mask = _VectorType("i1")  # W booleans


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any):
        super().__init__(dmm, fe_type, VF if fe_type == vec else VB)


# ---- building blocks for code generation (used by the micro-kernels too) -------------------------------------------


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


def pointer(ctx: Any, bld: Any, ty: Any, value: Any, offset: Any, element: ir.Type) -> Any:
    """Typed pointer to element `offset` of an array, or of the memory at an integer address."""
    if isinstance(ty, types.Array):
        base = bld.bitcast(ctx.make_array(ty)(ctx, bld, value).data, element.as_pointer())
    else:
        base = bld.inttoptr(value, element.as_pointer())
    return bld.gep(base, [offset]) if offset is not None else base


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


def _lane_mask(bld: Any, n: Any) -> Any:
    # Clamped first: the comparison is made in 32 bits, n may be larger.
    n = bld.select(bld.icmp_signed("<", n, I64(W)), n, I64(W))
    n = bld.select(bld.icmp_signed(">", n, I64(0)), n, I64(0))
    lanes = ir.Constant(VI, list(range(W)))
    return bld.icmp_signed("<", lanes, splat(bld, bld.trunc(n, I32), VI))


def _masked_load(bld: Any, ptr: Any, ty: ir.VectorType, n: Any) -> Any:
    name = f"llvm.masked.load.v{ty.count}{'f32' if ty.element is F32 else 'i16'}.p0"
    align = I32(4 if ty.element is F32 else 2)
    zero = ir.Constant(ty, [0.0 if ty.element is F32 else 0] * ty.count)
    return call(bld, name, ty, bld.bitcast(ptr, ty.as_pointer()), align, _lane_mask(bld, n), zero)


def _masked_store(bld: Any, value: Any, ptr: Any, n: Any) -> None:
    ty = value.type
    name = f"llvm.masked.store.v{ty.count}{'f32' if ty.element is F32 else 'i16'}.p0"
    align = I32(4 if ty.element is F32 else 2)
    call(bld, name, ir.VoidType(), value, bld.bitcast(ptr, ty.as_pointer()), align, _lane_mask(bld, n))


# ---- memory --------------------------------------------------------------------------------------------------------


def _is_memory(a: Any, dtype: Any) -> bool:
    if isinstance(a, types.Integer):
        return True
    return isinstance(a, types.Array) and a.ndim == 1 and a.layout == "C" and a.dtype in dtype


@intrinsic
def vload(tc, a, i):
    """a[i:i+W]; a uint16 array holds bfloat16 and is widened; an integer is the address of float32."""
    if not _is_memory(a, (types.float32, types.uint16)):
        return None
    half = isinstance(a, types.Array) and a.dtype == types.uint16

    def codegen(ctx, bld, sig, args):
        if half:
            return widen_bf16(bld, load(bld, pointer(ctx, bld, a, args[0], args[1], I16), VH, 2))
        return load(bld, pointer(ctx, bld, a, args[0], args[1], F32), VF)

    return vec(a, types.intp), codegen


@intrinsic
def vload_bf16(tc, a, i):
    """W bfloat16 from a uint16 array or an address, widened."""
    if not _is_memory(a, (types.uint16,)):
        return None

    def codegen(ctx, bld, sig, args):
        return widen_bf16(bld, load(bld, pointer(ctx, bld, a, args[0], args[1], I16), VH, 2))

    return vec(a, types.intp), codegen


@intrinsic
def vstore(tc, a, i, v):
    """a[i:i+W] = v; rounded to bfloat16 when a is a uint16 array."""
    if not _is_memory(a, (types.float32, types.uint16)):
        return None
    half = isinstance(a, types.Array) and a.dtype == types.uint16

    def codegen(ctx, bld, sig, args):
        if half:
            store(bld, round_bf16(bld, args[2]), pointer(ctx, bld, a, args[0], args[1], I16), 2)
        else:
            store(bld, args[2], pointer(ctx, bld, a, args[0], args[1], F32))
        return ctx.get_dummy_value()

    return types.void(a, types.intp, vec), codegen


@intrinsic
def vstore_bf16(tc, a, i, v):
    """Round to bfloat16 and store into a uint16 array or at an address."""
    if not _is_memory(a, (types.uint16,)):
        return None

    def codegen(ctx, bld, sig, args):
        store(bld, round_bf16(bld, args[2]), pointer(ctx, bld, a, args[0], args[1], I16), 2)
        return ctx.get_dummy_value()

    return types.void(a, types.intp, vec), codegen


@intrinsic
def vstore_flushed(tc, a, i, v):
    """As vstore_bf16 at an address, with `flush_bf16`."""
    if not _is_memory(a, (types.uint16,)):
        return None

    def codegen(ctx, bld, sig, args):
        store(bld, flush_bf16(bld, args[2]), pointer(ctx, bld, a, args[0], args[1], I16), 2)
        return ctx.get_dummy_value()

    return types.void(a, types.intp, vec), codegen


def _masked_pair(force_half: bool) -> tuple[Any, Any]:
    allowed = (types.uint16,) if force_half else (types.float32, types.uint16)

    def is_half(a: Any) -> bool:
        return force_half or (isinstance(a, types.Array) and a.dtype == types.uint16)

    @intrinsic
    def masked_load(tc, a, i, n):
        if not _is_memory(a, allowed):
            return None
        half = is_half(a)

        def codegen(ctx, bld, sig, args):
            ptr = pointer(ctx, bld, a, args[0], args[1], I16 if half else F32)
            value = _masked_load(bld, ptr, VH if half else VF, args[2])
            return widen_bf16(bld, value) if half else value

        return vec(a, types.intp, types.intp), codegen

    @intrinsic
    def masked_store(tc, a, i, v, n):
        if not _is_memory(a, allowed):
            return None
        half = is_half(a)

        def codegen(ctx, bld, sig, args):
            ptr = pointer(ctx, bld, a, args[0], args[1], I16 if half else F32)
            _masked_store(bld, round_bf16(bld, args[2]) if half else args[2], ptr, args[3])
            return ctx.get_dummy_value()

        return types.void(a, types.intp, vec, types.intp), codegen

    return masked_load, masked_store


# Lanes from n on read 0 and are not written; n <= 0 touches nothing, n >= W touches all.
vload_masked, vstore_masked = _masked_pair(False)
vload_bf16_masked, vstore_bf16_masked = _masked_pair(True)


@intrinsic
def vset(tc, x):
    """The scalar in every lane."""

    def codegen(ctx, bld, sig, args):
        return splat(bld, args[0])

    return vec(types.float32), codegen


@intrinsic
def vzero(tc):
    def codegen(ctx, bld, sig, args):
        return const(0.0)

    return vec(), codegen


# ---- arithmetic ----------------------------------------------------------------------------------------------------


def _elementwise(count: int, emit: Any, result: Any = vec) -> Any:
    """An intrinsic over `count` vectors from a function (builder, *values) -> value."""

    def codegen(ctx, bld, sig, args):
        return emit(bld, *args)

    if count == 1:

        @intrinsic
        def op(tc, a):
            return result(vec), codegen
    elif count == 2:

        @intrinsic
        def op(tc, a, b):
            return result(vec, vec), codegen
    else:

        @intrinsic
        def op(tc, a, b, c):
            return result(vec, vec, vec), codegen

    return op


def _unary(name: str) -> Any:
    return lambda bld, x: call(bld, f"llvm.{name}.v{W}f32", VF, x)


def _greater(bld: Any, a: Any, b: Any) -> Any:
    # One instruction on x86. NaN in a is dropped, NaN in b is kept.
    return bld.select(bld.fcmp_ordered(">", a, b), a, b)


def _less(bld: Any, a: Any, b: Any) -> Any:
    return bld.select(bld.fcmp_ordered("<", a, b), a, b)


vadd = _elementwise(2, lambda bld, a, b: bld.fadd(a, b))
vsub = _elementwise(2, lambda bld, a, b: bld.fsub(a, b))
vmul = _elementwise(2, lambda bld, a, b: bld.fmul(a, b))
vdiv = _elementwise(2, lambda bld, a, b: bld.fdiv(a, b))
vfma = _elementwise(3, fma)  # a * b + c, rounded once
vneg = _elementwise(1, lambda bld, a: bld.fneg(a))
vabs = _elementwise(1, _unary("fabs"))
vsqrt = _elementwise(1, _unary("sqrt"))
vrint = _elementwise(1, _unary("rint"))
vmax = _elementwise(2, _greater)  # vmax(a, b): b where either is NaN
vmin = _elementwise(2, _less)
vmax_nan = _elementwise(2, lambda bld, a, b: call(bld, f"llvm.maximum.v{W}f32", VF, a, b))  # NaN in either gives NaN
vmin_nan = _elementwise(2, lambda bld, a, b: call(bld, f"llvm.minimum.v{W}f32", VF, a, b))
vgt = _elementwise(2, lambda bld, a, b: bld.fcmp_ordered(">", a, b), mask)
vge = _elementwise(2, lambda bld, a, b: bld.fcmp_ordered(">=", a, b), mask)
vlt = _elementwise(2, lambda bld, a, b: bld.fcmp_ordered("<", a, b), mask)
vle = _elementwise(2, lambda bld, a, b: bld.fcmp_ordered("<=", a, b), mask)
veq = _elementwise(2, lambda bld, a, b: bld.fcmp_ordered("==", a, b), mask)
vflush_bf16 = _elementwise(1, lambda bld, x: widen_bf16(bld, flush_bf16(bld, x)))  # to the nearest bfloat16, kept as float32
visnan = _elementwise(1, lambda bld, a: bld.fcmp_unordered("uno", a, a), mask)


@intrinsic
def vselect(tc, m, a, b):
    """a where the mask is set, else b."""

    def codegen(ctx, bld, sig, args):
        return bld.select(*args)

    return vec(mask, vec, vec), codegen


@intrinsic
def vlanes_below(tc, n):
    """Mask of the lanes whose number is < n."""

    def codegen(ctx, bld, sig, args):
        return _lane_mask(bld, args[0])

    return mask(types.intp), codegen


@intrinsic
def vany(tc, m):
    """True when any lane of the mask is set."""

    def codegen(ctx, bld, sig, args):
        return bld.icmp_unsigned("!=", bld.bitcast(args[0], ir.IntType(W)), ir.IntType(W)(0))

    return types.boolean(mask), codegen


def _halving(bld: Any, v: Any, combine: Any) -> Any:
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


@intrinsic
def vhsum(tc, a):
    """Sum of the lanes in a fixed tree order."""

    def codegen(ctx, bld, sig, args):
        return _halving(bld, args[0], bld.fadd)

    return types.float32(vec), codegen


@intrinsic
def vhmax(tc, a):
    """Largest lane; NaN if any lane is NaN."""

    def codegen(ctx, bld, sig, args):
        def larger(x, y):
            keep_x = bld.or_(bld.fcmp_ordered(">", x, y), bld.fcmp_unordered("uno", x, x))
            return bld.select(keep_x, x, y)

        return _halving(bld, args[0], larger)

    return types.float32(vec), codegen


# ---- exp, log, tanh, erf: errors of 1 to 2 units in the last place (Cephes and N. Juffa's polynomials) ---------------


def _horner(bld: Any, x: Any, coefficients: list[float]) -> Any:
    p = const(coefficients[0])
    for c in coefficients[1:]:
        p = fma(bld, p, x, const(c))
    return p


def _scale_by_power(bld: Any, p: Any, n: Any) -> Any:
    """p * 2**n for integral n in [-300, 300], with gradual underflow and overflow to infinity."""
    if _SCALEF:
        name = "llvm.x86.avx512.mask.scalef.ps.512"
        return call(bld, name, VF, p, n, ir.Constant(VF, [0.0] * W), ir.IntType(16)(0xFFFF), I32(4))
    # fptosi of NaN is undefined: a NaN exponent becomes -300 here, and p carries the NaN on.
    n = bld.fptosi(_greater(bld, n, const(-300.0)), VI)
    half = bld.ashr(n, const_int(1))
    for part in (half, bld.sub(n, half)):
        p = bld.fmul(p, bld.bitcast(bld.shl(bld.add(part, const_int(127)), const_int(23)), VF))
    return p


def fraction(bld: Any, x: Any) -> Any:
    """x - floor(x)"""
    if _SCALEF and "avx512dq" in FEATURES:
        down_without_exceptions = 9
        name = "llvm.x86.avx512.mask.reduce.ps.512"
        return call(bld, name, VF, x, I32(down_without_exceptions), ir.Constant(VF, [0.0] * W), ir.IntType(16)(0xFFFF), I32(4))
    return bld.fsub(x, call(bld, f"llvm.floor.v{W}f32", VF, x))


def times_power_of_floor(bld: Any, p: Any, x: Any, lanes: Any) -> Any:
    """p * 2**floor(x) in the lanes of a mask, 0 in the others; floor(x) in [-300, 300] there."""
    if _SCALEF:
        name = "llvm.x86.avx512.mask.scalef.ps.512"
        return call(bld, name, VF, p, x, ir.Constant(VF, [0.0] * W), bld.bitcast(lanes, ir.IntType(16)), I32(4))
    return bld.select(lanes, _scale_by_power(bld, p, call(bld, f"llvm.floor.v{W}f32", VF, x)), const(0.0))


_EXP = [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1]


def _exp_reduced(bld: Any, r: Any) -> Any:
    """exp(r) for |r| <= ln(2)/2."""
    return bld.fadd(fma(bld, _horner(bld, r, _EXP), bld.fmul(r, r), r), const(1.0))


def emit_exp(bld: Any, x: Any) -> Any:
    # The bounds are past the last finite and the first zero result; constants first, so NaN passes.
    x = _less(bld, const(89.0), _greater(bld, const(-105.0), x))
    n = call(bld, f"llvm.rint.v{W}f32", VF, bld.fmul(x, const(1.44269504088896341)))
    r = fma(bld, n, const(-0.693359375), x)
    r = fma(bld, n, const(2.12194440e-4), r)
    return _scale_by_power(bld, _exp_reduced(bld, r), n)


def emit_exp2(bld: Any, x: Any) -> Any:
    x = _less(bld, const(129.0), _greater(bld, const(-152.0), x))
    n = call(bld, f"llvm.rint.v{W}f32", VF, x)
    r = bld.fmul(bld.fsub(x, n), const(0.693147180559945309))
    return _scale_by_power(bld, _exp_reduced(bld, r), n)


_LOG = [7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1]  # fmt: skip


def emit_log(bld: Any, x: Any) -> Any:
    tiny = bld.fcmp_ordered("<", x, const(1.17549435e-38))
    scaled = bld.select(tiny, bld.fmul(x, const(8388608.0)), x)
    bits = bld.bitcast(scaled, VI)
    exponent = bld.ashr(bld.sub(bits, const_int(0x3F3504F3)), const_int(23))  # mantissa in [sqrt(1/2), sqrt(2))
    f = bld.fsub(bld.bitcast(bld.sub(bits, bld.shl(exponent, const_int(23))), VF), const(1.0))
    e = bld.fadd(bld.sitofp(exponent, VF), bld.select(tiny, const(-23.0), const(0.0)))
    square = bld.fmul(f, f)
    y = bld.fmul(bld.fmul(_horner(bld, f, _LOG), f), square)
    y = fma(bld, e, const(-2.12194440e-4), y)
    y = fma(bld, square, const(-0.5), y)
    y = fma(bld, e, const(0.693359375), bld.fadd(f, y))
    y = bld.select(bld.fcmp_ordered("==", x, const(float("inf"))), x, y)
    y = bld.select(bld.fcmp_ordered("==", x, const(0.0)), const(float("-inf")), y)
    return bld.select(bld.fcmp_unordered("<", x, const(0.0)), const(float("nan")), y)


_TANH = [-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1]


def emit_tanh(bld: Any, x: Any) -> Any:
    t = call(bld, f"llvm.fabs.v{W}f32", VF, x)
    square = bld.fmul(x, x)
    near = fma(bld, bld.fmul(_horner(bld, square, _TANH), square), x, x)
    e = emit_exp(bld, bld.fadd(t, t))
    far = bld.fsub(const(1.0), bld.fdiv(const(2.0), bld.fadd(e, const(1.0))))
    far = call(bld, f"llvm.copysign.v{W}f32", VF, far, x)
    return bld.select(bld.fcmp_ordered("<", t, const(0.625)), near, far)


_ERF_NEAR = [-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1]


def emit_erf(bld: Any, x: Any) -> Any:
    t = call(bld, f"llvm.fabs.v{W}f32", VF, x)
    s = bld.fmul(x, x)
    near = fma(bld, _horner(bld, s, _ERF_NEAR), x, x)
    t = _less(bld, const(4.0), t)  # erf(4) rounds to 1, and inf - inf is avoided
    s = bld.fmul(t, t)
    r = fma(bld, const(-1.72853470e-5), t, const(3.83197126e-4))
    u = fma(bld, const(-3.88396438e-3), t, const(2.42546219e-2))
    r = fma(bld, r, s, u)
    for c in (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1):
        r = fma(bld, r, t, const(c))
    far = bld.fsub(const(1.0), emit_exp(bld, fma(bld, r, t, bld.fneg(t))))
    far = call(bld, f"llvm.copysign.v{W}f32", VF, far, x)
    return bld.select(bld.fcmp_ordered("<", t, const(0.927734375)), near, far)


# 2^r = 1 + r p(r) for 0 <= r <= 1: minimax fits (Lawson's iteration). Relative errors 8e-8, and 3e-6 for what is rounded to bfloat16.
_EXP2_NORMAL = [1.86712629e-3, 9.01703830e-3, 5.57999075e-2, 0.240164452, 0.693151312, 1.0]
_EXP2_COARSE = [1.34266066e-2, 5.22425990e-2, 0.241280147, 0.693044852, 1.0]


def _emit_exp2_normal(coefficients: list[float]) -> Any:
    """2^x for x < 127, in half of the instructions of emit_exp2; NaN is kept, below 2^-126 it is 0."""

    def emit(bld: Any, x: Any) -> Any:
        # Denormal results would cost a hundred cycles each, and every hidden key of attention has one.
        normal = bld.fcmp_unordered(">=", x, const(-126.0))
        return times_power_of_floor(bld, _horner(bld, fraction(bld, x), coefficients), x, normal)

    return emit


def emit_reciprocal(bld: Any, x: Any) -> Any:
    """1 / x for |x| from 2^-126 to 2^126, within a unit in the last place: an estimate of 14 bits and one step of Newton, an eighth of a division."""
    if not _SCALEF:
        return bld.fdiv(const(1.0), x)
    estimate = call(bld, "llvm.x86.avx512.rcp14.ps.512", VF, x, ir.Constant(VF, [0.0] * W), ir.IntType(16)(0xFFFF))
    return fma(bld, estimate, fma(bld, bld.fneg(x), estimate, const(1.0)), estimate)


vexp = _elementwise(1, emit_exp)
vexp2_normal = _elementwise(1, _emit_exp2_normal(_EXP2_NORMAL))
vexp2_coarse = _elementwise(1, _emit_exp2_normal(_EXP2_COARSE))
# e^x for x < 88, to about |x| units in the last place: for what is a share of the largest, e^0. Below the normal range it is 0.
vexp_normal = _elementwise(1, lambda bld, x: _emit_exp2_normal(_EXP2_NORMAL)(bld, bld.fmul(x, const(1.44269504088896341))))
vreciprocal = _elementwise(1, emit_reciprocal)
vexp2 = _elementwise(1, emit_exp2)
vlog = _elementwise(1, emit_log)
vtanh = _elementwise(1, emit_tanh)
verf = _elementwise(1, emit_erf)


# ---- scalars -------------------------------------------------------------------------------------------------------


@intrinsic
def f32_to_bf16(tc, x):
    """float32 -> the uint16 holding its bfloat16 (nearest even, NaN kept)."""

    def codegen(ctx, bld, sig, args):
        one = ir.Constant(ir.VectorType(F32, 1), ir.Undefined)
        return bld.extract_element(round_bf16(bld, bld.insert_element(one, args[0], I32(0))), I32(0))

    return types.uint16(types.float32), codegen


@intrinsic
def bf16_to_f32(tc, u):
    """uint16 holding a bfloat16 -> float32."""

    def codegen(ctx, bld, sig, args):
        return bld.bitcast(bld.shl(bld.zext(args[0], I32), I32(16)), F32)

    return types.float32(types.uint16), codegen
