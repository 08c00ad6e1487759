"""How the fused linear forward shares the vocabulary out between programs, and combines their results row by row."""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .blocks import IGNORE

# Rows times splits that one program combines.
COMBINED = 1024


class Grid(NamedTuple):
    """Programs of the first kernel: row_tiles * splits, in groups of ``group_tiles`` row tiles that run together."""

    row_tiles: int
    splits: int
    group_tiles: int
    split_tiles: int


@lru_cache(4096)  # R varies from call to call
def plan_grid(
    R: int, V: int, row_bytes: int, block_r: int, block_v: int, splits: int, multiprocessors: int, cache_bytes: int
) -> Grid:
    """Choose the number of splits, unless ``splits`` gives it, that occupies all multiprocessors for the least time.

    One program runs on a multiprocessor at a time. Row tiles that run together read the same weight, so they do it
    once from memory; their hidden vectors are read again for each vocabulary tile, so they should fill at most half
    of the L2 cache.
    """
    row_tiles, vocab_tiles = triton.cdiv(R, block_r), triton.cdiv(V, block_v)

    def together(splits: int) -> int:
        return min(row_tiles, max(multiprocessors // splits, 1))

    def rounds(splits: int) -> int:
        return triton.cdiv(row_tiles * splits, multiprocessors) * triton.cdiv(vocab_tiles, splits)

    if not splits:
        candidates = range(1, min(vocab_tiles, multiprocessors) + 1)
        cached = [s for s in candidates if 2 * together(s) * block_r * row_bytes <= cache_bytes]
        splits = min(cached or candidates, key=rounds)
    split_tiles = triton.cdiv(vocab_tiles, splits)
    splits = triton.cdiv(vocab_tiles, split_tiles)  # no split is without a tile
    groups = triton.cdiv(row_tiles, together(splits))
    return Grid(row_tiles, splits, triton.cdiv(row_tiles, groups), split_tiles)


@triton.jit
def find_block(row_tiles, splits, group_tiles):
    """Return row tile and split of this program: row tiles first, in groups whose hidden vectors fit the L2 cache."""
    program = tl.program_id(0)
    first = program // (group_tiles * splits) * group_tiles
    size = tl.minimum(row_tiles - first, group_tiles)
    within = program % (group_tiles * splits)
    return first + within % size, within // size


@triton.jit
def find_tokens(row_starts, row, R):
    """Return the first token and the number of tokens (BLOCK_R,) of each row."""
    exists = row < R
    if row_starts is None:
        begin = row.to(tl.int64)
        count = exists.to(tl.int32)
    else:
        begin = tl.load(row_starts + row, mask=exists, other=0)
        count = (tl.load(row_starts + row + 1, mask=exists, other=0) - begin).to(tl.int32)
    return begin, count


@triton.jit
def most_tokens(row_starts, row, R):
    """Return the number of tokens of the row that has most; 1 without ``row_starts``."""
    if row_starts is None:
        most = 1
    else:
        _, count = find_tokens(row_starts, row, R)
        most = tl.max(count, axis=0)
    return most


@triton.jit
def finite_centre(top):
    """Return what to subtract before exp: the max, or 0 where every logit is -inf and -inf - -inf would be NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def moved(tilt, mass, shift):
    """Return the sum of e * (y - centre) after ``shift`` is added to y - centre; where the mass is 0, it stays."""
    return tilt + mass * tl.where(mass > 0.0, shift, 0.0)


# As for linear_forward_kernel, neither lengths nor alignment may select a compiled kernel.
@triton.jit(
    do_not_specialize=["R", "splits"],
    do_not_specialize_on_alignment=[
        "maxima",
        "sums",
        "tilts",
        "keys",
        "split_samples",
        "targets",
        "row_starts",
        "stats",
        "logps",
        "samples",
        "entropy",
    ],
)
def combine_splits_kernel(
    maxima,  # (splits, R)
    sums,  # (splits, R)
    tilts,  # (splits, R) or None
    keys,  # (splits, R) or None
    split_samples,  # (splits, R) or None
    targets,  # (N,)
    row_starts,  # (R + 1,) or None
    stats,  # (2, R) out
    logps,  # (N,) target logits in, log-probabilities out
    samples,  # (R,) out, or None
    entropy,  # (R,) out, or None
    R,
    V,
    splits,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Combine statistics, log-probabilities, samples and entropy of BLOCK_R rows from their splits."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.arange(0, BLOCK_S)[:, None]
    exists = row < R
    at = split.to(tl.int64) * R + tl.minimum(row, R - 1)[None, :]  # (BLOCK_S, BLOCK_R)
    inside = split < splits
    tops = tl.load(maxima + at, mask=inside, other=float("-inf"))
    masses = tl.load(sums + at, mask=inside, other=0.0)
    # A row of nothing but -inf has no distribution: -inf - -inf makes its results NaN.
    top = tl.max(tops, axis=0)
    shift = tops - top[None, :]
    mass = tl.sum(tl.exp(shift) * masses, axis=0)
    log_sum = tl.log(mass)
    tl.store(stats + row, top, mask=exists)
    tl.store(stats + R + row, log_sum, mask=exists)
    if entropy is not None:
        tilt = moved(tl.load(tilts + at, mask=inside, other=0.0), masses, shift)
        tl.store(entropy + row, log_sum - tl.sum(tl.exp(shift) * tilt, axis=0) / mass, mask=exists)
    if samples is not None:
        best = tl.argmax(tl.load(keys + at, mask=inside, other=float("-inf")), axis=0)
        sample = tl.load(split_samples + best.to(tl.int64) * R + row, mask=exists, other=0).to(tl.int64)
        tl.store(samples + row, tl.where(mass > 0.0, sample, IGNORE), mask=exists)

    begin, count = find_tokens(row_starts, row, R)
    for i in range(0, most_tokens(row_starts, row, R)):
        target = tl.load(targets + begin + i, mask=i < count, other=IGNORE)
        known = (target >= 0) & (target < V)
        logit = tl.load(logps + begin + i, mask=known, other=float("nan"))
        logp = tl.where(target == IGNORE, 0.0, logit - top - log_sum)
        tl.store(logps + begin + i, logp, mask=i < count)


class LinearForward(NamedTuple):
    """The results of one pass over the vocabulary; ``samples`` and ``entropy`` are None unless asked for.

    stats (2, R) float32: row maximum, and log-sum-exp minus maximum; logps (N,) float32, 0 for a target of -100;
    samples (R,) int64; entropy (R,) float32, in nats.
    """

    stats: Tensor
    logps: Tensor
    samples: Tensor | None
    entropy: Tensor | None


class Partials(NamedTuple):
    """Results of each split, (splits, R): max, sum and entropy's sum in float32; the sample's key, and the sample."""

    maxima: Tensor
    sums: Tensor
    tilts: Tensor | None
    keys: Tensor | None
    samples: Tensor | None


def new_partials(splits: int, R: int, device: torch.device, *, sample: bool, entropy: bool) -> Partials:
    """Allocate the results of all splits; None for those that are not asked for."""
    maxima, sums, tilts, keys = torch.empty((4, splits, R), dtype=torch.float32, device=device)
    samples = torch.empty((splits, R), dtype=torch.int32, device=device) if sample else None
    return Partials(maxima, sums, tilts if entropy else None, keys if sample else None, samples)


def combine_splits(
    result: LinearForward, partials: Partials, targets: Tensor, row_starts: Tensor | None, V: int
) -> None:
    """Fill ``result``, whose ``logps`` hold the logits of the targets, from the results of the splits."""
    splits, R = partials.maxima.shape
    block_s = triton.next_power_of_2(splits)
    block_r = max(COMBINED // block_s, 1)
    combine_splits_kernel[(triton.cdiv(R, block_r),)](
        *partials,
        targets,
        row_starts,
        *result,
        R,
        V,
        splits,
        BLOCK_R=block_r,
        BLOCK_S=block_s,
        num_warps=4,
        **tuning.LAUNCH,
    )
