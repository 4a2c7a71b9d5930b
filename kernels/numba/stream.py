"""Micro-kernels for a few rows of x and strips of weights that come from memory: float32 chains, or pairs of bfloat16.

x lies row by row as words: float32, or two bfloat16 that follow each other along k. A strip of weights is WIDTH outputs beside each other, word after
word. Every sum is one chain over the words, from 0, as in micro.py.
"""

from typing import Any

from numba import types
from numba.core import cgutils

from cllm.kernels.numba import llvm
from cllm.kernels.numba.compiling import jit
from cllm.kernels.numba.llvm import F32, HAS_PAIRS, I32, I64, VF, VI, BFloat, W, const, const_int, intrinsic, load, splat, store
from cllm.kernels.numba.micro import WORD, _at, _emit_prefetch, _offset
from cllm.kernels.strips import STRIP

STRIPS = 4  # strips that go through K together, so that no chain of additions waits for itself
WORKED, FLOAT32, BFLOAT16 = range(3)  # strips: W outputs in the work space, in words of the kernel; of STRIP outputs, as strips.py lays them out
# Rows of x and strips that go through the registers together, the largest first: with 32 registers of 16 lanes, 16 sums; else as many as fit.
SHAPES = ((8, 2), (4, 2)) if W == STRIP else ((4, 1),)
AHEAD_BYTES = 1024  # of each strip: the processor's own prefetching stops at the end of a page
_L1 = 3
_LINE = 64
_I = types.intp


def _make_micro(rows: int, strips: int, kind: int, pairs: bool = False) -> Any:
    """micro(x, x_row, b, b_strip, old, out, out_row, words): out [rows][strips * WIDTH] = (old +) x B; addresses and strides in bytes, old 0: there
    is none. words: those of the chain, each one k, or two with `pairs`."""
    width = W if kind == WORKED else STRIP
    vectors = width // W
    halves = kind == BFLOAT16 and not pairs  # a line of the strip holds two k
    line = width * WORD
    places = [(j, v) for j in range(strips) for v in range(vectors)]

    @intrinsic
    def micro(tc, x, x_row, b, b_strip, old, out, out_row, words):
        def codegen(ctx, bld, sig, args):
            x, x_row, b, b_strip, old, out, out_row, words = args
            sums = [[cgutils.alloca_once_value(bld, const(0.0)) for _ in places] for _ in range(rows)]

            def add(word: Any, values: list[Any]) -> None:
                for i in range(rows):
                    at = _at(bld, bld.add(_offset(bld, x, (x_row, i)), bld.mul(word, I64(WORD))))
                    if pairs:
                        both = llvm.ir.VectorType(BFloat(), 2 * W)
                        of_x = bld.bitcast(splat(bld, load(bld, at, I32), VI), both)
                    else:
                        of_x = splat(bld, load(bld, at, F32))
                    for slot, value in zip(sums[i], values):
                        now = bld.load(slot)
                        if pairs:
                            bld.store(llvm.call(bld, "llvm.x86.avx512bf16.dpbf16ps.512", VF, now, of_x, bld.bitcast(value, both)), slot)
                        else:
                            bld.store(llvm.fma(bld, of_x, value, now), slot)

            def line_of(number: Any) -> list[Any]:
                at = bld.mul(number, I64(line))
                found = []
                for j in range(strips):
                    start = bld.add(_offset(bld, b, (b_strip, j)), at)
                    if kind != WORKED:
                        for more in range(0, line, _LINE):
                            _emit_prefetch(bld, _at(bld, start, AHEAD_BYTES + more), _L1)
                    found += [load(bld, _at(bld, start, v * W * WORD), VI if halves else VF) for v in range(vectors)]
                return found

            def low(both: Any) -> Any:
                return bld.bitcast(bld.shl(both, const_int(16)), VF)

            def high(both: Any) -> Any:
                return bld.bitcast(bld.and_(both, const_int(-0x10000)), VF)

            lines = bld.ashr(words, I64(1)) if halves else words
            with cgutils.for_range(bld, lines, intp=I64) as loop:
                found = line_of(loop.index)
                if halves:
                    word = bld.shl(loop.index, I64(1))
                    add(word, [low(each) for each in found])
                    add(bld.add(word, I64(1)), [high(each) for each in found])
                else:
                    add(loop.index, found)
            if halves:
                with bld.if_then(bld.icmp_signed("!=", bld.and_(words, I64(1)), I64(0))):
                    add(bld.sub(words, I64(1)), [low(each) for each in line_of(lines)])
            with bld.if_then(bld.icmp_signed("!=", old, I64(0))):
                for i in range(rows):
                    for slot, (j, v) in zip(sums[i], places):
                        at = _at(bld, _offset(bld, old, (out_row, i)), (j * vectors + v) * W * WORD)
                        bld.store(bld.fadd(load(bld, at, VF), bld.load(slot)), slot)
            for i in range(rows):
                for slot, (j, v) in zip(sums[i], places):
                    store(bld, bld.load(slot), _at(bld, _offset(bld, out, (out_row, i)), (j * vectors + v) * W * WORD))
            return ctx.get_dummy_value()

        return types.void(_I, _I, _I, _I, _I, _I, _I, _I), codegen

    return micro


def _make_block(kind: int, pairs: bool = False) -> Any:
    """block(x, x_row, b, b_strip, sums, sums_row, rows, words, strips, first): one K block of every row, sums [row][strips * WIDTH] = or += x B."""
    one, all_of_one = (_make_micro(1, each, kind, pairs) for each in (1, STRIPS))
    (many_rows, wide), (few_rows, _) = SHAPES[0], SHAPES[-1]
    many, few = (_make_micro(*each, kind, pairs) for each in (SHAPES[0], SHAPES[-1]))
    width = (W if kind == WORKED else STRIP) * WORD

    @jit
    def block(x, x_row, b, b_strip, sums, sums_row, rows, words, strips, first):
        m = 0
        while m < rows:
            at_x, to = x + m * x_row, sums + m * sums_row
            if rows - m >= few_rows and strips % wide == 0:
                now = many_rows if rows - m >= many_rows else few_rows
                for s in range(0, strips, wide):
                    at_b, at = b + s * b_strip, to + s * width
                    if now == many_rows:
                        many(at_x, x_row, at_b, b_strip, 0 if first else at, at, sums_row, words)
                    else:
                        few(at_x, x_row, at_b, b_strip, 0 if first else at, at, sums_row, words)
                m += now
                continue
            if strips == STRIPS:
                all_of_one(at_x, 0, b, b_strip, 0 if first else to, to, 0, words)
            else:
                for s in range(strips):
                    one(at_x, 0, b + s * b_strip, 0, 0 if first else to + s * width, to + s * width, 0, words)
            m += 1

    return block


@jit
def _absent(x, x_row, b, b_strip, sums, sums_row, rows, words, strips, first):
    pass


_chains = [_make_block(kind) for kind in (WORKED, FLOAT32, BFLOAT16)]
_worked_chains, _float32_chains, _bfloat16_chains = _chains
# A CPU without the instructions must not see them: LLVM could not select them.
_pairs = _make_block(BFLOAT16, True) if HAS_PAIRS else _absent


@jit
def multiply(kind, paired, x, x_row, b, b_strip, sums, sums_row, rows, words, strips, first):
    """One K block of `rows` rows of x and some strips; paired: by pairs of bfloat16, whose strips in the work space lie as those of BFLOAT16 do."""
    if paired:
        _pairs(x, x_row, b, b_strip, sums, sums_row, rows, words, strips, first)
    elif kind == BFLOAT16:
        _bfloat16_chains(x, x_row, b, b_strip, sums, sums_row, rows, words, strips, first)
    elif kind == FLOAT32:
        _float32_chains(x, x_row, b, b_strip, sums, sums_row, rows, words, strips, first)
    else:
        _worked_chains(x, x_row, b, b_strip, sums, sums_row, rows, words, strips, first)
