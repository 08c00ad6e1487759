"""One draw from a softmax a tile of columns at a time: two uniforms a row and tile, not one per logit.

Of y_j + g_j over a set of columns, with independent Gumbel variables g_j, the maximum is distributed as a Gumbel
variable located at the set's log-sum-exp, and is independent of which column attains it: that is column j with
probability softmax_j. So a tile draws its maximum, which competes with those of the other tiles, and a column by
inverse distribution function. Both uniforms come from Philox at (seed, row, tile), or with a seed for each row at (its
seed, tile), so a sample does not depend on the order in which tiles are visited or on how they are shared out.
"""

import triton
import triton.language as tl

# Spacing of the uniforms of `uint_to_uniform_float` near 0; half of it keeps them away from 0 itself.
HALF_SPACING = tl.constexpr(2.0**-32)


@triton.jit
def halves(x):
    """Split (BLOCK_R, W) into its left and its right half (BLOCK_R, W / 2)."""
    pairs = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def go_right(threshold, left_mass, right_mass):
    """Tell whether the threshold lies in the right part. Rounding never leads into a part of mass 0."""
    return (threshold >= left_mass) & (right_mass > 0.0)


@triton.jit
def descend(left, right, left_mass, right_mass, threshold, DESCEND: tl.constexpr):
    """Find the column (BLOCK_R,) of [left, right] where the running sum of the masses passes the threshold.

    Each step halves the columns and adds every mass up again; a prefix sum would exchange masses between threads.
    ``DESCEND`` is this function: Triton 3.4 follows a name without an end when it hashes a function that has its own.
    """
    right_taken = go_right(threshold, left_mass, right_mass)
    offset = tl.where(right_taken, left.shape[1], 0)
    if left.shape[1] == 1:
        column = offset
    else:
        threshold = tl.where(right_taken, threshold - left_mass, threshold)
        left, right = halves(tl.where(right_taken[:, None], right, left))
        column = offset + DESCEND(left, right, tl.sum(left, axis=1), tl.sum(right, axis=1), threshold, DESCEND)
    return column


@triton.jit
def exponential_variable(u):
    """Return -log(1 - u) for a uniform u in [0, 1), accurate near 0, where the smallest of many lies, and never 0."""
    u += HALF_SPACING
    return tl.where(u < 1e-3, u + 0.5 * u * u, -tl.log(1.0 - u))


@triton.jit
def find_seed(seed, row, R, ROW_SEEDS: tl.constexpr):
    """Return seed and first counter (BLOCK_R,) of each row: the call's seed and the row, or the row's seed and 0."""
    if ROW_SEEDS:
        value, counter = tl.load(seed + row, mask=row < R, other=0), row * 0
    else:
        value, counter = tl.load(seed), row
    return value, counter


@triton.jit
def uniforms(seed, row, tile):
    """Draw two independent uniforms (BLOCK_R,) in [0, 1) that depend on (seed, row, tile) only."""
    zero = row * 0
    first, second, _, _ = tl.philox(seed, row, zero + tile, zero, zero)
    return tl.uint_to_uniform_float(first), tl.uint_to_uniform_float(second)
