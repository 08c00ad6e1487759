"""Log-likelihoods, samples and entropy straight from hidden (R, H) and weight (V, H): logits are never written.

A program keeps BLOCK_R rows and walks its share of the vocabulary, BLOCK_V columns at a time: a product over H in
float32 on the tensor cores, then an epilogue in registers: the head's transform, the logits of the row's targets, a
running max and sum, and on request the entropy and samples of each row. A second kernel combines the shares (splits) of
each row in a fixed order. There are no atomics.

Predicted cost on Hopper, in clocks of a multiprocessor per logit: H / 2048 for the product in 16 bits, and an epilogue
of one exponential (16 a clock) and about 6 other operations (128 a clock), 0.11: 5 % of the product at H = 4096, and
about 9 % with sampling and entropy. A product that writes float32 logits and a row kernel that reads them move 8 bytes
a logit at 20 bytes a clock (4.8 TB/s, 132 multiprocessors), 0.4: 20 % of the product at H = 4096, as long as the
product at H = 800. So the fused kernel is ahead unless the library's product beats this one by 15 % at H = 4096; the
smaller H, the further.
"""

from collections.abc import Mapping
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cpo_kernels.kernels.device import is_host, made_current, multiprocessors_and_cache
from cpo_kernels.kernels.transform import Transform, fold_transform

from . import tuning
from .blocks import contiguous
from .products import has_descriptor, product_of_blocks, product_of_pointers
from .sampling import (
    HELD_TOGETHER,
    any_wins,
    begin_samples,
    check_wanted,
    descend,
    exponential_variable,
    find_seed,
    halves,
    row_seeds,
    uniforms,
)
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
    if x.shape[1] <= HELD_TOGETHER:
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


# What varies from call to call (lengths, and where slices and partial results begin) must not select a kernel.
@triton.jit(
    do_not_specialize=["R", "num_samples", "seed_row", "row_tiles", "splits", "group_tiles", "split_tiles"],
    do_not_specialize_on_alignment=[
        "targets",
        "row_starts",
        "seed",
        "wanted",
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
    seed,  # (R, num_samples), rows seed_row apart, or None
    wanted,  # (R, num_samples), or None for all samples
    target_logits,  # (N,) out
    maxima,  # (splits, R) out
    sums,  # (splits, R) out
    tilts,  # (splits, R) out, or None without entropy
    keys,  # (splits, num_samples, R) out, or None without a seed
    samples,  # (splits, num_samples, R) out, -100 for none, or None without a seed
    R,
    num_samples,
    V,
    H,
    seed_row,
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
    if seed is not None:
        keys += split.to(tl.int64) * num_samples * R
        samples += split.to(tl.int64) * num_samples * R
        begin_samples(keys, samples, wanted, row, R, num_samples)

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
            tl.debug_barrier()  # the keys of the tile before are written
            for k in range(0, num_samples):
                row_seed, counter = find_seed(seed, seed_row, row, R, k)
                u, place = uniforms(row_seed, counter, tile)
                tile_key = tile_top + tl.log(tile_mass) - tl.log(exponential_variable(u))
                key = tl.load(keys + (k * R + row), mask=row < R, other=float("inf"))
                won = tile_key > key
                tl.debug_barrier()  # every thread has read the key
                tl.store(keys + (k * R + row), tile_key, mask=won)
                if any_wins(won, key, ASK):
                    chosen = descend(left, right, left_mass, right_mass, place * tile_mass, descend)
                    tl.store(samples + (k * R + row), first_column + chosen, mask=won)

        new_top = tl.maximum(top, tile_top)
        shift, tile_shift = top - finite_centre(new_top), tile_top - finite_centre(new_top)
        if tilts is not None:
            tilt = tl.exp(shift) * moved(tilt, mass, shift)
            tilt += tl.exp(tile_shift) * moved(left_tilt + right_tilt, tile_mass, tile_shift)
        mass = tl.exp(shift) * mass + tl.exp(tile_shift) * tile_mass
        top = new_top

    out, exists = split.to(tl.int64) * R + row, row < R
    tl.store(maxima + out, top, mask=exists)
    tl.store(sums + out, mass, mask=exists)
    if tilts is not None:
        tl.store(tilts + out, tilt, mask=exists)


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
    wanted: Tensor | None = None,
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
            int64, a seed for each row: its sample is a function of (its seed, ``BLOCK_V``) and of its logits. Or
            (1, K) or (R, K) int64: K samples a row from one product, each as from a call with its column of seeds.
        wanted: (R, K) bool, which samples to draw; None: all. The others are -100, and a tile of rows none of which
            wants the sample with a number does not look for it.
        entropy: whether to return the entropy of each row.
        config: ``{"BLOCK_R", "BLOCK_V", "BLOCK_H", "TMA", "num_warps", "num_stages"}`` and optionally ``"SPLITS"``;
            None: the table's entry for ``"linear_forward"``, or ``"linear_sample"`` with a seed or the entropy, among
            those without ``"TMA"`` if the strides rule descriptors out.

    Returns:
        :class:`LinearForward`. A row without a distribution (NaN, or nothing but -inf) has samples of -100.

    Raises:
        ValueError: a logit_scale, softcap or temperature out of its domain, or seeds or ``wanted`` of a wrong shape.
    """
    if is_host(hidden.device) and hidden.dtype == torch.bfloat16:
        hidden, weight = hidden.float(), weight.float()  # the interpreter would multiply the bits as integers
    arguments = (hidden, weight, targets.contiguous(), contiguous(row_starts), contiguous(bias))
    launch = partial(one_product, *arguments, fold_transform(logit_scale, softcap, temperature), config)
    if seed is None:
        return launch(None, None, entropy)
    seeds = row_seeds(seed, hidden.shape[0])
    check_wanted(wanted, seeds)
    result = launch(seeds, wanted, entropy)
    if seed.dim() < 2 and result.samples is not None:
        result = result._replace(samples=result.samples.squeeze(1))
    return result


def one_product(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    bias: Tensor | None,
    head: Transform,
    config: Mapping[str, int] | None,
    seeds: Tensor | None,
    wanted: Tensor | None,
    entropy: bool,
) -> LinearForward:
    """Run :func:`linear_forward` with seeds (R, K) or None, on contiguous vectors."""
    (R, H), V = hidden.shape, weight.shape[0]
    num_samples = 0 if seeds is None else seeds.shape[1]
    new = hidden.new_empty
    result = LinearForward(
        stats=new((2, R), dtype=torch.float32),
        logps=new(targets.shape, dtype=torch.float32),
        samples=new((R, num_samples), dtype=torch.int64) if num_samples else None,
        entropy=new((R,), dtype=torch.float32) if entropy else None,
    )
    if R == 0:
        return result
    kernel = "linear_sample" if num_samples or entropy else "linear_forward"
    descriptors = has_descriptor(hidden) and has_descriptor(weight)
    config = dict(config or tuning.config(kernel, hidden.device, V, hidden.dtype, H, descriptors=descriptors))
    blocks = config["BLOCK_R"], config["BLOCK_V"], config["BLOCK_H"]
    tma = bool(config.pop("TMA", 0)) and descriptors
    facts, size = multiprocessors_and_cache(hidden.device), hidden.element_size()
    grid = plan_grid(R, V, H * size, *blocks[:2], config.pop("SPLITS", 0), *facts, size)
    partials = new_partials(grid.splits, R, num_samples, hidden.device, entropy=entropy)
    with made_current(hidden.device):
        linear_forward_kernel[(grid.row_tiles * grid.splits,)](
            TensorDescriptor.from_tensor(hidden, [blocks[0], blocks[2]]) if tma else hidden,
            TensorDescriptor.from_tensor(weight, [blocks[1], blocks[2]]) if tma else weight,
            bias,
            targets,
            row_starts,
            seeds,
            None if wanted is None else wanted.contiguous().view(torch.uint8),
            result.logps,
            *partials,
            R,
            num_samples,
            V,
            H,
            0 if seeds is None else seeds.stride(0),
            *hidden.stride(),
            *weight.stride(),
            *grid,
            head.mult,
            head.cap,
            TMA=tma,
            EVEN_V=V % blocks[1] == 0,
            EVEN_H=H % blocks[2] == 0,
            ASK=asks(hidden),
            **head.flags,
            **config,
            **tuning.sharing_registers(hidden.device, config["num_warps"]),
        )
        combine_splits(result, partials, targets, row_starts, V)
    return result


def asks(hidden: Tensor) -> bool:
    """Tell whether a tile looks for the column of a sample only where it wins a row.

    Products in half precision lie in tensor memory on sm_100, where triton 3.6 finds no layout for a condition that
    depends on them. To look for a column in every tile takes less than 1 % of the time of a product at H = 4096.
    """
    return hidden.dtype == torch.float32 or not tuning.architecture(hidden.device).startswith("sm_10")
