"""How the fused linear forward shares the vocabulary out between programs, and combines their results row by row."""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .blocks import IGNORE

# Rows that one program combines, how many of their splits at a time, and its warps.
COMBINED_ROWS, COMBINED_SPLITS, COMBINING_WARPS = 32, 32, 4

# FLOPs of products that take as long as a byte from memory, by the size of an element: 788 TFLOP/s in half precision,
# 60 in float32 without TF32, and 4.3 TB/s, of an H200. Other GPUs have 75 to 300 and 10 to 80, by their vendors' words.
FLOPS_PER_BYTE = {2: 183, 4: 14}
# Of the maximum and the sum of a row in a split, written and read again.
PARTIAL_BYTES = 16
# The part of the shorter of products and traffic that the longer one does not hide. It decides between grids that
# differ in the shorter one, and bounds the longer one: it is at most as much above the least that there is.
EXPOSED = 0.05
# Splits are no more than multiprocessors, or than make so many rounds: the last one is then full enough.
MOST_ROUNDS = 32


class Grid(NamedTuple):
    """Programs of the first kernel: row_tiles * splits, in groups of ``group_tiles`` row tiles that run together."""

    row_tiles: int
    splits: int
    group_tiles: int
    split_tiles: int


class Tiling(NamedTuple):
    """What the time of a grid depends on besides the grid: tiles of vectors of some bytes, and the device."""

    block_r: int
    block_v: int
    vector_bytes: int
    element_size: int
    multiprocessors: int
    cache_bytes: int


def plan_grid(
    R: int,
    V: int,
    row_bytes: int,
    block_r: int,
    block_v: int,
    splits: int,
    multiprocessors: int,
    cache_bytes: int,
    element_size: int = 2,
) -> Grid:
    """Choose the grid of the least :func:`grid_time`, with ``splits`` splits if that is not 0.

    ``row_bytes`` are those of a hidden vector, of elements of ``element_size`` bytes.
    """
    tiling = Tiling(block_r, block_v, row_bytes, element_size, multiprocessors, cache_bytes)
    return fastest_grid(triton.cdiv(R, block_r), triton.cdiv(V, block_v), splits, tiling)


@lru_cache(4096)  # R varies from call to call
def fastest_grid(row_tiles: int, vocab_tiles: int, splits: int, tiling: Tiling) -> Grid:
    """Search splits and groups; fewest products first, so that the search ends where products alone take longer."""
    most = max(tiling.multiprocessors, MOST_ROUNDS * tiling.multiprocessors // row_tiles)
    wanted = [splits] if splits else range(1, min(vocab_tiles, most) + 1)
    shares = {triton.cdiv(vocab_tiles, s) for s in wanted}  # tiles of a split
    sizes = sorted({triton.cdiv(row_tiles, groups) for groups in range(1, row_tiles + 1)}, reverse=True)
    best, least = None, math.inf
    for share in sorted(shares, key=lambda share: (products(row_tiles, vocab_tiles, share, tiling), -share)):
        if products(row_tiles, vocab_tiles, share, tiling) >= least:
            break
        for size in sizes:
            # No split is without a tile.
            grid = Grid(row_tiles, triton.cdiv(vocab_tiles, share), size, share)
            time = grid_time(grid, vocab_tiles, tiling)
            if time < least:
                best, least = grid, time
    assert best is not None
    return best


def grid_time(grid: Grid, vocab_tiles: int, tiling: Tiling) -> float:
    """Return the time of a grid, the longer of products and traffic, in products of two vectors."""
    multiplied = products(grid.row_tiles, vocab_tiles, grid.split_tiles, tiling)
    per_vector = FLOPS_PER_BYTE[tiling.element_size] * tiling.element_size / 2
    moved = vectors_read(grid, vocab_tiles, tiling) * per_vector
    return max(multiplied, moved) + EXPOSED * min(multiplied, moved)


def products(row_tiles: int, vocab_tiles: int, split_tiles: int, tiling: Tiling) -> int:
    """Count products of vectors in rounds of a program on each multiprocessor, idle ones among them."""
    rounds = triton.cdiv(row_tiles * triton.cdiv(vocab_tiles, split_tiles), tiling.multiprocessors) * split_tiles
    return rounds * tiling.multiprocessors * tiling.block_r * tiling.block_v


def vectors_read(grid: Grid, vocab_tiles: int, tiling: Tiling) -> float:
    """Count the vectors that are read from memory, in waves of programs that start together and keep step.

    A wave reads each split's words once, whatever the number of its row tiles. The hidden vectors of a wave are read
    once for all tiles of the vocabulary if they fill at most half of the L2 cache, else once for each.
    """
    row_tiles, splits, size, split_tiles = grid
    programs, at_once = size * splits, tiling.multiprocessors
    waves = triton.cdiv(row_tiles * splits, at_once)
    # A wave ends within the row tiles of a split, which the next wave reads again.
    reads = min(triton.cdiv(row_tiles, size) * splits + waves - 1, waves * splits)
    words = reads * vocab_tiles * tiling.block_v / splits
    if programs % at_once == 0:
        groups = 1
    else:
        groups = at_once // programs if at_once % programs == 0 else (at_once - 2) // programs + 2
    together = min(row_tiles, at_once, groups * size)
    cached = 2 * together * tiling.block_r * tiling.vector_bytes <= tiling.cache_bytes and size <= at_once
    loads = row_tiles if cached else min(waves * together, row_tiles * splits) * split_tiles
    partials = row_tiles * splits * PARTIAL_BYTES / tiling.vector_bytes
    return words + (loads + partials) * tiling.block_r


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
    do_not_specialize=["R", "num_samples", "splits"],
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
    keys,  # (splits, num_samples, R) or None
    split_samples,  # (splits, num_samples, R) or None
    targets,  # (N,)
    row_starts,  # (R + 1,) or None
    stats,  # (2, R) out
    logps,  # (N,) target logits in, log-probabilities out
    samples,  # (R, num_samples) out, or None
    entropy,  # (R,) out, or None
    R,
    num_samples,
    V,
    splits,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Combine statistics, log-probabilities, samples and entropy of BLOCK_R rows, BLOCK_S splits at a time."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    exists = row < R
    column, block = tl.minimum(row, R - 1)[None, :], tl.arange(0, BLOCK_S)[:, None]
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK_S):
        at, inside = (first + block).to(tl.int64) * R + column, first + block < splits  # (BLOCK_S, BLOCK_R)
        tops = tl.load(maxima + at, mask=inside, other=float("-inf"))
        top = tl.maximum(top, tl.max(tops, axis=0))

    mass = tl.zeros((BLOCK_R,), tl.float32)
    tilt = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, splits, BLOCK_S):
        at, inside = (first + block).to(tl.int64) * R + column, first + block < splits
        # A row of nothing but -inf has no distribution: -inf - -inf makes its results NaN.
        shift = tl.load(maxima + at, mask=inside, other=float("-inf")) - top[None, :]
        masses = tl.load(sums + at, mask=inside, other=0.0)
        mass += tl.sum(tl.exp(shift) * masses, axis=0)
        if entropy is not None:
            moved_tilts = moved(tl.load(tilts + at, mask=inside, other=0.0), masses, shift)
            tilt += tl.sum(tl.exp(shift) * moved_tilts, axis=0)
    log_sum = tl.log(mass)
    tl.store(stats + row, top, mask=exists)
    tl.store(stats + R + row, log_sum, mask=exists)
    if entropy is not None:
        tl.store(entropy + row, log_sum - tilt / mass, mask=exists)

    if samples is not None:
        for k in range(0, num_samples):
            best = tl.full((BLOCK_R,), float("-inf"), tl.float32)
            sample = tl.full((BLOCK_R,), IGNORE, tl.int32)
            for first in range(0, splits, BLOCK_S):
                at = ((first + block).to(tl.int64) * num_samples + k) * R + column
                rivals = tl.load(keys + at, mask=first + block < splits, other=float("-inf"))
                key, winner = tl.max(rivals, axis=0, return_indices=True)
                won = key > best
                winner = ((first + winner).to(tl.int64) * num_samples + k) * R + row
                sample = tl.where(won, tl.load(split_samples + winner, mask=won & exists, other=IGNORE), sample)
                best = tl.where(won, key, best)
            drawn = tl.where(mass > 0.0, sample, IGNORE).to(tl.int64)
            tl.store(samples + row.to(tl.int64) * num_samples + k, drawn, mask=exists)

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
    samples (R,) or (R, K) int64, as the seeds are; entropy (R,) float32, in nats.
    """

    stats: Tensor
    logps: Tensor
    samples: Tensor | None
    entropy: Tensor | None


class Partials(NamedTuple):
    """Results of each split: max, sum and entropy's sum (splits, R), keys of the samples and samples (splits, K, R)."""

    maxima: Tensor
    sums: Tensor
    tilts: Tensor | None
    keys: Tensor | None
    samples: Tensor | None


def new_partials(splits: int, R: int, num_samples: int, device: torch.device, *, entropy: bool) -> Partials:
    """Allocate the results of all splits, float32 and for samples int32; None for those that are not asked for."""
    maxima, sums, *tilts = torch.empty((2 + entropy, splits, R), dtype=torch.float32, device=device)
    shape = (splits, num_samples, R)
    keys = torch.empty(shape, dtype=torch.float32, device=device) if num_samples else None
    samples = torch.empty(shape, dtype=torch.int32, device=device) if num_samples else None
    return Partials(maxima, sums, tilts[0] if tilts else None, keys, samples)


def combine_splits(
    result: LinearForward, partials: Partials, targets: Tensor, row_starts: Tensor | None, V: int
) -> None:
    """Fill ``result``, whose ``logps`` hold the logits of the targets, from the results of the splits."""
    splits, R = partials.maxima.shape
    combine_splits_kernel[(triton.cdiv(R, COMBINED_ROWS),)](
        *partials,
        targets,
        row_starts,
        *result,
        R,
        0 if result.samples is None else result.samples.shape[1],
        V,
        splits,
        BLOCK_R=COMBINED_ROWS,
        BLOCK_S=COMBINED_SPLITS,
        num_warps=COMBINING_WARPS,
        **tuning.sharing_registers(partials.maxima.device, COMBINING_WARPS, programs=4),
    )
