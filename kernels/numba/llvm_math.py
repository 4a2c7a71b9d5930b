"""exp, log, tanh, erf and reciprocal of W float32, with errors of one or two units in the last place.

Polynomials of the Cephes library and of N. Juffa, and minimax fits (Lawson's iteration). NaN and infinities keep their meaning.
"""

from typing import Any

from llvmlite import ir

from cllm.kernels.numba.llvm import FEATURES, HAS_SCALEF, I32, VF, VI, W, call, const, const_int, fma, greater, less


def _horner(bld: Any, x: Any, coefficients: list[float]) -> Any:
    p = const(coefficients[0])
    for c in coefficients[1:]:
        p = fma(bld, p, x, const(c))
    return p


def _scale_by_power(bld: Any, p: Any, n: Any) -> Any:
    """p * 2**n for integral n in [-300, 300], with gradual underflow and overflow to infinity."""
    if HAS_SCALEF:
        name = "llvm.x86.avx512.mask.scalef.ps.512"
        return call(bld, name, VF, p, n, ir.Constant(VF, [0.0] * W), ir.IntType(16)(0xFFFF), I32(4))
    # fptosi of NaN is undefined: a NaN exponent becomes -300 here, and p carries the NaN on.
    n = bld.fptosi(greater(bld, n, const(-300.0)), VI)
    half = bld.ashr(n, const_int(1))
    for part in (half, bld.sub(n, half)):
        p = bld.fmul(p, bld.bitcast(bld.shl(bld.add(part, const_int(127)), const_int(23)), VF))
    return p


def _fraction(bld: Any, x: Any) -> Any:
    """x - floor(x)"""
    if HAS_SCALEF and "avx512dq" in FEATURES:
        down_without_exceptions = 9
        name = "llvm.x86.avx512.mask.reduce.ps.512"
        return call(bld, name, VF, x, I32(down_without_exceptions), ir.Constant(VF, [0.0] * W), ir.IntType(16)(0xFFFF), I32(4))
    return bld.fsub(x, call(bld, f"llvm.floor.v{W}f32", VF, x))


def _times_power_of_floor(bld: Any, p: Any, x: Any, lanes: Any) -> Any:
    """p * 2**floor(x) in the lanes of a mask, 0 in the others; floor(x) in [-300, 300] there."""
    if HAS_SCALEF:
        name = "llvm.x86.avx512.mask.scalef.ps.512"
        return call(bld, name, VF, p, x, ir.Constant(VF, [0.0] * W), bld.bitcast(lanes, ir.IntType(16)), I32(4))
    return bld.select(lanes, _scale_by_power(bld, p, call(bld, f"llvm.floor.v{W}f32", VF, x)), const(0.0))


_EXP = [1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1]


def _exp_reduced(bld: Any, r: Any) -> Any:
    """exp(r) for |r| <= ln(2)/2."""
    return bld.fadd(fma(bld, _horner(bld, r, _EXP), bld.fmul(r, r), r), const(1.0))


def exp(bld: Any, x: Any) -> Any:
    # The bounds are past the last finite and the first zero result; constants first, so NaN passes.
    x = less(bld, const(89.0), greater(bld, const(-105.0), x))
    n = call(bld, f"llvm.rint.v{W}f32", VF, bld.fmul(x, const(1.44269504088896341)))
    r = fma(bld, n, const(-0.693359375), x)
    r = fma(bld, n, const(2.12194440e-4), r)
    return _scale_by_power(bld, _exp_reduced(bld, r), n)


def exp2(bld: Any, x: Any) -> Any:
    x = less(bld, const(129.0), greater(bld, const(-152.0), x))
    n = call(bld, f"llvm.rint.v{W}f32", VF, x)
    r = bld.fmul(bld.fsub(x, n), const(0.693147180559945309))
    return _scale_by_power(bld, _exp_reduced(bld, r), n)


_LOG = [7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1]  # fmt: skip


def log(bld: Any, x: Any) -> Any:
    tiny = bld.fcmp_ordered("<", x, const(1.17549435e-38))
    scaled = bld.select(tiny, bld.fmul(x, const(8388608.0)), x)
    bits = bld.bitcast(scaled, VI)
    exponent = bld.ashr(bld.sub(bits, const_int(0x3F3504F3)), const_int(23))  # mantissa in [sqrt(1/2), sqrt(2))
    f = bld.fsub(bld.bitcast(bld.sub(bits, bld.shl(exponent, const_int(23))), VF), const(1.0))
    e = bld.fadd(bld.sitofp(exponent, VF), bld.select(tiny, const(-23.0), const(0.0)))
    square = bld.fmul(f, f)
    y = bld.fmul(bld.fmul(_horner(bld, f, _LOG), f), square)
    y = fma(bld, e, const(-2.12194440e-4), y)
    y = fma(bld, square, const(-0.5), y)
    y = fma(bld, e, const(0.693359375), bld.fadd(f, y))
    y = bld.select(bld.fcmp_ordered("==", x, const(float("inf"))), x, y)
    y = bld.select(bld.fcmp_ordered("==", x, const(0.0)), const(float("-inf")), y)
    return bld.select(bld.fcmp_unordered("<", x, const(0.0)), const(float("nan")), y)


_TANH = [-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1]


def tanh(bld: Any, x: Any) -> Any:
    t = call(bld, f"llvm.fabs.v{W}f32", VF, x)
    square = bld.fmul(x, x)
    near = fma(bld, bld.fmul(_horner(bld, square, _TANH), square), x, x)
    e = exp(bld, bld.fadd(t, t))
    far = bld.fsub(const(1.0), bld.fdiv(const(2.0), bld.fadd(e, const(1.0))))
    far = call(bld, f"llvm.copysign.v{W}f32", VF, far, x)
    return bld.select(bld.fcmp_ordered("<", t, const(0.625)), near, far)


_ERF_NEAR = [-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1]


def erf(bld: Any, x: Any) -> Any:
    t = call(bld, f"llvm.fabs.v{W}f32", VF, x)
    s = bld.fmul(x, x)
    near = fma(bld, _horner(bld, s, _ERF_NEAR), x, x)
    t = less(bld, const(4.0), t)  # erf(4) rounds to 1, and inf - inf is avoided
    s = bld.fmul(t, t)
    r = fma(bld, const(-1.72853470e-5), t, const(3.83197126e-4))
    u = fma(bld, const(-3.88396438e-3), t, const(2.42546219e-2))
    r = fma(bld, r, s, u)
    for c in (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1):
        r = fma(bld, r, t, const(c))
    far = bld.fsub(const(1.0), exp(bld, fma(bld, r, t, bld.fneg(t))))
    far = call(bld, f"llvm.copysign.v{W}f32", VF, far, x)
    return bld.select(bld.fcmp_ordered("<", t, const(0.927734375)), near, far)


# 2^r = 1 + r p(r) for 0 <= r <= 1: minimax fits (Lawson's iteration). Relative errors 8e-8, and 3e-6 for what is rounded to bfloat16.
EXP2_NORMAL = [1.86712629e-3, 9.01703830e-3, 5.57999075e-2, 0.240164452, 0.693151312, 1.0]
EXP2_COARSE = [1.34266066e-2, 5.22425990e-2, 0.241280147, 0.693044852, 1.0]


def exp2_normal(coefficients: list[float]) -> Any:
    """2^x for x < 127, in half of the instructions of exp2; NaN is kept, below 2^-126 it is 0."""

    def emit(bld: Any, x: Any) -> Any:
        # Denormal results would cost a hundred cycles each, and every hidden key of attention has one.
        normal = bld.fcmp_unordered(">=", x, const(-126.0))
        return _times_power_of_floor(bld, _horner(bld, _fraction(bld, x), coefficients), x, normal)

    return emit


def reciprocal(bld: Any, x: Any) -> Any:
    """1 / x for |x| from 2^-126 to 2^126, within a unit in the last place: an estimate of 14 bits and one step of Newton, an eighth of a division."""
    if not HAS_SCALEF:
        return bld.fdiv(const(1.0), x)
    estimate = call(bld, "llvm.x86.avx512.rcp14.ps.512", VF, x, ir.Constant(VF, [0.0] * W), ir.IntType(16)(0xFFFF))
    return fma(bld, estimate, fma(bld, bld.fneg(x), estimate, const(1.0)), estimate)
