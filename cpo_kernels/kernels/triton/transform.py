"""From a raw logit x to the logit y of the softmax: y = (x + bias) * mult, or cap * tanh((x + bias) * mult).

Device functions on float32 tensors of any shape. The constexpr flags drop what a call does not use.
"""

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def exp(x):
    """Return e^x, 0 below -87: on NVIDIA three instructions, where ``tl.exp`` takes six to give denormal numbers.

    Subtract a maximum from x, not from ``x * LOG2_E``, whose rounding is an error of 1e-3 at logits of 1e4.
    """
    return tl.exp2(x * LOG2_E)


@triton.jit
def sigmoid_of_minus_twice(u):
    """Return 1 / (1 + e^(2u)), as the square of a reciprocal root, which costs half as much as a division."""
    r = tl.rsqrt(1.0 + tl.exp2(u * (2.0 * LOG2_E)))
    return r * r


@triton.jit
def tanh(u):
    """Return the hyperbolic tangent of u to a relative error of 8 * 2^-23.

    Near 0 it is an odd polynomial, because 1 - 2 / (1 + e^(2u)) would cancel.
    """
    z = u * u
    p = -5.717045e-3 * z + 2.0650588e-2
    p = p * z - 5.3743497e-2
    p = p * z + 1.3331491e-1
    p = p * z - 3.3333284e-1
    return tl.where(tl.abs(u) < 0.625, u * z * p + u, 1.0 - 2.0 * sigmoid_of_minus_twice(u))


@triton.jit
def tanh_slope(u):
    """Return 1 - tanh(u)^2, to 2e-7 of its largest value."""
    s = sigmoid_of_minus_twice(u)
    return 4.0 * s * (1.0 - s)


@triton.jit
def prescale(x, bias, mult, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr):
    """Return (x + bias) * mult; ``bias`` and ``mult`` are not read without their flag."""
    if HAS_BIAS:
        x += bias
    if SCALED:
        x *= mult
    return x


@triton.jit
def transform(x, bias, mult, cap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr):
    """Return the logit y of the softmax."""
    u = prescale(x, bias, mult, HAS_BIAS, SCALED)
    return cap * tanh(u) if SOFTCAP else u


@triton.jit
def transform_slope(x, bias, mult, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr):
    """Return dy/dx in units of its value at y = 0, which is ``Transform.slope``."""
    return tanh_slope(prescale(x, bias, mult, HAS_BIAS, SCALED)) if SOFTCAP else 1.0
