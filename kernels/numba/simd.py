"""Explicit SIMD vectors for numba: a vector type held in registers, and the operations on it.

`W` lanes of float32 make a `vec`, and what happens to them is written in LLVM's instructions (llvm.py, llvm_math.py). Memory operands are flat
C-contiguous numpy arrays, or raw addresses (integers), with an element offset: `vload(a, i)` reads a[i:i+W]. bfloat16 lives in memory only, as
uint16: it is widened when loaded and rounded (to nearest, ties to even) when stored.

Functions that use them must not be compiled with fastmath: NaN and infinity keep their meaning here.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import models, register_model

from cllm.kernels.numba import llvm
from cllm.kernels.numba import llvm_math as emit
from cllm.kernels.numba.llvm import F32, I16, I32, VB, VF, VH, W, call, const, fma, intrinsic, load, round_bf16, splat, store, widen_bf16


class _VectorType(types.Type):
    def __init__(self, name: str):
        super().__init__(name=f"{name}x{W}")


vec = _VectorType("f32")  # W float32
mask = _VectorType("i1")  # W booleans


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any):
        super().__init__(dmm, fe_type, VF if fe_type == vec else VB)


def pointer(ctx: Any, bld: Any, ty: Any, value: Any, offset: Any, element: ir.Type) -> Any:
    """Typed pointer to element `offset` of an array, or of the memory at an integer address."""
    if isinstance(ty, types.Array):
        base = bld.bitcast(ctx.make_array(ty)(ctx, bld, value).data, element.as_pointer())
    else:
        base = bld.inttoptr(value, element.as_pointer())
    return bld.gep(base, [offset]) if offset is not None else base


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
        store(bld, llvm.flush_bf16(bld, args[2]), pointer(ctx, bld, a, args[0], args[1], I16), 2)
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
            value = llvm.masked_load(bld, ptr, VH if half else VF, args[2])
            return widen_bf16(bld, value) if half else value

        return vec(a, types.intp, types.intp), codegen

    @intrinsic
    def masked_store(tc, a, i, v, n):
        if not _is_memory(a, allowed):
            return None
        half = is_half(a)

        def codegen(ctx, bld, sig, args):
            ptr = pointer(ctx, bld, a, args[0], args[1], I16 if half else F32)
            llvm.masked_store(bld, round_bf16(bld, args[2]) if half else args[2], ptr, args[3])
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


def _elementwise(count: int, instructions: Any, result: Any = vec) -> Any:
    """An intrinsic over `count` vectors from a function (builder, *values) -> value."""

    def codegen(ctx, bld, sig, args):
        return instructions(bld, *args)

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


vadd = _elementwise(2, lambda bld, a, b: bld.fadd(a, b))
vsub = _elementwise(2, lambda bld, a, b: bld.fsub(a, b))
vmul = _elementwise(2, lambda bld, a, b: bld.fmul(a, b))
vdiv = _elementwise(2, lambda bld, a, b: bld.fdiv(a, b))
vfma = _elementwise(3, fma)  # a * b + c, rounded once
vneg = _elementwise(1, lambda bld, a: bld.fneg(a))
vabs = _elementwise(1, _unary("fabs"))
vsqrt = _elementwise(1, _unary("sqrt"))
vrint = _elementwise(1, _unary("rint"))
vmax = _elementwise(2, llvm.greater)  # vmax(a, b): b where either is NaN
vmin = _elementwise(2, llvm.less)
vmax_nan = _elementwise(2, lambda bld, a, b: call(bld, f"llvm.maximum.v{W}f32", VF, a, b))  # NaN in either gives NaN
vmin_nan = _elementwise(2, lambda bld, a, b: call(bld, f"llvm.minimum.v{W}f32", VF, a, b))
vgt = _elementwise(2, lambda bld, a, b: bld.fcmp_ordered(">", a, b), mask)
vge = _elementwise(2, lambda bld, a, b: bld.fcmp_ordered(">=", a, b), mask)
vlt = _elementwise(2, lambda bld, a, b: bld.fcmp_ordered("<", a, b), mask)
vle = _elementwise(2, lambda bld, a, b: bld.fcmp_ordered("<=", a, b), mask)
veq = _elementwise(2, lambda bld, a, b: bld.fcmp_ordered("==", a, b), mask)
vflush_bf16 = _elementwise(1, lambda bld, x: widen_bf16(bld, llvm.flush_bf16(bld, x)))  # to the nearest bfloat16, kept as float32
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
        return llvm.lane_mask(bld, args[0])

    return mask(types.intp), codegen


@intrinsic
def vany(tc, m):
    """True when any lane of the mask is set."""

    def codegen(ctx, bld, sig, args):
        return bld.icmp_unsigned("!=", bld.bitcast(args[0], ir.IntType(W)), ir.IntType(W)(0))

    return types.boolean(mask), codegen


@intrinsic
def vhsum(tc, a):
    """Sum of the lanes in a fixed tree order."""

    def codegen(ctx, bld, sig, args):
        return llvm.halving(bld, args[0], bld.fadd)

    return types.float32(vec), codegen


@intrinsic
def vhmax(tc, a):
    """Largest lane; NaN if any lane is NaN."""

    def codegen(ctx, bld, sig, args):
        def larger(x, y):
            keep_x = bld.or_(bld.fcmp_ordered(">", x, y), bld.fcmp_unordered("uno", x, x))
            return bld.select(keep_x, x, y)

        return llvm.halving(bld, args[0], larger)

    return types.float32(vec), codegen


vexp = _elementwise(1, emit.exp)
vexp2_normal = _elementwise(1, emit.exp2_normal(emit.EXP2_NORMAL))
vexp2_coarse = _elementwise(1, emit.exp2_normal(emit.EXP2_COARSE))
# e^x for x < 88, to about |x| units in the last place: for what is a share of the largest, e^0. Below the normal range it is 0.
vexp_normal = _elementwise(1, lambda bld, x: emit.exp2_normal(emit.EXP2_NORMAL)(bld, bld.fmul(x, const(1.44269504088896341))))
vreciprocal = _elementwise(1, emit.reciprocal)
vexp2 = _elementwise(1, emit.exp2)
vlog = _elementwise(1, emit.log)
vtanh = _elementwise(1, emit.tanh)
verf = _elementwise(1, emit.erf)


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
