"""Log-likelihoods, samples and entropy straight from hidden (R, H) and weight (V, H): logits are never written.

A program keeps BLOCK_R rows and walks its share of the vocabulary, BLOCK_V columns at a time: a product over H in
float32 on the tensor cores, then an epilogue in registers: the head's transform, the logits of the row's targets, a
running max and sum, and on request the entropy and one sample a row. A second kernel combines the shares (splits) of
each row in a fixed order. There are no atomics.

Predicted cost on Hopper, in clocks of a multiprocessor per logit: H / 2048 for the product in 16 bits, and an epilogue
of one exponential (16 a clock) and about 6 other operations (128 a clock), 0.11: 5 % of the product at H = 4096, and
about 9 % with sampling and entropy. A product that writes float32 logits and a row kernel that reads them move 8 bytes
a logit at 20 bytes a clock (4.8 TB/s, 132 multiprocessors), 0.4: 20 % of the product at H = 4096, as long as the
product at H = 800. So the fused kernel is ahead unless the library's product beats this one by 15 % at H = 4096; the
smaller H, the further.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cpo_kernels.kernels.device import is_host, made_current, multiprocessors_and_cache
from cpo_kernels.kernels.transform import fold_transform

from . import tuning
from .blocks import contiguous
from .sampling import descend, exponential_variable, find_seed, halves, uniforms
from .splits import (
    LinearForward,
    combine_splits,
    find_block,
    find_tokens,
    finite_centre,
    most_tokens,
    moved,
    new_partials,
    plan_grid,
)
from .transform import transform

LOWEST = tl.constexpr(-3.0e38)
# Columns that 4 threads of a tensor core's accumulator hold next to each other.
PICKED_TOGETHER = tl.constexpr(8)


@triton.jit
def product_of_blocks(
    hidden, weight, first_row, first_column, H, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Return hidden @ weight.T (BLOCK_R, BLOCK_V), read through descriptors, which give 0 outside the matrices."""
    acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        x = hidden.load([first_row, start])  # (BLOCK_R, BLOCK_H)
        w = weight.load([first_column, start])  # (BLOCK_V, BLOCK_H)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    return acc


@triton.jit
def product_of_pointers(
    hidden,
    weight,
    row,
    column,
    H,
    hidden_strides,
    weight_strides,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    """Return hidden @ weight.T (BLOCK_R, BLOCK_V) for any strides; ``row`` and ``column`` are inside the matrices."""
    unit = tl.arange(0, BLOCK_H)
    x_at = hidden + row[:, None].to(tl.int64) * hidden_strides[0] + unit[None, :] * hidden_strides[1]
    w_at = weight + column[None, :].to(tl.int64) * weight_strides[0] + unit[:, None] * weight_strides[1]
    acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        if EVEN_H:
            x = tl.load(x_at)  # (BLOCK_R, BLOCK_H)
            w = tl.load(w_at)  # (BLOCK_H, BLOCK_V)
        else:
            x = tl.load(x_at, mask=start + unit[None, :] < H, other=0.0)
            w = tl.load(w_at, mask=start + unit[:, None] < H, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_at += BLOCK_H * hidden_strides[1]
        w_at += BLOCK_H * weight_strides[1]
    return acc


@triton.jit
def head_logits(x, first_column, bias, V, mult, cap, EVEN_V: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr):
    """Turn raw logits into those of the softmax (BLOCK_R, BLOCK_V); -inf from column V on."""
    column = first_column + tl.arange(0, x.shape[1])
    offset = 0.0
    if bias is not None:
        offset = tl.load(bias + tl.minimum(column, V - 1)).to(tl.float32)[None, :]
    y = transform(x, offset, mult, cap, bias is not None, SOFTCAP, SCALED)
    if not EVEN_V:  # noqa: SIM102 - this is decided when compiled, the next when run
        if first_column + x.shape[1] > V:  # the last tile only: a mask takes registers, which are scarce
            y = tl.where(column[None, :] < V, y, float("-inf"))
    return y


@triton.jit
def pick(x, column, PICK: tl.constexpr):
    """Return x[:, column] for columns (BLOCK_R,) inside x: halves it as far as halves lie in a thread's registers.

    ``PICK`` is this function, as for :func:`~cpo_kernels.kernels.triton.sampling.descend`.
    """
    if x.shape[1] <= PICKED_TOGETHER:
        at = tl.arange(0, x.shape[1])[None, :] == column[:, None]
        picked = tl.sum(tl.where(at, x, 0.0), axis=1)
    else:
        left, right = halves(x)
        right_taken = column >= left.shape[1]
        column = tl.where(right_taken, column - left.shape[1], column)
        picked = PICK(tl.where(right_taken[:, None], right, left), column, PICK)
    return picked


@triton.jit
def store_target_logits(out, targets, row_starts, row, R, longest, y, first_column):
    """Write the logit of every token whose target lies in this tile; each target lies in exactly one."""
    begin, count = find_tokens(row_starts, row, R)  # read again for each tile: registers are scarce
    for i in range(0, longest):
        target = tl.load(targets + begin + i, mask=i < count, other=-1) - first_column
        hit = (i < count) & (target >= 0) & (target < y.shape[1])
        if tl.max(hit.to(tl.int32), axis=0) > 0:
            tl.store(out + begin + i, pick(y, tl.where(hit, target, 0).to(tl.int32), pick), mask=hit)


@triton.jit
def exponentials(y, centre, ENTROPY: tl.constexpr):
    """Return exp(y - centre), its sum over the columns, and the sum of exp(y - centre) * (y - centre)."""
    distance = y - centre[:, None]
    e = tl.exp(distance)
    tilt = centre * 0.0
    if ENTROPY:
        # A column of probability 0 adds 0 * -inf = 0.
        tilt = tl.sum(e * tl.maximum(distance, LOWEST), axis=1)
    return e, tl.sum(e, axis=1), tilt


@triton.jit
def any_wins(won, ASK: tl.constexpr):
    """Tell whether the tile wins any row; without ASK, return true."""
    return tl.max(won.to(tl.int32), axis=0) > 0 if ASK else True


# What varies from call to call (lengths, and where slices and partial results begin) must not select a kernel.
@triton.jit(
    do_not_specialize=["R", "row_tiles", "splits", "group_tiles", "split_tiles"],
    do_not_specialize_on_alignment=[
        "targets",
        "row_starts",
        "seed",
        "target_logits",
        "maxima",
        "sums",
        "tilts",
        "keys",
        "samples",
    ],
)
def linear_forward_kernel(
    hidden,  # (R, H), or its descriptor of blocks (BLOCK_R, BLOCK_H)
    weight,  # (V, H), or its descriptor of blocks (BLOCK_V, BLOCK_H)
    bias,  # (V,) or None
    targets,  # (N,)
    row_starts,  # (R + 1,) or None
    seed,  # (1,), or (R,) with ROW_SEEDS, or None
    target_logits,  # (N,) out
    maxima,  # (splits, R) out
    sums,  # (splits, R) out
    tilts,  # (splits, R) out, or None without entropy
    keys,  # (splits, R) out, or None without a seed
    samples,  # (splits, R) out, or None without a seed
    R,
    V,
    H,
    hidden_row,
    hidden_unit,
    weight_row,
    weight_unit,
    row_tiles,
    splits,
    group_tiles,
    split_tiles,
    mult,
    cap,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_H: tl.constexpr,
    ROW_SEEDS: tl.constexpr,
    ASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Write target logits, and what the columns of one split add to the statistics of BLOCK_R rows."""
    row_tile, split = find_block(row_tiles, splits, group_tiles)
    row = row_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    longest = most_tokens(row_starts, row, R)
    top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_R,), tl.float32)
    tilt = tl.zeros((BLOCK_R,), tl.float32)
    key = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    sample = tl.zeros((BLOCK_R,), tl.int32)

    last_tile = tl.minimum((split + 1) * split_tiles, tl.cdiv(V, BLOCK_V))
    for tile in range(split * split_tiles, last_tile):
        first_column = tile * BLOCK_V
        if TMA:
            x = product_of_blocks(hidden, weight, row_tile * BLOCK_R, first_column, H, BLOCK_R, BLOCK_V, BLOCK_H)
        else:
            x = product_of_pointers(
                hidden,
                weight,
                tl.minimum(row, R - 1),
                tl.minimum(first_column + tl.arange(0, BLOCK_V), V - 1),
                H,
                (hidden_row, hidden_unit),
                (weight_row, weight_unit),
                BLOCK_R,
                BLOCK_V,
                BLOCK_H,
                EVEN_H,
            )
        y = head_logits(x, first_column, bias, V, mult, cap, EVEN_V, SOFTCAP, SCALED)  # (BLOCK_R, BLOCK_V)
        store_target_logits(target_logits, targets, row_starts, row, R, longest, y, first_column)

        # Relative to the tile's own max: what a tile adds does not depend on the tiles before it.
        tile_top = tl.max(y, axis=1)
        centre = finite_centre(tile_top)
        # One half after the other, so that a thread never holds logits and exponentials of the whole tile.
        left, right = halves(y)  # (BLOCK_R, BLOCK_V / 2)
        left, left_mass, left_tilt = exponentials(left, centre, tilts is not None)
        right, right_mass, right_tilt = exponentials(right, centre, tilts is not None)
        tile_mass = left_mass + right_mass
        if seed is not None:
            # Read again for each tile: registers are scarce.
            row_seed, counter = find_seed(seed, row, R, ROW_SEEDS)
            u, threshold = uniforms(row_seed, counter, tile)
            tile_key = tile_top + tl.log(tile_mass) - tl.log(exponential_variable(u))
            won = tile_key > key
            key = tl.where(won, tile_key, key)
            if any_wins(won, ASK):
                chosen = descend(left, right, left_mass, right_mass, threshold * tile_mass, descend)
                sample = tl.where(won, first_column + chosen, sample)

        new_top = tl.maximum(top, tile_top)
        shift, tile_shift = top - finite_centre(new_top), tile_top - finite_centre(new_top)
        if tilts is not None:
            tilt = tl.exp(shift) * moved(tilt, mass, shift)
            tilt += tl.exp(tile_shift) * moved(left_tilt + right_tilt, tile_mass, tile_shift)
        mass = tl.exp(shift) * mass + tl.exp(tile_shift) * tile_mass
        top = new_top

    out = split.to(tl.int64) * R + row
    exists = row < R
    tl.store(maxima + out, top, mask=exists)
    tl.store(sums + out, mass, mask=exists)
    if tilts is not None:
        tl.store(tilts + out, tilt, mask=exists)
    if seed is not None:
        tl.store(keys + out, key, mask=exists)
        tl.store(samples + out, sample, mask=exists)


def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    *,
    seed: Tensor | None = None,
    entropy: bool = False,
    config: Mapping[str, int] | None = None,
) -> LinearForward:
    """Compute token log-probabilities under softmax(head(hidden @ weight.T)), without logits in memory.

    Nothing is read back to the host, and the results are bitwise repeatable. NaN or infinity in a row's logits makes
    its log-probabilities and its entropy NaN.

    Tensors may have any strides: ``hidden`` and ``weight`` are read in place, the rest is copied if not contiguous.

    Args:
        hidden: (R, H) float32, bfloat16 or float16. Products of float32 are exact, without TF32.
        weight: (V, H) of the same dtype.
        targets: (N,) int64, in [0, V) or -100; any other value gives NaN.
        row_starts: (R + 1,) int64, the tokens of row r being ``row_starts[r]:row_starts[r + 1]``; None for N == R.
        bias: (V,) of a floating-point dtype, or None.
        logit_scale: multiplies the biased logits.
        softcap: c of ``c * tanh(logit / c)``, applied next; 0.0 for none.
        temperature: divides the result.
        seed: one int64 on the device; draws one sample a row, whatever its targets. The samples are a function of
            (seed, row, block sizes) and of the logits: another seed for every call, or rows repeat each other. Or (R,)
            int64, a seed for each row: its sample is a function of (its seed, ``BLOCK_V``) and of its logits.
        entropy: whether to return the entropy of each row.
        config: ``{"BLOCK_R", "BLOCK_V", "BLOCK_H", "TMA", "num_warps", "num_stages"}`` and optionally ``"SPLITS"``;
            None: the table's entry for ``"linear_forward"``, or ``"linear_sample"`` with a seed or the entropy, among
            those without ``"TMA"`` if the strides rule descriptors out.

    Returns:
        :class:`LinearForward`. A row without a distribution (NaN, or nothing but -inf) has the sample -100.

    Raises:
        ValueError: a logit_scale, softcap or temperature out of its domain, or seeds that are not one or R.
    """
    if seed is not None and seed.numel() != 1 and seed.shape != hidden.shape[:1]:
        raise ValueError(f"seed must have one element or shape ({hidden.shape[0]},), got {tuple(seed.shape)}")
    if is_host(hidden.device) and hidden.dtype == torch.bfloat16:
        hidden, weight = hidden.float(), weight.float()  # the interpreter would multiply the bits as integers
    targets, row_starts, bias, seed = targets.contiguous(), contiguous(row_starts), contiguous(bias), contiguous(seed)
    (R, H), V = hidden.shape, weight.shape[0]
    new = hidden.new_empty
    result = LinearForward(
        stats=new((2, R), dtype=torch.float32),
        logps=new(targets.shape, dtype=torch.float32),
        samples=None if seed is None else new((R,), dtype=torch.int64),
        entropy=new((R,), dtype=torch.float32) if entropy else None,
    )
    head = fold_transform(logit_scale, softcap, temperature)
    if R == 0:
        return result
    kernel = "linear_forward" if seed is None and not entropy else "linear_sample"
    descriptors = has_descriptor(hidden) and has_descriptor(weight)
    config = dict(config or tuning.config(kernel, hidden.device, V, hidden.dtype, H, descriptors=descriptors))
    blocks = config["BLOCK_R"], config["BLOCK_V"], config["BLOCK_H"]
    tma = bool(config.pop("TMA", 0)) and descriptors
    facts = multiprocessors_and_cache(hidden.device)
    grid = plan_grid(R, V, H * hidden.element_size(), *blocks[:2], config.pop("SPLITS", 0), *facts)
    partials = new_partials(grid.splits, R, hidden.device, sample=seed is not None, entropy=entropy)
    with made_current(hidden.device):
        linear_forward_kernel[(grid.row_tiles * grid.splits,)](
            TensorDescriptor.from_tensor(hidden, [blocks[0], blocks[2]]) if tma else hidden,
            TensorDescriptor.from_tensor(weight, [blocks[1], blocks[2]]) if tma else weight,
            bias,
            targets,
            row_starts,
            seed,
            result.logps,
            *partials,
            R,
            V,
            H,
            *hidden.stride(),
            *weight.stride(),
            *grid,
            head.mult,
            head.cap,
            TMA=tma,
            EVEN_V=V % blocks[1] == 0,
            EVEN_H=H % blocks[2] == 0,
            ROW_SEEDS=seed is not None and seed.numel() > 1,  # for one row, the two kinds of seed mean the same
            ASK=asks(hidden),
            **head.flags,
            **config,
            **tuning.sharing_registers(hidden.device, config["num_warps"]),
        )
        combine_splits(result, partials, targets, row_starts, V)
    return result


def asks(hidden: Tensor) -> bool:
    """Tell whether a tile looks for its column only where a row needs it.

    Products in half precision lie in tensor memory on sm_100, where triton 3.6 finds no layout for a condition that
    depends on them. To look for a column in every tile takes less than 1 % of the time of a product at H = 4096.
    """
    return hidden.dtype == torch.float32 or not tuning.architecture(hidden.device).startswith("sm_10")


def has_descriptor(matrix: Tensor) -> bool:
    """Tell whether Hopper's copy engine can address the matrix: unit columns, rows at multiples of 16 bytes."""
    row_stride, column_stride = matrix.stride()
    size = matrix.element_size()
    aligned = matrix.storage_offset() * size % 16 == 0 and row_stride * size % 16 == 0
    return column_stride == 1 and row_stride >= matrix.shape[1] > 0 and aligned
