"""Activations and their derivatives in float32, for the ends of matrix products."""

import triton
import triton.language as tl

KINDS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu2": 3}
LOG2_E = tl.constexpr(1.4426950408889634)
ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_2_OVER_PI = tl.constexpr(0.7978845608028654)
ONE_OVER_ROOT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(-z * LOG2_E))


@triton.jit
def activate(z, KIND: tl.constexpr):
    if KIND == 0:
        return z * sigmoid(z)
    elif KIND == 1:
        return 0.5 * z * (1.0 + tl.erf(z * ROOT_HALF))
    elif KIND == 2:
        return z * sigmoid((z + 0.044715 * z * z * z) * (2.0 * ROOT_2_OVER_PI))  # (1 + tanh u) / 2 = sigmoid(2 u)
    else:
        positive = tl.where(z <= 0.0, 0.0, z)  # NaN stays
        return positive * positive


@triton.jit
def slope(z, KIND: tl.constexpr):
    if KIND == 0:
        s = sigmoid(z)
        return s * (1.0 + z * (1.0 - s))
    elif KIND == 1:
        return 0.5 * (1.0 + tl.erf(z * ROOT_HALF)) + z * tl.exp2(z * z * (-0.5 * LOG2_E)) * ONE_OVER_ROOT_2_PI
    elif KIND == 2:
        s = sigmoid((z + 0.044715 * z * z * z) * (2.0 * ROOT_2_OVER_PI))
        return s + z * s * (1.0 - s) * (2.0 * ROOT_2_OVER_PI) * (1.0 + 0.134145 * z * z)
    else:
        return 2.0 * tl.where(z <= 0.0, 0.0, z)
