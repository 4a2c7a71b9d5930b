"""Strips of weights for products: from rows, W x W words at a time, converted and turned in registers on their way from memory; or from weights
that lie in strips already (strips.py)."""

from typing import Any

from numba import types

from cllm.kernels.numba import llvm, pack
from cllm.kernels.numba.compiling import jit
from cllm.kernels.numba.llvm import F32, HAS_PAIRS, I64, VF, VI, BFloat, W, const_int, intrinsic
from cllm.kernels.numba.micro import WORD, _at
from cllm.kernels.numba.simd import vload, vstore
from cllm.kernels.strips import STRIP


def _rounded_pairs(bld: Any, first: Any, second: Any) -> Any:
    if not HAS_PAIRS:
        return pack._pairs(bld, *pack._even_odd(bld, first, second))
    both = llvm.ir.VectorType(BFloat(), 2 * W)
    return bld.bitcast(llvm.call(bld, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", both, second, first), VF)


def _turned(bld: Any, v: list[Any]) -> list[Any]:
    """The transpose of W vectors: log2(W) rounds that swap off-diagonal blocks of growing size."""
    size = 1
    while size < W:
        upper = llvm.ir.Constant(VI, [j if not j & size else W + j - size for j in range(W)])
        lower = llvm.ir.Constant(VI, [j + size if not j & size else W + j for j in range(W)])
        for i in range(W):
            if not i & size:
                x, y = v[i], v[i + size]
                v[i], v[i + size] = bld.shuffle_vector(x, y, upper), bld.shuffle_vector(x, y, lower)
        size *= 2
    return v


def _widened(bld: Any, pairs: Any) -> tuple[Any, Any]:
    """W pairs of bfloat16 -> the first of each and the second, as the words of float32."""
    return bld.shl(pairs, const_int(16)), bld.and_(pairs, const_int(-0x10000))


def _make_block(mode: int, turned: bool, widened: bool = False) -> Any:
    """block(source, row, target): W words of each of W rows -> [row][word], or turned [word][row]; widened: words are two bfloat16, and become two
    lines of float32, for half of the shuffles that turning float32 takes."""

    @intrinsic
    def block(tc, source, row, target):
        def codegen(ctx, bld, sig, args):
            source, row, target = args
            v = []
            for lane in range(W):
                address = bld.add(source, bld.mul(row, I64(lane)))
                if mode == pack.F32_ROUNDED_PAIRS:
                    halves = [llvm.load(bld, bld.inttoptr(bld.add(address, I64(i * W * WORD)), F32.as_pointer()), VF) for i in range(2)]
                    v.append(_rounded_pairs(bld, *halves))
                else:
                    v.append(pack._emit_along_k(bld, mode, address, None, False))
            lines = _turned(bld, v) if turned else v
            if widened:
                lines = [line for words in lines for line in _widened(bld, bld.bitcast(words, VI))]
            for i, words in enumerate(lines):
                llvm.store(bld, words, bld.inttoptr(bld.add(target, I64(i * W * WORD)), F32.as_pointer()))
            return ctx.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp), codegen

    return block


_turn_float32, _turn_widened, _turn_pairs = (_make_block(mode, True) for mode in (pack.F32_AS_IS, pack.BF16_WIDENED, pack.BF16_PAIRS))
_turn_widened_pairs = _make_block(pack.BF16_PAIRS, True, True)
_rounded_rows = _make_block(pack.F32_ROUNDED_PAIRS, False)


@jit
def fill_chain(mode, source, row, words, target):
    """A strip of whole blocks, for chains of float32."""
    word = 0
    while mode != pack.F32_AS_IS and words - word >= 2 * W:
        _turn_widened_pairs(source + word * 2, row, target + word * W * WORD)
        word += 2 * W
    for rest in range(word, words, W):
        if mode == pack.F32_AS_IS:
            _turn_float32(source + rest * 4, row, target + rest * W * WORD)
        else:
            _turn_widened(source + rest * 2, row, target + rest * W * WORD)


def _fill_paired_py(rows_first, source, row, words, target):
    """The same for pairs of bfloat16; rows_first as the A side of AMX tiles, from float32."""
    for word in range(0, words, W):
        if rows_first:
            _rounded_rows(source + word * 8, row, target + word * W * WORD)
        else:
            _turn_pairs(source + word * 4, row, target + word * W * WORD)


def _absent_fill(rows_first, source, row, words, target):
    pass


# A CPU without the instructions must not see them: LLVM could not select them.
fill_paired = jit(_fill_paired_py if W == 16 else _absent_fill)


@intrinsic
def _widened_line(tc, source, target):
    """W outputs of two neighbouring k in bfloat16 -> float32 [k][W]."""

    def codegen(ctx, bld, sig, args):
        both = llvm.load(bld, _at(bld, args[0]), VI)
        for i, line in enumerate(_widened(bld, both)):
            llvm.store(bld, line, _at(bld, args[1], i * W * WORD))
        return ctx.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@jit
def fill_packed(mode, paired, source, k, words, target):
    """W outputs of weights packed at load, from their k-th element on, as gemm.py packs them; source: the first of them in their strip.

    words: a multiple of W. `paired` fits STRIPS_BF16 alone: two k are a word there.
    """
    if mode == pack.STRIPS_BF16 and not paired:
        for word in range(0, words, 2):
            _widened_line(source + (k + word) // 2 * (STRIP * WORD), target + word * (W * WORD))
    else:
        line = source + (k // 2 if paired else k) * (STRIP * WORD)
        for word in range(words):
            vstore(target, word * W, vload(line, word * STRIP))
