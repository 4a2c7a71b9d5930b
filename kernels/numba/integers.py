"""int8 and int4 weights times bfloat16 activations in exact integers, on any CPU; of int8 weights with the bits of AMX's tiles (int8.py).

A row of x becomes integers of 16 bits, scaled by the largest of each SCALE_BLOCK of K, in the pairs in which four int8 of an output lie in a lane of
32 bits: (0, 2) its even bytes, (1, 3) its odd ones. Products of a block are summed in int32, which holds them exactly: 32512 * 127 * 64 < 2**31.
Eight int4 of an output lie in such a lane, as q + 8: shifted by 0, 4, 8 and 12 bits they are four such pairs, and the sum of a group begins with -8
times the sum of its x.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from cllm.kernels.numba import llvm
from cllm.kernels.numba.compiling import jit
from cllm.kernels.numba.launch import load, put_float32
from cllm.kernels.numba.llvm import F32, FEATURES, I8, I16, I32, I64, VF, VH, VI, W, const, const_int, intrinsic, splat
from cllm.kernels.numba.micro import WORD, _at, _emit_prefetch, _offset
from cllm.kernels.numba.simd import vabs, vec, vhmax, vmax_nan, vset, vzero
from cllm.kernels.quantization import SCALE_BLOCK, SCALE_GROUP
from cllm.kernels.strips import STRIP

LARGEST, SMALLEST = np.float32(127 * 256), np.float32(1e-33)  # of a block of x after scaling; what is below counts as 0
ROWS = 4  # rows of x for which a strip is taken through the registers at a time
AHEAD_BYTES = 2048
_LINE = 64  # bytes: STRIP outputs, four int8 of each
_BLOCK_BYTES = SCALE_BLOCK * 2  # of a row of x
_ROW_BLOCK = _BLOCK_BYTES + WORD + SCALE_BLOCK // SCALE_GROUP * WORD
_VECTORS = STRIP // W
_SHORTS = ir.VectorType(I16, 2 * W)
_I = types.intp


def row_bytes(depth: int) -> int:
    """From row to row of packed x: its words, the scales of its blocks, and -8 times the sums of its groups. No multiple of 4096, so that rows do
    not share sets of the cache."""
    blocks = -(-depth // SCALE_BLOCK)
    return blocks * _ROW_BLOCK + _LINE


# ---- x ---------------------------------------------------------------------------------------------------------------


def rounded(bld: Any, x: Any, inverse: Any) -> Any:
    """W float32 * inverse, to the nearest integer."""
    return bld.fptosi(llvm.call(bld, f"llvm.rint.v{W}f32", VF, bld.fmul(x, inverse)), VI)


@intrinsic
def _put_words(tc, x, inverse, address):
    """x * inverse, rounded, in pairs -> the sum of these integers."""

    def codegen(ctx, bld, sig, args):
        q = rounded(bld, args[0], args[1])
        even, odd = (ir.Constant(ir.VectorType(I32, W // 2), [4 * (i // 2) + i % 2 + more for i in range(W // 2)]) for more in (0, 2))
        undefined, words = ir.Constant(VI, ir.Undefined), ir.VectorType(I32, W // 2)
        first, second = (bld.shuffle_vector(q, undefined, each) for each in (even, odd))
        both = bld.or_(bld.and_(first, const_int(0xFFFF, words)), bld.shl(second, const_int(16, words)))
        llvm.store(bld, both, bld.inttoptr(args[2], I8.as_pointer()))
        return bld.sext(llvm.halving(bld, q, bld.add), I64)

    return types.int64(vec, vec, _I), codegen


@intrinsic
def _put_int32(tc, address, i, value):
    def codegen(ctx, bld, sig, args):
        bld.store(bld.trunc(args[2], I32), bld.gep(bld.inttoptr(args[0], I32.as_pointer()), [args[1]]), align=4)
        return ctx.get_dummy_value()

    return types.void(_I, _I, types.int64), codegen


@jit
def block_scale(x, half, k, n):
    """(scale, its inverse) of the SCALE_BLOCK elements of x from k on, of which n are valid."""
    top = vzero()
    for i in range(0, SCALE_BLOCK, W):
        top = vmax_nan(vabs(load(x, half, k + i, n - i)), top)
    largest = vhmax(top)
    return largest / LARGEST, LARGEST / largest if not largest < SMALLEST else np.float32(0.0)


@jit
def pack_words(x0, x_row, half, rows, depth, target):
    """Rows of x -> words and scales, `row_bytes` from row to row."""
    blocks = (depth + SCALE_BLOCK - 1) // SCALE_BLOCK
    to_row = blocks * _ROW_BLOCK + _LINE
    for m in range(rows):
        x, to = x0 + m * x_row, target + m * to_row
        sums = to + blocks * (_BLOCK_BYTES + WORD)
        for block in range(blocks):
            k = block * SCALE_BLOCK
            scale, inverse = block_scale(x, half, k, depth - k)
            put_float32(to + blocks * _BLOCK_BYTES, block, scale)
            for first in range(0, SCALE_BLOCK, SCALE_GROUP):
                total = 0
                for i in range(k + first, k + first + SCALE_GROUP, W):
                    total += _put_words(load(x, half, i, depth - i), vset(inverse), to + i * 2)
                _put_int32(sums, (k + first) // SCALE_GROUP, -8 * total)


# ---- products --------------------------------------------------------------------------------------------------------


def _pair_sums(bld: Any, a: Any, b: Any) -> Any:
    """2 W int16 of two vectors -> W int32: the sums of the products of neighbours."""
    name, feature = {16: ("avx512.pmaddw.d.512", "avx512bw"), 8: ("avx2.pmadd.wd", "avx2"), 4: ("sse2.pmadd.wd", "sse2")}[W]
    if feature in FEATURES:
        return llvm.call(bld, f"llvm.x86.{name}", VI, a, b)
    a, b = (bld.bitcast(each, VI) for each in (a, b))
    low = (bld.ashr(bld.shl(each, const_int(16)), const_int(16)) for each in (a, b))
    high = (bld.ashr(each, const_int(16)) for each in (a, b))
    return bld.add(bld.mul(*low), bld.mul(*high))


def _digits(bld: Any, lanes: Any, bits: int) -> list[Any]:
    """The pairs of int16 in lanes of 32 bits: of four int8, or of eight int4 as q + 8."""
    if bits == 8:
        shorts, eight = bld.bitcast(lanes, _SHORTS), const_int(8, _SHORTS)
        return [bld.ashr(bld.shl(shorts, eight), eight), bld.ashr(shorts, eight)]
    halves = (bld.lshr(lanes, const_int(shift)) if shift else lanes for shift in (0, 4, 8, 12))
    return [bld.bitcast(bld.and_(each, const_int(0x000F000F)), _SHORTS) for each in halves]


def _scales(bld: Any, pointer: Any, bits: int) -> Any:
    return llvm.load(bld, pointer, VF) if bits == 8 else llvm.widen_bf16(bld, llvm.load(bld, pointer, VH, 2))


def _make_micro(rows: int, bits: int) -> Any:
    """micro(x, x_row, b, scales, total, total_row, blocks): rows of packed x times a strip of weights through all of K -> total [row][STRIP]."""
    # Where few sums are under way at a time, even and odd bytes have their own: additions of products wait for each other on some processors.
    apart = rows * _VECTORS < 4
    group = SCALE_BLOCK if bits == 8 else SCALE_GROUP
    in_line = 32 // bits  # k of one line of weights
    scale_bytes = 4 if bits == 8 else 2

    @intrinsic
    def micro(tc, x, x_row, b, scales, total, total_row, blocks):
        def codegen(ctx, bld, sig, args):
            x, x_row, b, scales, total, total_row, blocks = args
            totals = [[cgutils.alloca_once_value(bld, const(0.0)) for _ in range(_VECTORS)] for _ in range(rows)]
            sums = [[[cgutils.alloca_once(bld, VI) for _ in range(2 if apart else 1)] for _ in range(_VECTORS)] for _ in range(rows)]
            x_rows = [_offset(bld, x, (x_row, i)) for i in range(rows)]
            x_scales = [bld.add(each, bld.mul(blocks, I64(_BLOCK_BYTES))) for each in x_rows]
            corrections = [bld.add(each, bld.mul(blocks, I64(WORD))) for each in x_scales]
            with cgutils.for_range(bld, bld.mul(blocks, I64(SCALE_BLOCK // group)), intp=I64) as loop:
                number = loop.index
                for i in range(rows):
                    start = const_int(0)
                    if bits == 4:
                        at = _at(bld, bld.add(corrections[i], bld.mul(number, I64(WORD))))
                        start = splat(bld, llvm.load(bld, at, I32), VI)
                    for slots in sums[i]:
                        for slot, value in zip(slots, (start, const_int(0))):
                            bld.store(value, slot)
                at_x = [bld.add(each, bld.mul(number, I64(group * 2))) for each in x_rows]
                at_b = bld.add(b, bld.mul(number, I64(group * STRIP * bits // 8)))
                with cgutils.for_range(bld, I64(group // in_line), intp=I64) as inner:
                    line = bld.add(at_b, bld.mul(inner.index, I64(_LINE)))
                    if rows == 1:
                        _emit_prefetch(bld, _at(bld, line, AHEAD_BYTES), 3)
                    digits = [_digits(bld, llvm.load(bld, _at(bld, line, v * W * WORD), VI), bits) for v in range(_VECTORS)]
                    for i in range(rows):
                        for pair in range(in_line // 2):
                            at = bld.add(at_x[i], bld.mul(inner.index, I64(in_line // 2 * WORD)))
                            word = bld.bitcast(splat(bld, llvm.load(bld, _at(bld, at, pair * WORD), I32), VI), _SHORTS)
                            for v in range(_VECTORS):
                                slot = sums[i][v][pair % 2 if apart else 0]
                                bld.store(bld.add(bld.load(slot), _pair_sums(bld, digits[v][pair], word)), slot)
                at_scales = bld.add(scales, bld.mul(number, I64(STRIP * scale_bytes)))
                of_weights = [_scales(bld, _at(bld, at_scales, v * W * scale_bytes), bits) for v in range(_VECTORS)]
                for i in range(rows):
                    block = bld.udiv(number, I64(SCALE_BLOCK // group))
                    at = _at(bld, bld.add(x_scales[i], bld.mul(block, I64(WORD))))
                    of_x = splat(bld, llvm.load(bld, at, F32))
                    for v in range(_VECTORS):
                        exact = bld.load(sums[i][v][0])
                        if apart:
                            exact = bld.add(exact, bld.load(sums[i][v][1]))
                        scale = bld.fmul(of_weights[v], of_x)
                        bld.store(llvm.fma(bld, bld.sitofp(exact, VF), scale, bld.load(totals[i][v])), totals[i][v])
            for i in range(rows):
                for v in range(_VECTORS):
                    llvm.store(bld, bld.load(totals[i][v]), _at(bld, _offset(bld, total, (total_row, i)), v * W * WORD))
            return ctx.get_dummy_value()

        return types.void(_I, _I, _I, _I, _I, _I, _I), codegen

    return micro


_micro8_1, _micro8_n, _micro4_1, _micro4_n = (_make_micro(rows, bits) for bits in (8, 4) for rows in (1, ROWS))


@jit
def multiply(bits, x, rows, depth, weights, strip_bytes, scales, scales_strip, strips, total, total_row):
    """total [row][strips * STRIP] of some strips of outputs, which begin at `weights` and `scales`."""
    blocks = (depth + SCALE_BLOCK - 1) // SCALE_BLOCK
    x_row = blocks * _ROW_BLOCK + _LINE
    for s in range(strips):
        b, of_b, to = weights + s * strip_bytes, scales + s * scales_strip, total + s * (STRIP * WORD)
        m = 0
        while m < rows:
            at_x, at = x + m * x_row, to + m * total_row
            if rows - m >= ROWS:
                if bits == 8:
                    _micro8_n(at_x, x_row, b, of_b, at, total_row, blocks)
                else:
                    _micro4_n(at_x, x_row, b, of_b, at, total_row, blocks)
                m += ROWS
            else:
                if bits == 8:
                    _micro8_1(at_x, 0, b, of_b, at, 0, blocks)
                else:
                    _micro4_1(at_x, 0, b, of_b, at, 0, blocks)
                m += 1
