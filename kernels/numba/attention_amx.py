"""Attention's products on AMX tiles: bfloat16 operands, float32 sums, 16 x 16 outputs and 32 steps of k an instruction.

A operands are rows of bfloat16 with any row stride (a multiple of 32 elements wide); B operands are strips of 16 columns, two k
to a word, as pack.py makes them. An element is one chain over k in order, so its bits depend on its own row and column only.
On a CPU without AMX what multiplies and packs here does nothing and is never called: LLVM could not compile the instructions.
"""

from numba import types

from cllm.kernels.numba import llvm
from cllm.kernels.numba.launch import inline, jit, load, store
from cllm.kernels.numba.llvm import HAS_PAIRS, I8, I64, VF, BFloat, intrinsic
from cllm.kernels.numba.micro import HAS_TILES, tile_configure, tile_release
from cllm.kernels.numba.pack import BF16_PAIRS, pack_strip
from cllm.kernels.numba.simd import W, vec, vload, vstore, vstore_flushed, vzero

LANES = 16  # a tile has this many rows and columns
STEP = 32  # one instruction sums over this many k
STEP_BYTES = 64


def _make_tiles(row_strips: int, column_strips: int):
    """C tiles = or += A B: a at its first row and k, rows a_row and steps of 32 k a_step apart; b strips of [k/2][16][2], b_strip apart."""

    @intrinsic
    def tiles(tc, a, a_strip, a_row, a_step, b, b_strip, c, c_row, steps, first):
        def codegen(ctx, bld, sig, args):
            a, a_strip, a_row, a_step, b, b_strip, c, c_row, steps, first = args

            def op(name, *operands):
                llvm.call(bld, f"llvm.x86.{name}", llvm.ir.VoidType(), *operands)

            def at(address):
                return bld.inttoptr(address, I8.as_pointer())

            grid = [(i, j, I8(2 * i + j)) for i in range(row_strips) for j in range(column_strips)]
            to = [bld.add(c, bld.add(bld.mul(c_row, I64(LANES * i)), I64(j * STEP_BYTES))) for i, j, _ in grid]
            zero, resume, start, loop, end = (bld.append_basic_block(f"tiles.{n}") for n in ("zero", "resume", "start", "k", "end"))
            bld.cbranch(bld.icmp_unsigned("!=", first, first.type(0)), zero, resume)
            bld.position_at_end(zero)
            for _, _, tile in grid:
                op("tilezero", tile)
            bld.branch(start)
            bld.position_at_end(resume)
            for (_, _, tile), address in zip(grid, to):
                op("tileloadd64", tile, at(address), c_row)
            bld.branch(start)
            bld.position_at_end(start)
            bld.branch(loop)
            bld.position_at_end(loop)
            k = bld.phi(I64)
            k.add_incoming(I64(0), start)
            for j in range(column_strips):
                address = bld.add(b, bld.add(bld.mul(b_strip, I64(j)), bld.mul(k, I64(LANES * STEP_BYTES))))
                op("tileloadd64", I8(6 + j), at(address), I64(STEP_BYTES))
            for i in range(row_strips):
                address = bld.add(a, bld.add(bld.mul(a_strip, I64(i)), bld.mul(k, a_step)))
                op("tileloadd64", I8(4 + i), at(address), a_row)
                for j in range(column_strips):
                    op("tdpbf16ps", I8(2 * i + j), I8(4 + i), I8(6 + j))
            after = bld.add(k, I64(1))
            k.add_incoming(after, loop)
            bld.cbranch(bld.icmp_signed("<", after, steps), loop, end)
            bld.position_at_end(end)
            for (_, _, tile), address in zip(grid, to):
                op("tilestored64", tile, at(address), c_row)
            return ctx.get_dummy_value()

        return types.void(*[types.intp] * 9, types.boolean), codegen

    return tiles


_11, _12, _21, _22 = (_make_tiles(rows, columns) for rows in (1, 2) for columns in (1, 2))


def _multiply(a, a_strip, a_row, a_step, b, b_strip, c, c_row, row_strips, column_strips, steps, first):
    for s in range(0, column_strips, 2):
        for r in range(0, row_strips, 2):
            at_a, at_b, at_c = a + r * a_strip, b + s * b_strip, c + r * LANES * c_row + s * STEP_BYTES
            if r + 1 < row_strips:
                if s + 1 < column_strips:
                    _22(at_a, a_strip, a_row, a_step, at_b, b_strip, at_c, c_row, steps, first)
                else:
                    _21(at_a, a_strip, a_row, a_step, at_b, b_strip, at_c, c_row, steps, first)
            elif s + 1 < column_strips:
                _12(at_a, a_strip, a_row, a_step, at_b, b_strip, at_c, c_row, steps, first)
            else:
                _11(at_a, a_strip, a_row, a_step, at_b, b_strip, at_c, c_row, steps, first)


def _start(configuration):
    tile_configure(configuration)


def _stop():
    tile_release()


def _no_multiply(a, a_strip, a_row, a_step, b, b_strip, c, c_row, row_strips, column_strips, steps, first):
    pass


def _no_start(configuration):
    pass


def _no_stop():
    pass


multiply = jit(_multiply if HAS_TILES else _no_multiply)
start = jit(_start if HAS_TILES else _no_start)
stop = jit(_stop if HAS_TILES else _no_stop)


@jit
def fill_rows(source, row_bytes, rows, dim, target, target_row, all_rows):
    """Rows of bfloat16, copied and padded with 0 to target_row bytes; rows from `rows` on are 0."""
    whole = dim // STEP * STEP
    for r in range(rows):
        at, to = source + r * row_bytes, target + r * target_row
        for c in range(0, whole, STEP):
            vstore(to + 2 * c, 0, vload(at + 2 * c, 0))  # 32 of them as bits
        for c in range(whole, target_row // 2, W):
            store(to, True, c, load(at, True, c, dim - c), W)
    for r in range(rows, all_rows):
        for c in range(0, target_row, STEP_BYTES):
            vstore(target + r * target_row + c, 0, vzero())


@jit
def fill_strips_of_rows(source, row_bytes, rows, dim, strips, target, spare):
    """B with a column for each row of a block and k along its elements: strips of padded dim * 32 bytes."""
    words = (dim + STEP - 1) // STEP * LANES
    for s in range(strips):
        lanes = max(0, min(LANES, rows - s * LANES))
        pack_strip(BF16_PAIRS, source + s * LANES * row_bytes, row_bytes // 2, 1, lanes, dim, words,
                   target + s * words * STEP_BYTES, spare, False)  # fmt: skip


@jit
def fill_strips_of_columns(source, row_bytes, rows, dim, words, target, spare):
    """B with k along the rows of a block and a column for each element: strips of words * 64 bytes."""
    for s in range((dim + LANES - 1) // LANES):
        pack_strip(BF16_PAIRS, source + s * LANES * 2, 1, row_bytes // 2, min(LANES, dim - s * LANES), rows, words,
                   target + s * words * STEP_BYTES, spare, False)  # fmt: skip


@jit
def fill_turned(source, row_bytes, rows, dim, words, target, spare):
    """A with a row for each element and k along the rows of a block: strips of 16 elements, words * 64 bytes, in steps of [element][32 k]."""
    for s in range((dim + LANES - 1) // LANES):
        pack_strip(BF16_PAIRS, source + s * LANES * 2, 1, row_bytes // 2, min(LANES, dim - s * LANES), rows, words,
                   target + s * words * STEP_BYTES, spare, True)  # fmt: skip


@inline
def store_row(address, half, tiles, c, v, n):
    """As launch.store; of what AMX has multiplied denormal numbers are 0."""
    if tiles and n >= W:
        vstore_flushed(address, c, v)
    else:
        store(address, half, c, v, n)


@intrinsic
def halves(tc, low, high):
    """Two vectors, rounded to bfloat16, side by side as the bits of one."""

    def codegen(ctx, bld, sig, args):
        low, high = args
        if not HAS_TILES:
            return low
        if HAS_PAIRS:
            both = llvm.call(bld, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", llvm.ir.VectorType(BFloat(), 2 * W), high, low)
        else:
            lanes = llvm.ir.Constant(llvm.ir.VectorType(llvm.I32, 2 * W), list(range(2 * W)))
            both = bld.shuffle_vector(llvm.round_bf16(bld, low), llvm.round_bf16(bld, high), lanes)
        return bld.bitcast(both, VF)

    return vec(vec, vec), codegen


def _make_interleave(part: int):
    """Words of two neighbours along k, from their `halves`: columns 8 l + i (low) or 8 l + 4 + i (high) for l and i < 4, in this order. It is
    the order of x86's unpack instructions; others cost three times as much."""

    @intrinsic
    def interleave(tc, first, second):
        def codegen(ctx, bld, sig, args):
            if not HAS_TILES:
                return args[0]
            words = llvm.ir.VectorType(llvm.I16, 2 * W)
            columns = [8 * (c // 4) + 4 * part + c % 4 for c in range(LANES)]
            lanes = llvm.ir.Constant(llvm.ir.VectorType(llvm.I32, 2 * W), [lane for c in columns for lane in (c, 2 * W + c)])
            return bld.bitcast(bld.shuffle_vector(bld.bitcast(args[0], words), bld.bitcast(args[1], words), lanes), VF)

        return vec(vec, vec), codegen

    return interleave


interleave_low, interleave_high = _make_interleave(0), _make_interleave(1)
