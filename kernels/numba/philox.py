"""The draws of dropout on vectors: Philox4x32-10 (see `kernels/philox.py`), W calls side by side."""

from typing import Any

from llvmlite import ir
from numba import types

from cllm.kernels.numba import llvm
from cllm.kernels.numba.llvm import F32, I32, I64, VI, W, const, const_int, intrinsic, splat
from cllm.kernels.philox import DRAW_BITS, KEY_STEPS, LANES, MULTIPLIERS, ROUNDS, SLOTS

assert LANES % W == 0, "whole vectors of calls"
_WIDE = ir.VectorType(I64, W)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _product(bld: Any, multiplier: int, word: Any) -> tuple[Any, Any]:
    """The upper and the lower words of the products of W words."""
    product = bld.mul(bld.zext(word, _WIDE), const_int(multiplier, _WIDE))
    return bld.trunc(bld.lshr(product, const_int(32, _WIDE)), VI), bld.trunc(product, VI)


def _philox(bld: Any, counter: list[Any], key: list[Any]) -> list[Any]:
    c0, c1, c2, c3 = counter
    for number in range(ROUNDS):
        k0, k1 = (splat(bld, bld.add(word, I32(_signed(number * step & 0xFFFFFFFF))), VI) for word, step in zip(key, KEY_STEPS))
        (high0, low0), (high1, low1) = _product(bld, MULTIPLIERS[0], c0), _product(bld, MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = bld.xor(bld.xor(high1, c1), k0), low1, bld.xor(bld.xor(high0, c3), k1), low0
    return [c0, c1, c2, c3]


@intrinsic
def kept_group(tc, address, kept, threshold, group, token, place, step, key_low, key_high):
    """GROUP float32 at an address, for the elements of a group: `kept`, or 0 where the draw is below the threshold. All numbers modulo 2**32."""

    def codegen(ctx, bld, sig, args):
        address, kept, *numbers = args
        threshold, group, token, place, step, low, high = (bld.trunc(each, I32) for each in numbers)
        value, zero, limit = splat(bld, kept), const(0.0), splat(bld, threshold, VI)
        first = bld.mul(group, I32(LANES))
        pointer = bld.inttoptr(address, F32.as_pointer())
        for lane in range(0, LANES, W):
            calls = bld.add(splat(bld, first, VI), ir.Constant(VI, [lane + each for each in range(W)]))
            words = _philox(bld, [calls, *(splat(bld, each, VI) for each in (token, place, step))], [low, high])
            for slot in range(SLOTS):
                word = words[slot // 2]
                draw = bld.lshr(word, const_int(DRAW_BITS)) if slot % 2 else bld.and_(word, const_int((1 << DRAW_BITS) - 1))
                chosen = bld.select(bld.icmp_unsigned("<", draw, limit), zero, value)
                llvm.store(bld, chosen, bld.gep(pointer, [I64(slot * LANES + lane)]))
        return ctx.get_dummy_value()

    return types.void(types.intp, types.float32, *[types.int64] * 7), codegen
