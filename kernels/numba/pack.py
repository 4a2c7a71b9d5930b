"""Packing: W rows of A (or columns of B) from any strided view into the strips that micro.py reads.

`mode` says what happens to an element on the way; in the two last ones a word holds two consecutive k.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from cllm.kernels.numba import llvm, simd
from cllm.kernels.numba.compiling import jit
from cllm.kernels.numba.llvm import F32, I16, I32, I64, VF, VH, VI, const, const_int, intrinsic, load, store
from cllm.kernels.numba.micro import WORD, prefetch_l1
from cllm.kernels.numba.simd import W, vstore, vzero

F32_AS_IS, BF16_WIDENED, F32_ROUNDED_WIDENED, BF16_PAIRS, F32_ROUNDED_PAIRS = range(5)
MODES = range(5)
STRIPS_F32, STRIPS_BF16, STRIPS_INT8, STRIPS_INT4 = range(
    5, 9
)  # of weights that were packed at load (strips.py, quantization.py): see matvec_words.py
LINES_AHEAD = 8  # how many lines of the operand the packing fetches ahead
NO_SECOND = -1  # there is no k + 1; a real stride is even, and so never -1
_I = types.intp


def _vector(bld: Any, address: Any, lanes: Any, half: bool, masked: bool) -> Any:
    """W elements as float32; lanes from `lanes` on are 0 when masked."""
    if half:
        return llvm.widen_bf16(bld, _halves(bld, address, lanes, masked))
    ptr = bld.inttoptr(address, F32.as_pointer())
    return llvm.masked_load(bld, ptr, VF, lanes) if masked else load(bld, ptr, VF)


def _halves(bld: Any, address: Any, lanes: Any, masked: bool) -> Any:
    """W bfloat16, as bits."""
    ptr = bld.inttoptr(address, I16.as_pointer())
    return llvm.masked_load(bld, ptr, VH, lanes) if masked else load(bld, ptr, VH, 2)


def _pairs(bld: Any, low: Any, high: Any) -> Any:
    """Two vectors of k and k+1, already representable in bfloat16 or to be rounded -> words, as bits in a vec."""
    low, high = llvm.round_bf16_bits(bld, low), llvm.round_bf16_bits(bld, high)
    low = bld.and_(low, const_int(0xFFFF))
    return bld.bitcast(bld.or_(low, bld.shl(high, const_int(16))), VF)


def _even_odd(bld: Any, first: Any, second: Any) -> tuple[Any, Any]:
    """2W consecutive elements in two vectors -> those with even and those with odd number."""
    even, odd = (ir.Constant(VI, list(range(start, 2 * W, 2))) for start in (0, 1))
    return bld.shuffle_vector(first, second, even), bld.shuffle_vector(first, second, odd)


def _emit_along_k(bld: Any, mode: int, address: Any, count: Any, masked: bool) -> Any:
    """W words that follow each other along k; `count` elements are valid."""
    half = mode in (BF16_WIDENED, BF16_PAIRS)
    if mode == BF16_PAIRS and not masked:
        return load(bld, bld.inttoptr(address, I16.as_pointer()), VF, 2)
    first = _vector(bld, address, count, half, masked)
    if mode in (BF16_PAIRS, F32_ROUNDED_PAIRS):
        beyond = bld.add(address, I64(W * (2 if half else 4)))
        second = _vector(bld, beyond, bld.sub(count, I64(W)), half, masked)
        return _pairs(bld, *_even_odd(bld, first, second))
    return _rounded(bld, first) if mode == F32_ROUNDED_WIDENED else first


def _emit_across(bld: Any, mode: int, address: Any, count: Any, second: Any, masked: bool) -> Any:
    """W words of one k (or of k and the k after it, at address + second), panel elements side by side."""
    half = mode in (BF16_WIDENED, BF16_PAIRS)
    if mode in (BF16_PAIRS, F32_ROUNDED_PAIRS):
        # NO_SECOND means that there is no k + 1: the address stays readable and the value becomes 0. (0 is the stride of an expanded operand.)
        exists = bld.icmp_signed("!=", second, I64(NO_SECOND))
        addresses = address, bld.add(address, bld.select(exists, second, I64(0)))
        if half:  # nothing to round
            low, high = (bld.zext(_halves(bld, each, count, masked), VI) for each in addresses)
            return bld.bitcast(bld.or_(low, bld.shl(bld.select(exists, high, const_int(0)), const_int(16))), VF)
        first, other = (_vector(bld, each, count, half, masked) for each in addresses)
        return _pairs(bld, first, bld.select(exists, other, const(0.0)))
    first = _vector(bld, address, count, half, masked)
    return _rounded(bld, first) if mode == F32_ROUNDED_WIDENED else first


def _rounded(bld: Any, x: Any) -> Any:
    return bld.bitcast(bld.shl(llvm.round_bf16_bits(bld, x), const_int(16)), VF)


def _by_mode(bld: Any, mode: Any, whole: Any, emit: Any) -> Any:
    """Switch over mode and whole/masked; emit(mode, masked) -> vector."""
    slot = cgutils.alloca_once(bld, VF)
    end = bld.append_basic_block("pack.end")
    for m in MODES:
        if m >= BF16_PAIRS and W != 16:
            continue
        with bld.if_then(bld.icmp_signed("==", mode, I64(m))), bld.if_else(whole) as (then, otherwise):
            with then:
                bld.store(emit(m, False), slot)
            with otherwise:
                bld.store(emit(m, True), slot)
    bld.branch(end)
    bld.position_at_end(end)
    return bld.load(slot)


@intrinsic
def _words_along_k(tc, mode, address, count):
    def codegen(ctx, bld, sig, args):
        mode, address, count = args
        needed = bld.select(bld.icmp_signed(">=", mode, I64(BF16_PAIRS)), I64(2 * W), I64(W))
        whole = bld.icmp_signed(">=", count, needed)
        return _by_mode(bld, mode, whole, lambda m, masked: _emit_along_k(bld, m, address, count, masked))

    return simd.vec(_I, _I, _I), codegen


@intrinsic
def _words_across(tc, mode, address, count, second):
    def codegen(ctx, bld, sig, args):
        mode, address, count, second = args
        whole = bld.icmp_signed(">=", count, I64(W))
        return _by_mode(bld, mode, whole, lambda m, masked: _emit_across(bld, m, address, count, second, masked))

    return simd.vec(_I, _I, _I, _I), codegen


@intrinsic
def _word(tc, mode, address, second, target):
    """One word from anywhere: the element at address and, in a pair, the one at address + second (NO_SECOND: none)."""

    def codegen(ctx, bld, sig, args):
        mode, address, second, target = args
        one, lane = I64(1), I32(0)
        words = _by_mode(bld, mode, ir.IntType(1)(0), lambda m, masked: _emit_across(bld, m, address, one, second, True))
        store(bld, bld.extract_element(words, lane), bld.inttoptr(target, F32.as_pointer()))
        return ctx.get_dummy_value()

    return types.void(_I, _I, _I, _I), codegen


@intrinsic
def transpose(tc, source, source_row, target):
    """W x W words, contiguous at the target: log2(W) rounds that swap off-diagonal blocks of growing size."""

    def codegen(ctx, bld, sig, args):
        source, source_row, target = args

        def row(base, stride, i):
            return bld.inttoptr(bld.add(base, bld.mul(stride, I64(i))), F32.as_pointer())

        v = [load(bld, row(source, source_row, i), VF) for i in range(W)]
        size = 1
        while size < W:
            upper = ir.Constant(VI, [j if not j & size else W + j - size for j in range(W)])
            lower = ir.Constant(VI, [j + size if not j & size else W + j for j in range(W)])
            for i in range(W):
                if not i & size:
                    x, y = v[i], v[i + size]
                    v[i], v[i + size] = bld.shuffle_vector(x, y, upper), bld.shuffle_vector(x, y, lower)
            size *= 2
        for i in range(W):
            store(bld, v[i], row(target, I64(W * WORD), i))
        return ctx.get_dummy_value()

    return types.void(_I, _I, _I), codegen


@jit
def pack_strip(mode, source, panel_stride, k_stride, lanes, num_k, num_words, target, spare, rows_first):
    """Pack `lanes` (<= W) panel elements x `num_k` into `num_words` (a multiple of W, zero beyond num_k) at `target`.

    Strides in elements. rows_first: blocks are [panel][k] (the A side of AMX tiles) instead of [k][panel].
    spare: room for one block.
    """
    size = 2 if mode in (BF16_WIDENED, BF16_PAIRS) else 4
    per_word = 2 if mode >= BF16_PAIRS else 1
    for word in range(0, num_words, W):
        k = word * per_word
        block = target + word * W * WORD
        if k_stride == 1:
            to = block if rows_first else spare
            for p in range(lanes):
                words = _words_along_k(mode, source + (p * panel_stride + k) * size, num_k - k)
                vstore(to, p * W, words)
            for p in range(lanes, W):
                vstore(to, p * W, vzero())
            if not rows_first:
                transpose(spare, W * WORD, block)
        else:
            to = spare if rows_first else block
            valid = min(W, (num_k - k + per_word - 1) // per_word)
            for r in range(valid):
                at = source + (k + r * per_word) * k_stride * size
                second = k_stride * size if k + r * per_word + 1 < num_k else NO_SECOND
                if panel_stride == 1:
                    vstore(to, r * W, _words_across(mode, at, lanes, second))
                else:
                    vstore(to, r * W, vzero())
                    for p in range(lanes):
                        _word(mode, at + p * panel_stride * size, second, to + (r * W + p) * WORD)
            for r in range(max(valid, 0), W):
                vstore(to, r * W, vzero())
            if rows_first:
                transpose(spare, W * WORD, block)


@jit
def pack_lines(mode, source, k_stride, lanes, num_k, num_words, target, strip_bytes):
    """The same for strips side by side whose elements of one k are contiguous: line by line, so that each page is visited once."""
    size = 2 if mode in (BF16_WIDENED, BF16_PAIRS) else 4
    per_word = 2 if mode >= BF16_PAIRS else 1
    valid = (num_k + per_word - 1) // per_word
    for word in range(valid):
        k = word * per_word
        line = source + k * k_stride * size
        second = k_stride * size if k + 1 < num_k else NO_SECOND
        to = target + word * (W * WORD)
        ahead = min(LINES_AHEAD * per_word, num_k - 1 - k) * k_stride * size
        for first in range(0, lanes, W):
            prefetch_l1(line + first * size + ahead)
            if per_word == 2 and second != NO_SECOND:
                prefetch_l1(line + first * size + ahead + second)
            vstore(to, 0, _words_across(mode, line + first * size, lanes - first, second))
            to += strip_bytes
    for word in range(max(valid, 0), num_words):
        to = target + word * (W * WORD)
        for _ in range(0, lanes, W):
            vstore(to, 0, vzero())
            to += strip_bytes
