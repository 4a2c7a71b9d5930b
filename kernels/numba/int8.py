"""int8 and int4 weights inside the kernels: dequantised on the way into packed strips, for float32; and int8 multiplied by AMX's int8 tiles.

The layouts are those of kernels/quantization.py. int8: strips of STRIP outputs, in them blocks of SCALE_BLOCK k, four k side by side, as tiles read.
"""

from typing import Any

import numpy as np
from numba import types

from cllm.kernels.numba import llvm
from cllm.kernels.numba.compiling import jit
from cllm.kernels.numba.integers import block_scale, rounded
from cllm.kernels.numba.launch import float32_at, load, put_float32
from cllm.kernels.numba.llvm import F32, FEATURES, I8, I32, I64, VF, VH, VI, const_int, intrinsic
from cllm.kernels.numba.micro import HAS_TILES, WORD, tile_configuration
from cllm.kernels.numba.simd import W, vec, vfma, vload, vmul, vset, vstore, vzero
from cllm.kernels.numba.stream import STRIPS
from cllm.kernels.quantization import SCALE_BLOCK, SCALE_GROUP
from cllm.kernels.strips import STRIP

INTEGER_ROWS, GROUP_ROWS = 64, 8  # the most rows of x in one call of int8 tiles, and the rows that one tile holds, as two digits each
LINE, TILE_BYTES = 64, 1024
HAS_INTEGERS = HAS_TILES and "amxint8" in FEATURES


# ---- int8 -> words of packed strips ----------------------------------------------------------------------------------


@intrinsic
def _int8_words(tc, source, scales, target):
    """Four k of W int8 outputs side by side -> their words, [word][output]."""

    def codegen(ctx, bld, sig, args):
        source, scales, target = args
        packed = llvm.load(bld, bld.inttoptr(source, I8.as_pointer()), VI, 4)
        scale = llvm.load(bld, bld.inttoptr(scales, F32.as_pointer()), VF)
        for j in range(4):
            q = bld.ashr(bld.shl(packed, const_int(24 - 8 * j)), const_int(24))
            llvm.store(bld, bld.fmul(bld.sitofp(q, VF), scale), bld.inttoptr(bld.add(target, I64(j * W * WORD)), F32.as_pointer()))
        return ctx.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@jit
def fill_words(source, scales, k, words, target):
    """A strip of int8 weights from their k-th element on, as float32; source and scales at its first block."""
    for word in range(0, words, 4):
        block, at = (k + word) // SCALE_BLOCK, (k + word) % SCALE_BLOCK
        _int8_words(source + (block * SCALE_BLOCK + at) * STRIP, scales + block * (STRIP * 4), target + word * W * WORD)


@intrinsic
def _int4_word(tc, source, shift, scales, target):
    """One k of W int4 outputs, `shift` bits up in their lanes -> float32."""

    def codegen(ctx, bld, sig, args):
        source, shift, scales, target = args
        lanes = llvm.load(bld, bld.inttoptr(source, I8.as_pointer()), VI)
        lanes = bld.lshr(lanes, llvm.splat(bld, bld.trunc(shift, I32), VI))
        q = bld.sub(bld.and_(lanes, const_int(15)), const_int(8))
        scale = llvm.widen_bf16(bld, llvm.load(bld, bld.inttoptr(scales, I8.as_pointer()), VH, 2))
        llvm.store(bld, bld.fmul(bld.sitofp(q, VF), scale), bld.inttoptr(target, F32.as_pointer()))
        return ctx.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp, types.intp), codegen


@jit
def fill_words4(source, scales, k, words, target):
    """The same of int4 weights."""
    for word in range(words):
        group, at = (k + word) // SCALE_GROUP, (k + word) % 8
        line = source + (k + word) // 8 * (STRIP * WORD)
        shift = at // 4 * 8 + at % 4 // 2 * 16 + at % 2 * 4  # the bytes of eight are (0, 1), (4, 5), (2, 3), (6, 7)
        _int4_word(line, shift, scales + group * (STRIP * 2), target + word * W * WORD)


# ---- int8 tiles ------------------------------------------------------------------------------------------------------
# x = scale * (256 high + low) with digits of int8, the scale of a row's block such that its largest is 127 * 256. The sum of a block is an
# exact integer; float32 sums run over the blocks in order.


@intrinsic
def _put_digits(tc, x, inverse, high, low):
    def codegen(ctx, bld, sig, args):
        bytes_of = llvm.ir.VectorType(I8, W)
        q = rounded(bld, args[0], args[1])
        h = bld.ashr(bld.add(q, const_int(128)), const_int(8))
        for digit, address in ((h, args[2]), (bld.sub(q, bld.shl(h, const_int(8))), args[3])):
            llvm.store(bld, bld.trunc(digit, bytes_of), bld.inttoptr(address, I8.as_pointer()), 1)
        return ctx.get_dummy_value()

    return types.void(vec, vec, types.intp, types.intp), codegen


@intrinsic
def _joined(tc, high, low):
    """256 high + low of W sums at two addresses, as float32."""

    def codegen(ctx, bld, sig, args):
        h, low = (llvm.load(bld, bld.inttoptr(each, I8.as_pointer()), VI, 4) for each in args)
        return bld.sitofp(bld.add(bld.shl(h, const_int(8)), low), VF)

    return vec(types.intp, types.intp), codegen


def _make_tiles(strips: int) -> Any:
    """tiles(a, b, b_strip, c): digits [row][64] x weights [16][16 outputs][4] of each strip -> int32 sums, KB by KB at c."""

    @intrinsic
    def tiles(tc, a, b, b_strip, c):
        def codegen(ctx, bld, sig, args):
            a, b, b_strip, c = args

            def op(name, *operands):
                llvm.call(bld, f"llvm.x86.{name}", llvm.ir.VoidType(), *operands)

            def at(address):
                return bld.inttoptr(address, I8.as_pointer())

            op("tileloadd64", I8(4), at(a), I64(LINE))
            for j in range(strips):
                op("tilezero", I8(j))
                op("tileloadd64", I8(5 + j % 3), at(bld.add(b, bld.mul(b_strip, I64(j)))), I64(LINE))
                op("tdpbssd", I8(j), I8(4), I8(5 + j % 3))
            for j in range(strips):
                op("tilestored64", I8(j), at(bld.add(c, I64(j * TILE_BYTES))), I64(LINE))
            return ctx.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp, types.intp), codegen

    return tiles


_tiles_1, _tiles_n = _make_tiles(1), _make_tiles(STRIPS)


def _pack_digits_py(x0, x_row, half, rows, depth, digits):
    """Rows of x -> digits [group of rows][block][row, high and low][64] and behind them the scales [row][block]."""
    blocks = (depth + SCALE_BLOCK - 1) // SCALE_BLOCK
    scales = digits + (rows + GROUP_ROWS - 1) // GROUP_ROWS * blocks * TILE_BYTES
    for m in range(rows):
        x = x0 + m * x_row
        for block in range(blocks):
            k = block * SCALE_BLOCK
            scale, inverse = block_scale(x, half, k, depth - k)
            put_float32(scales, m * blocks + block, scale)
            at = digits + ((m // GROUP_ROWS) * blocks + block) * TILE_BYTES + m % GROUP_ROWS * (2 * LINE)
            for i in range(0, SCALE_BLOCK, W):
                _put_digits(load(x, half, k + i, depth - k - i), vset(inverse), at + i, at + LINE + i)


def _multiply_py(digits, rows, depth, weights, strip_bytes, scales, scales_strip, strips, sums, total, total_row):
    """total [row][strips * W] of some strips of outputs, which begin at `weights` and `scales`; sums: room for their tiles."""
    blocks = (depth + SCALE_BLOCK - 1) // SCALE_BLOCK
    x_scales = digits + (rows + GROUP_ROWS - 1) // GROUP_ROWS * blocks * TILE_BYTES
    for m in range(rows):
        for i in range(0, strips * W, W):
            vstore(total + m * total_row, i, vzero())
    for m0 in range(0, rows, GROUP_ROWS):
        for block in range(blocks):
            a, b = digits + (m0 // GROUP_ROWS * blocks + block) * TILE_BYTES, weights + block * TILE_BYTES
            if strips == STRIPS:
                _tiles_n(a, b, strip_bytes, sums)
            else:
                for s in range(strips):
                    _tiles_1(a, b + s * strip_bytes, 0, sums + s * TILE_BYTES)
            for s in range(strips):
                of_weights = vload(scales + s * scales_strip, block * STRIP)
                for m in range(m0, min(m0 + GROUP_ROWS, rows)):
                    high = sums + s * TILE_BYTES + (m - m0) * (2 * LINE)
                    scale = vmul(of_weights, vset(float32_at(x_scales, m * blocks + block)))
                    at = m * (total_row // WORD) + s * W
                    vstore(total, at, vfma(_joined(high, high + LINE), scale, vload(total, at)))


def _absent_digits(x0, x_row, half, rows, depth, digits):
    pass


def _absent_multiply(digits, rows, depth, weights, strip_bytes, scales, scales_strip, strips, sums, total, total_row):
    pass


# A CPU without the instructions must not see them: LLVM could not select them.
pack_digits = jit(_pack_digits_py if HAS_INTEGERS else _absent_digits)
multiply = jit(_multiply_py if HAS_INTEGERS else _absent_multiply)


def _configurations() -> tuple[np.ndarray, int]:
    """For 1 to GROUP_ROWS rows of x: sums and digits are two rows of a tile for each, weights whole tiles."""
    memory = np.zeros((GROUP_ROWS + 1) * LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    for rows in range(1, GROUP_ROWS + 1):
        config = bytearray(tile_configuration())
        config[48:53] = bytes([2 * rows] * 5)
        memory[start + (rows - 1) * LINE : start + rows * LINE] = np.frombuffer(config, np.uint8)
    return memory, memory.ctypes.data + start


_memory, _CONFIGURATIONS = _configurations()


def configuration(rows: int) -> int:
    """Address of the tile configuration for `rows` of x; it lives as long as the process."""
    return _CONFIGURATIONS + (min(rows, GROUP_ROWS) - 1) * LINE
