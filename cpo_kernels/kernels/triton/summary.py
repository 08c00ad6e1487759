"""The loss and its metrics from the log-likelihood sums of all segments, in two launches.

One program owns one group and writes what the group adds to each sum; a single program then adds the groups up in a
fixed order. All is float64 until it is stored, as in :mod:`.contrast`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpo_kernels.kernels.device import made_current

from . import tuning
from .blocks import contiguous
from .contrast import (
    CANDIDATES_PER_WARP,
    LOWEST,
    compare,
    find_group,
    load_ranks,
    load_rewards,
    preference_loss,
    reciprocal,
)

# What a group adds: its contrast, 1 if its best candidates win, 1 if it has others, their margin, the sum of the
# log-probabilities of its best candidates, and their tokens.
GROUP_SUMS = 6
GROUPS_TOGETHER = 256


@triton.jit
def group_loss(
    score, rank, ranks, lengths, first, count, beta, label_smoothing, BLOCK_C: tl.constexpr, LOSS: tl.constexpr
):
    """Return the contrast of one group, of scores (BLOCK_C,); absent candidates rank LOWEST."""
    candidate = tl.arange(0, BLOCK_C)
    loss = tl.sum(tl.zeros((BLOCK_C,), tl.float64))
    worst = tl.max(rank)
    if ranks is None:
        if (tl.load(lengths + first) > 0) & (worst > 0):
            d, _, _ = compare(score, rank > 0, candidate == 0)
            loss += preference_loss(d, beta, label_smoothing, LOSS)
    else:
        for i in range(0, count):
            rank_i = tl.load(ranks + first + i).to(tl.int64)
            if (tl.load(lengths + first + i) > 0) & (rank_i < worst):
                d, _, _ = compare(score, rank > rank_i, candidate == i)
                loss += preference_loss(d, beta, label_smoothing, LOSS)
    return loss


@triton.jit
def mean_of(values, chosen):
    """Return the mean of the chosen values, 0 if there are none."""
    return tl.sum(tl.where(chosen, values, 0.0)) * reciprocal(tl.maximum(tl.sum(chosen.to(tl.float64)), 1.0))


@triton.jit(
    do_not_specialize=["candidates", "groups"],
    do_not_specialize_on_alignment=["sums", "segment_starts", "lengths", "ref_logps", "ranks", "logps", "rewards"],
)
def group_summary_kernel(
    sums,  # (S,)
    segment_starts,  # (G + 1,) or None
    lengths,  # (S,)
    ref_logps,  # (S,) or None
    ranks,  # (S,) or None
    logps,  # (S,) out
    rewards,  # (S,) out
    group_sums,  # (GROUP_SUMS, G) out
    beta,
    margin,
    label_smoothing,
    candidates,
    groups,
    BLOCK_C: tl.constexpr,
    LOSS: tl.constexpr,
    LENGTH_NORMALIZED: tl.constexpr,
):
    """Write log-likelihoods and rewards of the candidates of one group, and what it adds to the sums. Grid: (G,)."""
    group = tl.program_id(0)
    first, count = find_group(segment_starts, group, candidates)
    candidate = tl.arange(0, BLOCK_C)
    exists = candidate < count
    segment = first + candidate
    total = tl.load(sums + segment, mask=exists, other=0.0).to(tl.float64)
    length = tl.load(lengths + segment, mask=exists, other=0)
    rank = load_ranks(ranks, segment, candidate, exists)
    logp, reward = load_rewards(total, length, segment, exists, ref_logps, LENGTH_NORMALIZED)
    present = length > 0
    best, others = present & (rank == 0), present & (rank > 0)
    tl.store(logps + segment, logp.to(tl.float32), mask=exists)
    tl.store(rewards + segment, tl.where(present, reward * beta, 0.0).to(tl.float32), mask=exists)

    score = reward * beta + tl.where(rank > 0, margin, 0.0)
    defined = score < float("inf")
    poison = tl.sum(tl.where(defined | (length == 0), 0.0, float("nan")))
    score = tl.where(defined, score, 0.0)
    ordered = tl.where(present, rank, LOWEST)
    loss = group_loss(score, ordered, ranks, lengths, first, count, beta, label_smoothing, BLOCK_C, LOSS)

    counted = (tl.max(best.to(tl.int32)) > 0) & (tl.max(others.to(tl.int32)) > 0)
    worst_best = tl.min(tl.where(best, reward, float("inf")))
    best_other = tl.max(tl.where(others, reward, float("-inf")))
    known = tl.sum((present & (reward != reward)).to(tl.int32)) == 0
    wins = counted & known & (worst_best > best_other)
    difference = (mean_of(reward, best) - mean_of(reward, others)) * beta
    out = group_sums + group
    tl.store(out, loss + poison)
    tl.store(out + groups, wins.to(tl.float64))
    tl.store(out + 2 * groups, counted.to(tl.float64))
    tl.store(out + 3 * groups, tl.where(counted, difference, 0.0))
    tl.store(out + 4 * groups, tl.sum(tl.where(best, total, 0.0)))
    tl.store(out + 5 * groups, tl.sum(tl.where(best, length, 0)).to(tl.float64))


@triton.jit
def add_groups(values, groups, BLOCK: tl.constexpr):
    """Return the sum of values (G,)."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        total += tl.load(values + group, mask=group < groups, other=0.0)
    return tl.sum(total)


@triton.jit(do_not_specialize=["groups"])
def summary_kernel(
    group_sums,  # (GROUP_SUMS, G)
    num_target_tokens,  # () float64, or None
    loss_out,  # () like the other outputs
    contrastive_out,
    nll_out,
    accuracy_out,
    margin_out,
    dropped_out,
    given_tokens,  # without num_target_tokens their number; 0: that of the best candidates
    groups,
    contrast_weight,
    mle_weight,
    num_groups,
    BLOCK: tl.constexpr,
):
    """Write loss, contrast, negative log-likelihood, accuracy, margin, and 0 for what filters drop. Grid: (1,)."""
    contrastive = add_groups(group_sums, groups, BLOCK) * reciprocal(tl.cast(num_groups, tl.float64))
    wins = add_groups(group_sums + groups, groups, BLOCK)
    per_counted = reciprocal(add_groups(group_sums + 2 * groups, groups, BLOCK))  # NaN where no group is counted
    margin = add_groups(group_sums + 3 * groups, groups, BLOCK)
    likelihood = add_groups(group_sums + 4 * groups, groups, BLOCK)
    if num_target_tokens is None:
        counted = tl.maximum(add_groups(group_sums + 5 * groups, groups, BLOCK), 1.0)
        tokens = tl.where(given_tokens > 0.0, tl.cast(given_tokens, tl.float64), counted)
    else:
        tokens = tl.load(num_target_tokens)
    nll = -likelihood * reciprocal(tokens)
    # A term of weight 0 is left out: 0 * inf is NaN.
    loss = tl.where(contrast_weight != 0.0, contrast_weight * contrastive, 0.0)
    loss += tl.where(mle_weight != 0.0, mle_weight * nll, 0.0)
    tl.store(loss_out, loss.to(tl.float32))
    tl.store(contrastive_out, contrastive.to(tl.float32))
    tl.store(nll_out, nll.to(tl.float32))
    tl.store(accuracy_out, (wins * per_counted).to(tl.float32))
    tl.store(margin_out, (margin * per_counted).to(tl.float32))
    tl.store(dropped_out, 0.0)


def summarize(
    sums: Tensor,
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
    num_target_tokens: float | Tensor | None,
    max_candidates: int,
    shape: tuple[int, ...] | None = None,
) -> tuple[Tensor, ...]:
    """Compute the loss and its metrics, as :func:`cpo_kernels.objective.summarize` does; nothing waits for the device.

    Args:
        sums: (S,) float32 sums of token log-probabilities.
        segment_starts: (G + 1,) int64 prefix count of the segments of each group; None: ``max_candidates`` each.
        lengths: (S,) int64 tokens present in each segment; 0 makes the candidate absent.
        ref_logps: (S,) float32 sums, or None.
        ranks: (S,) integers or None for (0, 1, ..., 1) in each group.
        beta: as the other options a number of :class:`cpo_kernels.options.Objective`.
        num_groups: denominator of the contrast.
        num_target_tokens: denominator of the negative log-likelihood, a number or a () float64 tensor; None: the tokens
            of the candidates of rank 0.
        max_candidates: segments of the largest group.
        shape: of log-likelihoods and rewards, of S numbers; None: (S,).

    Returns:
        Loss, contrastive loss, negative log-likelihood, accuracy, margin and 0 (what is dropped without filters),
        scalars; log-likelihoods and rewards. Each has memory of its own, so that users may change it in place; all are
        float32.
    """
    device, (segments,) = sums.device, lengths.shape
    groups = segments // max_candidates if segment_starts is None else segment_starts.numel() - 1
    numbers = [torch.empty((), dtype=torch.float32, device=device) for _ in range(6)]
    logps, rewards = (torch.empty(shape or (segments,), dtype=torch.float32, device=device) for _ in range(2))
    group_sums = torch.empty((GROUP_SUMS, groups), dtype=torch.float64, device=device)
    on_device = isinstance(num_target_tokens, Tensor)
    block_c = triton.next_power_of_2(max_candidates)
    num_warps = max(4, block_c // CANDIDATES_PER_WARP)
    with made_current(device):
        group_summary_kernel[(groups,)](
            sums.contiguous(),
            contiguous(segment_starts),
            lengths.contiguous(),
            contiguous(ref_logps),
            contiguous(ranks),
            logps,
            rewards,
            group_sums,
            float(beta),
            float(margin),
            float(label_smoothing),
            max_candidates,
            groups,
            BLOCK_C=block_c,
            LOSS=loss_type,
            LENGTH_NORMALIZED=length_normalized,
            num_warps=num_warps,
            **tuning.sharing_registers(device, num_warps),
        )
        summary_kernel[(1,)](
            group_sums,
            num_target_tokens if on_device else None,
            *numbers,
            0.0 if on_device else float(num_target_tokens or 0.0),
            groups,
            float(contrast_weight),
            float(mle_weight),
            float(num_groups),
            BLOCK=GROUPS_TOGETHER,
            num_warps=4,
            **tuning.LAUNCH,
        )
    return *numbers, logps, rewards
