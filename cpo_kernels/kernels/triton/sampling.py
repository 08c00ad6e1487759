"""One draw from a softmax a tile of columns at a time: two uniforms a row and tile, not one per logit.

Of y_j + g_j over a set of columns, with independent Gumbel variables g_j, the maximum is distributed as a Gumbel
variable located at the set's log-sum-exp, and is independent of which column attains it: that is column j with
probability softmax_j. So a tile draws its maximum, which competes with those of the other tiles, and a column by
inverse distribution function. Both uniforms come from Philox at (seed, row, tile), or with a seed for each row at (its
seed, tile), so a sample does not depend on the order in which tiles are visited or on how they are shared out.

Keys and columns of the best tile so far are kept in memory: a row may have any number of samples, and registers are
scarce. A key is read by all threads that hold its row and written by one of them, so barriers stand between the two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import IGNORE

# Columns that 4 threads of a tensor core's accumulator hold next to each other.
HELD_TOGETHER = tl.constexpr(8)
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
    threshold = tl.where(right_taken, threshold - left_mass, threshold)
    taken = tl.where(right_taken[:, None], right, left)
    if taken.shape[1] <= HELD_TOGETHER:
        column = offset + descend_in_place(taken, threshold)
    else:
        left, right = halves(taken)
        column = offset + DESCEND(left, right, tl.sum(left, axis=1), tl.sum(right, axis=1), threshold, DESCEND)
    return column


@triton.jit
def descend_in_place(masses, threshold):
    """Find the column as :func:`descend` does, among at most 8 that stay where they are: the halves are masks."""
    first = tl.zeros(threshold.shape, tl.int32)
    for step in tl.static_range(0, 3):
        half = 4 >> step
        place = tl.arange(0, masses.shape[1])[None, :] - first[:, None]
        left_mass = tl.sum(tl.where((place >= 0) & (place < half), masses, 0.0), axis=1)
        right_mass = tl.sum(tl.where((place >= half) & (place < 2 * half), masses, 0.0), axis=1)
        right_taken = go_right(threshold, left_mass, right_mass)
        threshold = tl.where(right_taken, threshold - left_mass, threshold)
        first = tl.where(right_taken, first + half, first)
    return first


@triton.jit
def exponential_variable(u):
    """Return -log(1 - u) for a uniform u in [0, 1), accurate near 0, where the smallest of many lies, and never 0."""
    u += HALF_SPACING
    return tl.where(u < 1e-3, u + 0.5 * u * u, -tl.log(1.0 - u))


@triton.jit
def find_seed(seed, seed_row, row, R, k):
    """Return the seed (BLOCK_R,) of sample k of each row and its first counter: the row, or 0 if the seed is its own.

    ``seed_row`` is the distance from a row's seeds to the next row's; 0 if they are those of all rows.
    """
    value = tl.load(seed + row.to(tl.int64) * seed_row + k, mask=row < R, other=0)
    return value, tl.where(seed_row == 0, row, 0)


@triton.jit
def uniforms(seed, row, tile):
    """Draw two independent uniforms (BLOCK_R,) in [0, 1) that depend on (seed, row, tile) only."""
    zero = row * 0
    first, second, _, _ = tl.philox(seed, row, zero + tile, zero, zero)
    return tl.uint_to_uniform_float(first), tl.uint_to_uniform_float(second)


@triton.jit
def begin_samples(keys, samples, wanted, row, R, num_samples):
    """Set the keys that a first tile has to exceed, which none does for a sample that is not wanted: it stays -100."""
    exists = row < R
    for k in range(0, num_samples):
        key = tl.full(row.shape, float("-inf"), tl.float32)
        if wanted is not None:
            asked = tl.load(wanted + (row.to(tl.int64) * num_samples + k), mask=exists, other=0) != 0
            key = tl.where(asked, key, float("inf"))
        tl.store(keys + (k * R + row), key, mask=exists)
        tl.store(samples + (k * R + row), tl.full(row.shape, IGNORE, tl.int32), mask=exists)


@triton.jit
def any_wins(won, key, ASK: tl.constexpr):
    """Tell whether the tile wins any row; without ASK, whether any row wants the sample at all."""
    asked = won if ASK else key < float("inf")
    return tl.max(asked.to(tl.int32), axis=0) > 0


def row_seeds(seed: Tensor, R: int) -> Tensor:
    """Return the seeds (R, K) of each row's samples, without distance between the rows if they share them.

    ``seed`` has one element or shape (R,), for one sample a row, or shape (1, K) or (R, K).

    Raises:
        ValueError: any other shape.
    """
    seeds = seed if seed.dim() == 2 else seed.reshape(-1, 1)
    if len(seeds) not in (1, R) or seed.dim() > 2:
        expected = f"shape (1, K) or ({R}, K)" if seed.dim() == 2 else f"one element or shape ({R},)"
        raise ValueError(f"seed must have {expected}, got {tuple(seed.shape)}")
    return (seeds if seeds.stride(1) == 1 or seeds.shape[1] == 1 else seeds.contiguous()).expand(R, -1)


def check_wanted(wanted: Tensor | None, seeds: Tensor) -> None:
    """Raise ``ValueError`` for a choice of samples that is not bool of the shape of the seeds (R, K)."""
    if wanted is not None and (wanted.shape != seeds.shape or wanted.dtype != torch.bool):
        shape = tuple(seeds.shape)
        raise ValueError(f"wanted must be torch.bool of shape {shape}, got {wanted.dtype} {tuple(wanted.shape)}")
