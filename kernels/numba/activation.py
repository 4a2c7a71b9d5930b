"""The feed-forward layer's activation as the end of a matrix product: it meets the sums while they are in the L1 cache.

    ACTIVATE        v is z, or `up` when gated           -> hidden = activation(z) (* up), and v itself where it is kept
    DIFFERENTIATE   v is the gradient of hidden          -> hidden again, and the gradients dz (and dup)

z and up have the dtype of the activations: what is read back in the backward has the bits that the forward used.
"""

import functools
import math
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types

from cllm.kernels.numba.launch import inline, load, store
from cllm.kernels.numba.llvm import I64, intrinsic
from cllm.kernels.numba.simd import (
    W,
    vadd,
    verf,
    vexp,
    vexp2_normal,
    vflush_bf16,
    vfma,
    vmax,
    vmin,
    vmul,
    vneg,
    vreciprocal,
    vset,
    vstore_flushed,
    vsub,
    vzero,
)
from cllm.runtime import compile_ahead
from cllm.runtime.workers import lasting

CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3}
NONE, ACTIVATE, DIFFERENTIATE = range(3)

_ONE, _HALF, _TWO = np.float32(1.0), np.float32(0.5), np.float32(2.0)
_SQRT_HALF = np.float32(math.sqrt(0.5))
_INV_SQRT_2PI = np.float32(1.0 / math.sqrt(2.0 * math.pi))
_SQRT_2_OVER_PI = np.float32(math.sqrt(2.0 / math.pi))
_CUBIC = np.float32(0.044715)
_MINUS_LOG2_E = np.float32(-1.0 / math.log(2.0))
_GELU_LINEAR = np.float32(-2.0 * math.sqrt(2.0 / math.pi) / math.log(2.0))
_GELU_CUBIC = np.float32(-2.0 * math.sqrt(2.0 / math.pi) * 0.044715 / math.log(2.0))
_LARGEST_POWER = np.float32(126.0)


class Epilogue(NamedTuple):
    """What a product does with its sums instead of writing them: tensors (M, N), rows alike, of the activations' dtype."""

    what: int
    activation: str
    hidden: torch.Tensor
    z: torch.Tensor | None = None
    up: torch.Tensor | None = None
    dz: torch.Tensor | None = None
    dup: torch.Tensor | None = None


@inline
def _sigmoid_of_power(t):
    """1 / (1 + 2^t); below 2^-126 the sigmoid stays there, so that all is finite."""
    return vreciprocal(vadd(vset(_ONE), vexp2_normal(vmin(vset(_LARGEST_POWER), t))))


@inline
def _gelu_power(z, square):
    """log2 of exp(-2 u), u what tanh's GELU is tanh of: 1/2 (1 + tanh(u)) = 1 / (1 + exp(-2 u)), without the cancellation."""
    return vmul(z, vfma(square, vset(_GELU_CUBIC), vset(_GELU_LINEAR)))


@inline
def _value(code, z):
    one = vset(_ONE)
    if code == 0:
        return vmul(z, _sigmoid_of_power(vmul(z, vset(_MINUS_LOG2_E))))
    if code == 1:
        return vmul(vmul(vset(_HALF), z), vadd(one, verf(vmul(z, vset(_SQRT_HALF)))))
    if code == 2:
        return vmul(z, _sigmoid_of_power(_gelu_power(z, vmul(z, z))))
    h = vmax(vzero(), z)
    return vmul(h, h)


@inline
def _value_and_slope(code, z):
    one = vset(_ONE)
    if code == 0:
        s = _sigmoid_of_power(vmul(z, vset(_MINUS_LOG2_E)))
        h = vmul(z, s)
        return h, vfma(h, vsub(one, s), s)
    if code == 1:
        share = vmul(vset(_HALF), vadd(one, verf(vmul(z, vset(_SQRT_HALF)))))
        density = vmul(vexp(vmul(vmul(z, z), vneg(vset(_HALF)))), vset(_INV_SQRT_2PI))
        return vmul(z, share), vfma(z, density, share)
    if code == 2:
        square = vmul(z, z)
        s = _sigmoid_of_power(_gelu_power(z, square))
        h = vmul(z, s)
        inner = vfma(square, vset(np.float32(6.0) * _SQRT_2_OVER_PI * _CUBIC), vset(_TWO * _SQRT_2_OVER_PI))
        return h, vfma(vmul(h, vsub(one, s)), inner, s)
    r = vmax(vzero(), z)
    return vmul(r, r), vmul(vset(_TWO), r)


@inline
def _sums(sums, old, bias, i, n):
    v = load(sums, False, i, n)
    if old != 0:
        v = vadd(load(old, False, i, n), v)
    if bias != 0:
        v = vadd(v, load(bias, False, i, n))
    return v


@inline
def _put(address, half, i, v, n):
    if half and n >= W:
        vstore_flushed(address, i, v)
    else:
        store(address, half, i, v, n)


@inline
def _activate(code, half, v, z, out, hidden, i, n):
    """v: W sums at place i of a row, n of them valid. z 0: not gated; out 0: what goes into the activation is not kept."""
    if half:
        v = vflush_bf16(v)
    if out != 0:
        _put(out, half, i, v, n)
    if z != 0:
        h = vmul(_value(code, load(z, half, i, n)), v)
    else:
        h = _value(code, v)
    _put(hidden, half, i, h, n)


@inline
def _differentiate(code, half, dh, z, up, hidden, dz, dup, i, n):
    """dh: W sums at place i of a row, n of them valid. up 0: not gated."""
    h, slope = _value_and_slope(code, load(z, half, i, n))
    if up != 0:
        gate = load(up, half, i, n)
        _put(dup, half, i, vmul(dh, h), n)
        h = vmul(h, gate)
        dh = vmul(dh, gate)
    _put(hidden, half, i, h, n)
    _put(dz, half, i, vmul(dh, slope), n)


@inline
def _piece(code, what, half, rows, columns, sums, sums_row, old, old_row, bias, row, z, up, out, hidden, dz, dup):
    whole = columns - columns % W
    left = columns - whole
    for _ in range(rows):
        if what == ACTIVATE:
            for i in range(0, whole, W):
                _activate(code, half, _sums(sums, old, bias, i, W), z, out, hidden, i, W)
            if left:
                _activate(code, half, _sums(sums, old, bias, whole, left), z, out, hidden, whole, left)
        else:
            for i in range(0, whole, W):
                _differentiate(code, half, _sums(sums, old, bias, i, W), z, up, hidden, dz, dup, i, W)
            if left:
                _differentiate(code, half, _sums(sums, old, bias, whole, left), z, up, hidden, dz, dup, whole, left)
        sums += sums_row
        hidden += row
        if old:
            old += old_row
        if z:
            z += row
        if up:
            up += row
        if out:
            out += row
        if dz:
            dz += row
        if dup:
            dup += row


_FINISH = types.void(*[types.int64] * 15)


@intrinsic
def call_finish(tc, entry, half, rows, columns, sums, sums_row, old, old_row, bias, row, z, up, out, hidden, dz, dup):
    """A piece of a product: sums (+ old) (+ bias), then what `entry` = finish(...) does. Addresses, 0 where there is none; rows in bytes."""

    def codegen(ctx, bld, sig, args):
        function = ir.FunctionType(ir.VoidType(), [I64] * len(_FINISH.args))
        bld.call(bld.inttoptr(args[0], function.as_pointer()), args[1:])
        return ctx.get_dummy_value()

    return types.void(types.int64, *_FINISH.args), codegen


@functools.cache
def _compiled(code: int, what: int) -> Any:
    def finish(half, rows, columns, sums, sums_row, old, old_row, bias, row, z, up, out, hidden, dz, dup):
        _piece(code, what, half != 0, rows, columns, sums, sums_row, old, old_row, bias, row, z, up, out, hidden, dz, dup)

    return numba.cfunc(_FINISH, cache=True, error_model="numpy")(finish)


@functools.cache
def _address(code: int, what: int) -> int:
    compile = functools.partial(_compiled, code, what)
    return compile_ahead.NOWHERE if compile_ahead.is_postponed(compile) else lasting(int(compile().address))


def finish(activation: str, what: int) -> int:
    """The address of the end of a product, for `call_finish`; compiled at its first use.

    Each activation is compiled by itself, and by its address it serves every kind of product: its constants stay in registers, and nobody waits
    for the compilation of what he does not use.
    """
    return _address(CODES[activation], what)
