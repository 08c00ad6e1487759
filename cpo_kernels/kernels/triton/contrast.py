"""The contrast of a chunk in one launch: segment sums, the ranked contrast, and the coefficient of every token.

One program owns one group. It adds up the token log-probabilities of its candidates, forms the slopes of
``objective.py`` for each candidate i with a strictly lower-ranked present candidate,

    d_i = s_i - logsumexp({s_j : rank_j > rank_i}),    coef_i += f'(d_i),    coef_j -= f'(d_i) * softmax_j,

and writes the coefficient of each segment to its tokens. Everything but the input and the outputs is float64: these
are a few hundred numbers, and neither cancellation nor an approximate exponential is worth a thought there. What one
program holds stays in its registers, so there is no exchange through memory and no barrier; the work grows with the
square of the candidates only where each of them has a rank of its own.

A score of -inf is a candidate that is impossible: d_i is +inf where all below i are, and -inf where i itself is.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpo_kernels.kernels.device import made_current
from cpo_kernels.loss_table import KERNEL_CODES

from . import tuning
from .blocks import contiguous

MAX_CANDIDATES = 2048
# With more, the vectors over candidates would not fit the registers of their threads.
CANDIDATES_PER_WARP = 128
# The rank of absent candidates: nothing is preferred to them.
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def find_group(segment_starts, group, candidates):
    """Return the first segment of the group, and its number of segments."""
    if segment_starts is None:
        count = tl.cast(candidates, tl.int64)
        first = group * count
    else:
        first = tl.load(segment_starts + group)
        count = tl.load(segment_starts + group + 1) - first
        first -= tl.load(segment_starts)
    return first, count


@triton.jit
def find_slots(token_starts, segment, exists, group_start):
    """Return the first slot of each segment, counted from the group's first, and its number of slots."""
    begin = tl.load(token_starts + segment, mask=exists, other=group_start) - group_start
    end = tl.load(token_starts + segment + 1, mask=exists, other=group_start) - group_start
    # The group is addressed in 64 bits, slots in it in 32, which leaves registers for the vectors over its tokens.
    return begin.to(tl.int32), (end - begin).to(tl.int32)


@triton.jit
def reciprocal(x):
    """Return ``1 / x`` to 1e-14, for x float64 in the range of float32.

    A division would be a call, which saves registers to memory.
    """
    estimate = (1.0 / x.to(tl.float32)).to(tl.float64)
    return estimate * (2.0 - x * estimate)


@triton.jit
def inverse_length(length, LENGTH_NORMALIZED: tl.constexpr):
    """Return the factor that turns the sum of a segment into its log-likelihood."""
    return reciprocal(tl.maximum(length, 1).to(tl.float64)) if LENGTH_NORMALIZED else 1.0


@triton.jit
def sum_tokens(logps, begin, slots, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr):
    """Return the sum (BLOCK_C,) float64 of the slots of each segment."""
    total = tl.zeros((BLOCK_C, BLOCK_T), tl.float64)
    for start in range(0, tl.max(slots), BLOCK_T):
        slot = start + tl.arange(0, BLOCK_T)[None, :]
        value = tl.load(logps + (begin[:, None] + slot), mask=slot < slots[:, None], other=0.0)
        total += value.to(tl.float64)  # (BLOCK_C, BLOCK_T)
    return tl.sum(total, axis=1)


@triton.jit
def store_tokens(coef, values, begin, slots, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr):
    """Write values (BLOCK_C,) to every slot of their segments."""
    for start in range(0, tl.max(slots), BLOCK_T):
        slot = start + tl.arange(0, BLOCK_T)[None, :]
        value = tl.broadcast_to(values[:, None], (BLOCK_C, BLOCK_T))
        tl.store(coef + (begin[:, None] + slot), value, mask=slot < slots[:, None])


@triton.jit
def sigmoid(x):
    """Return ``1 / (1 + exp(-x))`` for any x, with neither overflow nor cancellation."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x < 0, small, 1.0) * reciprocal(1.0 + small)


@triton.jit
def slope(d, beta, label_smoothing, LOSS: tl.constexpr):
    """Return the derivative of the loss of one preference by its score difference d.

    For an infinite d it is the limit, or 0 where the limit is infinite.
    """
    if LOSS == "hinge":
        result = tl.where(d < 1, -1.0, 0.0).to(tl.float64)
    elif LOSS == "ipo":
        finite = tl.where(tl.abs(d) < float("inf"), d, 0.5)
        result = 2.0 * (finite - 0.5) * reciprocal(tl.cast(beta * beta, tl.float64))
    else:
        tl.static_assert(LOSS == "plackett_luce")
        result = label_smoothing * sigmoid(d) - (1.0 - label_smoothing) * sigmoid(-d)
    return result


@triton.jit
def softplus(x):
    """Return ``log(1 + exp(x))`` for any x, to a relative error of 1e-10."""
    small = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + tl.where(small < 1e-5, small - 0.5 * small * small, tl.log(1.0 + small))


@triton.jit
def preference_loss(d, beta, label_smoothing, LOSS: tl.constexpr):
    """Return the loss of one preference, whose derivative is :func:`slope`; a term of weight 0 is left out."""
    if LOSS == "hinge":
        result = tl.maximum(1.0 - d, 0.0)
    elif LOSS == "ipo":
        residual = (d - 0.5) * reciprocal(tl.cast(beta, tl.float64))
        result = residual * residual
    else:
        tl.static_assert(LOSS == "plackett_luce")
        flipped = tl.where(label_smoothing > 0.0, label_smoothing * softplus(d), 0.0)
        result = flipped + (1.0 - label_smoothing) * softplus(-d)
    return result


@triton.jit
def compare(score, lower, is_winner):
    """Compare one winner with the candidates in ``lower``, at least one.

    Returns the difference of its score and their log-sum-exp, and their softmax as weights (BLOCK_C,) and their total.
    """
    winner = tl.sum(tl.where(is_winner, score, 0.0))
    top = tl.max(tl.where(lower, score, float("-inf")))
    top = tl.where(top == float("-inf"), 0.0, top)  # all lower ones are impossible: -inf - -inf would be NaN
    weight = tl.where(lower, tl.exp(tl.where(lower, score - top, 0.0)), 0.0)
    total = tl.sum(weight)
    d = tl.where(winner == float("-inf"), winner, winner - top - tl.log(total))
    return d, weight, total


@triton.jit
def add_preference(coef, score, lower, is_winner, beta, label_smoothing, LOSS: tl.constexpr):
    """Add to ``coef`` (BLOCK_C,) the slopes of one winner against the candidates in ``lower``, at least one."""
    d, weight, total = compare(score, lower, is_winner)
    f = slope(d, beta, label_smoothing, LOSS)
    return coef + tl.where(is_winner, f, 0.0) - weight * (f * reciprocal(tl.where(total == 0.0, 1.0, total)))


@triton.jit
def load_rewards(total, length, segment, possible, ref_logps, LENGTH_NORMALIZED: tl.constexpr):
    """Return log-likelihoods (BLOCK_C,) float64 of segments, and how much they exceed those of the reference."""
    reward = total
    if ref_logps is not None:
        possible &= total != float("-inf")
        reward -= tl.load(ref_logps + segment, mask=possible, other=0.0).to(tl.float64)
    inverse = inverse_length(length, LENGTH_NORMALIZED)
    return total * inverse, reward * inverse


@triton.jit
def load_ranks(ranks, segment, candidate, exists):
    """Return the rank (BLOCK_C,) of each candidate; without ``ranks`` the first one is better than the others."""
    rank = (candidate > 0).to(tl.int64)
    if ranks is not None:
        rank = tl.load(ranks + segment, mask=exists, other=0).to(tl.int64)
    return rank


@triton.jit
def contrast_scores(
    score, rank, ranks, lengths, first, count, beta, label_smoothing, BLOCK_C: tl.constexpr, LOSS: tl.constexpr
):
    """Return the derivative (BLOCK_C,) float64 of the group's loss by the scores; absent candidates rank LOWEST."""
    candidate = tl.arange(0, BLOCK_C)
    coef = tl.zeros((BLOCK_C,), tl.float64)
    worst = tl.max(rank)
    if ranks is None:
        if (tl.load(lengths + first) > 0) & (worst > 0):
            coef = add_preference(coef, score, rank > 0, candidate == 0, beta, label_smoothing, LOSS)
    else:
        for i in range(0, count):
            rank_i = tl.load(ranks + first + i).to(tl.int64)
            if (tl.load(lengths + first + i) > 0) & (rank_i < worst):
                coef = add_preference(coef, score, rank > rank_i, candidate == i, beta, label_smoothing, LOSS)
    return coef


# Chunks are slices of longer tensors, so their alignment varies from call to call: it must not select a kernel.
@triton.jit(
    do_not_specialize=["candidates"],
    do_not_specialize_on_alignment=[
        "logps",
        "token_starts",
        "segment_starts",
        "lengths",
        "ref_logps",
        "ranks",
        "num_target_tokens",
        "sums",
        "coef",
    ],
)
def contrast_kernel(
    logps,  # (n,)
    token_starts,  # (S + 1,)
    segment_starts,  # (G + 1,) or None
    lengths,  # (S,)
    ref_logps,  # (S,) or None
    ranks,  # (S,) or None
    num_target_tokens,  # () float64, or None where mle_scale is already divided by it
    sums,  # (S,) out
    coef,  # (n,) out
    beta,
    margin,
    label_smoothing,
    contrast_scale,
    mle_scale,
    candidates,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LOSS: tl.constexpr,
    LENGTH_NORMALIZED: tl.constexpr,
):
    """Compute the sums of one group and the coefficients of its tokens; :func:`contrast` describes the arguments."""
    first, count = find_group(segment_starts, tl.program_id(0), candidates)
    candidate = tl.arange(0, BLOCK_C)
    exists = candidate < count
    segment = first + candidate
    group_start = tl.load(token_starts + first)
    group_offset = group_start - tl.load(token_starts)

    begin, slots = find_slots(token_starts, segment, exists, group_start)
    total = sum_tokens(logps + group_offset, begin, slots, BLOCK_C, BLOCK_T)
    tl.store(sums + segment, total.to(tl.float32), mask=exists)

    length = tl.load(lengths + segment, mask=exists, other=0)
    rank = load_ranks(ranks, segment, candidate, exists)
    _, reward = load_rewards(total, length, segment, exists, ref_logps, LENGTH_NORMALIZED)
    score = reward * beta + tl.where(rank > 0, margin, 0.0)
    defined = score < float("inf")
    # One score that is NaN or +inf makes every coefficient of its group NaN, unless the contrast has no weight.
    poison = tl.sum(tl.where(defined | (length == 0) | (contrast_scale == 0.0), 0.0, float("nan")))
    score = tl.where(defined, score, 0.0)
    rank = tl.where(length > 0, rank, LOWEST)
    slopes = contrast_scores(score, rank, ranks, lengths, first, count, beta, label_smoothing, BLOCK_C, LOSS)

    # Loaded again rather than held in registers through the loop over candidates.
    begin, slots = find_slots(token_starts, segment, exists, group_start)
    length = tl.load(lengths + segment, mask=exists, other=0)
    if num_target_tokens is not None:
        mle_scale = mle_scale * reciprocal(tl.load(num_target_tokens))
    value = slopes * beta * contrast_scale * inverse_length(length, LENGTH_NORMALIZED)
    value = tl.where(length > 0, value - tl.where(rank == 0, mle_scale, 0.0) + poison, 0.0)
    store_tokens(coef + group_offset, value.to(tl.float32), begin, slots, BLOCK_C, BLOCK_T)


def contrast(
    logps: Tensor,
    token_starts: Tensor,
    segment_starts: Tensor | None,
    lengths: Tensor,
    ref_logps: Tensor | None,
    ranks: Tensor | None,
    *,
    beta: float,
    margin: float,
    label_smoothing: float,
    loss_type: str,
    length_normalized: bool,
    contrast_weight: float,
    mle_weight: float,
    num_groups: float,
    num_target_tokens: float | Tensor,
    gain: float,
    max_candidates: int,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the log-likelihood sums of the segments of some whole groups and their tokens' coefficients.

    ``token_starts`` and ``segment_starts`` may be slices of longer prefix counts: they count from their first element.
    Tensors may have any strides; those that are not contiguous are copied. Nothing is read back to the host.

    Args:
        logps: (n,) float32 token log-probabilities in segment order; 0 in slots without a token.
        token_starts: (S + 1,) int64 prefix count of the slots of each segment.
        segment_starts: (G + 1,) int64 prefix count of the segments of each group; None: ``max_candidates`` each.
        lengths: (S,) int64 tokens present in each segment; 0 makes the candidate absent.
        ref_logps: (S,) float32 sums, or None.
        ranks: (S,) integers or None for (0, 1, ..., 1) in each group.
        beta: as the other options a number of :class:`cpo_kernels.options.Objective`.
        num_groups: denominator of the contrast.
        num_target_tokens: denominator of the negative log-likelihood; a number or a () float64 tensor on the device.
        gain: factor on every coefficient.
        max_candidates: segments of the largest group, at most 2048.
        config: ``{"TILE": slots held at once, "num_warps", "num_stages"}``; None: the table.

    Returns:
        sums (S,) float32, accumulated in float64, and ``gain * dloss / dlogp`` (n,) float32 for every slot of a
        segment: 0 in absent candidates, and NaN in all others of a group with a score that is NaN or +inf, unless
        ``contrast_weight`` is 0.

    Raises:
        ValueError: ``max_candidates`` above 2048, or a loss that the kernel lacks.
    """
    if loss_type not in KERNEL_CODES:
        raise ValueError(f"loss_type must be one of {tuple(KERNEL_CODES)}, got {loss_type!r}")
    if max_candidates > MAX_CANDIDATES:
        raise ValueError(f"max_candidates must be at most {MAX_CANDIDATES}, got {max_candidates}")
    logps, lengths, token_starts = logps.contiguous(), lengths.contiguous(), token_starts.contiguous()
    segment_starts, ref_logps, ranks = contiguous(segment_starts), contiguous(ref_logps), contiguous(ranks)
    num_segments = lengths.numel()
    sums, coef = torch.empty_like(lengths, dtype=torch.float32), torch.empty_like(logps)
    if num_segments == 0:
        return sums, coef
    groups = num_segments // max_candidates if segment_starts is None else segment_starts.numel() - 1
    tokens_on_device = num_target_tokens if isinstance(num_target_tokens, Tensor) else None
    mle_scale = gain * mle_weight / (1.0 if isinstance(num_target_tokens, Tensor) else num_target_tokens)
    config = config or tuning.config("contrast", logps.device, max_candidates, logps.dtype)
    sizes = block_sizes(config, max_candidates)
    with made_current(logps.device):
        contrast_kernel[(groups,)](
            logps,
            token_starts,
            segment_starts,
            lengths,
            ref_logps,
            ranks,
            tokens_on_device,
            sums,
            coef,
            float(beta),
            float(margin),
            float(label_smoothing),
            float(gain * contrast_weight / num_groups),
            float(mle_scale),
            max_candidates,
            LOSS=loss_type,
            LENGTH_NORMALIZED=length_normalized,
            **sizes,
            **tuning.sharing_registers(logps.device, sizes["num_warps"]),
        )
    return sums, coef


def block_sizes(config: Mapping[str, int], max_candidates: int) -> dict[str, int]:
    """Return the block sizes for groups of up to ``max_candidates``."""
    block_c = triton.next_power_of_2(max_candidates)
    return {
        "BLOCK_C": block_c,
        "BLOCK_T": max(config["TILE"] // block_c, 1),
        "num_warps": max(config["num_warps"], block_c // CANDIDATES_PER_WARP),
        "num_stages": config["num_stages"],
    }
