"""Rows of int8 with one float32 scale each inside the kernels: the bits of `quantize_rows` and `dequantize_rows` of kernels/quantization.py."""

import numpy as np
from llvmlite import ir
from numba import types

from cllm.kernels.numba import llvm
from cllm.kernels.numba.launch import float32_at, inline, jit, load, put_float32, store
from cllm.kernels.numba.llvm import I8, VF, VI, intrinsic
from cllm.kernels.numba.simd import W, vabs, vdiv, vec, vhmax, vmax, vmax_nan, vmin, vmul, vrint, vset, vzero

_BYTES = ir.VectorType(I8, W)
_LARGEST, _ONE, _INFINITY, _NAN = np.float32(127.0), np.float32(1.0), np.float32(np.inf), np.float32(np.nan)


@intrinsic
def _get(tc, address):
    """W int8 as float32."""

    def codegen(ctx, bld, sig, args):
        return bld.sitofp(llvm.load(bld, bld.inttoptr(args[0], I8.as_pointer()), _BYTES, 1), VF)

    return vec(types.intp), codegen


@intrinsic
def _get_masked(tc, address, n):
    """The first n of them; the others are 0."""

    def codegen(ctx, bld, sig, args):
        return bld.sitofp(llvm.masked_load(bld, bld.inttoptr(args[0], I8.as_pointer()), _BYTES, args[1]), VF)

    return vec(types.intp, types.intp), codegen


@intrinsic
def _put(tc, address, v):
    """W whole numbers as int8."""

    def codegen(ctx, bld, sig, args):
        llvm.store(bld, bld.trunc(bld.fptosi(args[1], VI), _BYTES), bld.inttoptr(args[0], I8.as_pointer()), 1)
        return ctx.get_dummy_value()

    return types.void(types.intp, vec), codegen


@intrinsic
def _put_masked(tc, address, v, n):
    """The first n of them."""

    def codegen(ctx, bld, sig, args):
        llvm.masked_store(bld, bld.trunc(bld.fptosi(args[1], VI), _BYTES), bld.inttoptr(args[0], I8.as_pointer()), args[2])
        return ctx.get_dummy_value()

    return types.void(types.intp, vec, types.intp), codegen


@inline
def _load(address, n):
    if n >= W:
        return _get(address)
    return _get_masked(address, n)


@jit
def quantize_row(x, half, dim, target, scale_at):
    """A row of `dim` numbers at x -> int8 at `target` and a float32 at `scale_at`."""
    top = vzero()
    for c in range(0, dim, W):
        top = vmax_nan(vabs(load(x, half, c, dim - c)), top)
    largest = vhmax(top)
    finite = largest < _INFINITY
    scale = largest / _LARGEST if finite else _NAN
    divisor, high, low = vset(scale if scale > 0.0 else _ONE), vset(_LARGEST), vset(-_LARGEST)
    for c in range(0, dim, W):
        v = vmin(vmax(vrint(vdiv(load(x, half, c, dim - c), divisor)), low), high) if finite else vzero()
        if dim - c >= W:
            _put(target + c, v)
        else:
            _put_masked(target + c, v, dim - c)
    put_float32(scale_at, 0, scale)


@jit
def dequantize_rows(source, source_row, scales, scales_row, rows, dim, half, target):
    """Rows of int8, their distances and those of their scales in bytes -> rows of `dim` numbers that follow each other at `target`."""
    size = 2 if half else 4
    for r in range(rows):
        at, to, scale = source + r * source_row, target + r * (dim * size), vset(float32_at(scales + r * scales_row, 0))
        for c in range(0, dim, W):
            store(to, half, c, vmul(_load(at + c, dim - c), scale), dim - c)
