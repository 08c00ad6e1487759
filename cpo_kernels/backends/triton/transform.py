"""What lies between a raw logit x and the softmax: y = (x + bias) * mult, or cap * tanh((x + bias) * mult).

Device functions on float32 tensors of any shape. The constexpr flags drop what a call does not use.
"""

import math
from typing import NamedTuple

import triton
import triton.language as tl


@triton.jit
def tanh(u):
    """Relative error of a few ulp: an odd polynomial near 0, where (1 - e) / (1 + e) would cancel."""
    size = tl.abs(u)
    z = u * u
    p = -5.717045e-3 * z + 2.0650588e-2
    p = p * z - 5.3743497e-2
    p = p * z + 1.3331491e-1
    p = p * z - 3.3333284e-1
    near = u * z * p + u
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    return tl.where(size < 0.625, near, tl.where(u < 0.0, -far, far))


@triton.jit
def tanh_slope(u):
    """1 - tanh(u)^2, without its cancellation where tanh is near 1."""
    e = tl.exp(-2.0 * tl.abs(u))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def prescale(x, bias, mult, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr):
    """(x + bias) * mult; ``bias`` and ``mult`` are not looked at without their flag."""
    if HAS_BIAS:
        x += bias
    if SCALED:
        x *= mult
    return x


@triton.jit
def transform(x, bias, mult, cap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr):
    """The logit of the softmax, y."""
    u = prescale(x, bias, mult, HAS_BIAS, SCALED)
    return cap * tanh(u) if SOFTCAP else u


@triton.jit
def transform_slope(x, bias, mult, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr):
    """dy/dx in units of its value at y = 0, which is ``Transform.slope``."""
    return tanh_slope(prescale(x, bias, mult, HAS_BIAS, SCALED)) if SOFTCAP else 1.0


class Transform(NamedTuple):
    """``mult`` and ``cap`` of the device functions (cap 0: no softcap), and ``slope``: dy/dx at y = 0."""

    mult: float
    cap: float
    slope: float

    @property
    def flags(self) -> dict[str, bool]:
        """The constexpr arguments ``SOFTCAP`` and ``SCALED`` of the device functions."""
        return {"SOFTCAP": self.cap != 0.0, "SCALED": self.mult != 1.0}


def fold_transform(logit_scale: float, softcap: float, temperature: float) -> Transform:
    """The two numbers that logit_scale, softcap (0.0: none) and temperature come down to, and the slope.

    Raises:
        ValueError: a value that is not finite, a negative softcap, or a temperature that is not positive.
    """
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale is {logit_scale}; expected a finite number")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap is {softcap}; expected a finite number above 0, or 0 for none")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    slope = logit_scale / temperature
    return Transform(logit_scale / softcap, softcap / temperature, slope) if softcap else Transform(slope, 0.0, slope)
