"""Random numbers that are a function of a seed and a counter: nothing is drawn in order, so nothing depends on order.

The generator is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) in int64
tensors, whose products and sums wrap around at 64 bits.
"""

from __future__ import annotations

from torch import Tensor

# 2**64 divided by the golden ratio, and the multipliers of the finaliser, as signed 64-bit integers.
GOLDEN = -7046029254386353131
MULTIPLIERS = (-4658895280553007687, -7723592293110705685)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 right and fill with zeros; torch's own shift would fill with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64, a bijection in which each bit depends on all: int64 of any shape."""
    x = (x ^ shift_right(x, 30)) * MULTIPLIERS[0]
    x = (x ^ shift_right(x, 27)) * MULTIPLIERS[1]
    return x ^ shift_right(x, 31)


def counted(seeds: Tensor, counters: Tensor) -> Tensor:
    """Return 64 random bits, as int64, for each pair of seed and counter, broadcast; seeds may be 0, 1, 2, ..."""
    return mix(mix(seeds) + (counters + 1) * GOLDEN)


def uniforms(seeds: Tensor, counters: Tensor) -> Tensor:
    """Return a float64 uniform in [0, 1) for each pair of seed and counter, broadcast; all its 53 bits are random."""
    return shift_right(counted(seeds, counters), 11).double() * 2.0**-53
