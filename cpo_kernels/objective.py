"""The objective: from log-likelihoods of candidates to the loss and its coefficients, in plain torch on small tensors.

Section 1 of docs/objective.md has the formulas. Everything works on padded groups (G, C) with a mask of the candidates
that are present. The loss of a group is

    L_g = sum over i that have a strictly lower-ranked present candidate: softplus(a_i),
    a_i = logsumexp({s_j : rank_j > rank_i}) - s_i

which is ``logsumexp({s_i} + {s_j}) - s_i`` without its cancellation when the contrast is settled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels.kernels.device import is_host

from .kernels.device import to_device
from .loss_table import LOSSES, Pair, softplus
from .options import Objective


class Groups(NamedTuple):
    """Segments laid out as padded groups (G, C).

    Attributes:
        slots: (S,) place of each segment in the flattened (G, C), or None when every group has C segments.
        shape: (G, C).
        starts: (G + 1,) prefix count of the segments of each group, or None when every group has C.
    """

    slots: Tensor | None
    shape: tuple[int, int]
    starts: Tensor | None = None

    def pad(self, values: Tensor, fill: float = 0) -> Tensor:
        """Lay out values (S,) of the segments as (G, C), with ``fill`` where there is no segment."""
        if self.slots is None:
            return values.reshape(self.shape)
        padded = values.new_full((self.shape[0] * self.shape[1],), fill)
        return padded.index_copy(0, self.slots, values).view(self.shape)

    def unpad(self, values: Tensor) -> Tensor:
        """Take the values (S,) of the segments from (G, C)."""
        flat = values.reshape(-1)
        return flat if self.slots is None else flat[self.slots]


def make_groups(cu_groups: Sequence[int], device: torch.device) -> Groups:
    """Make the padded layout of groups with boundaries ``cu_groups`` (G + 1,)."""
    sizes = [end - start for start, end in pairwise(cu_groups)]
    width = max(sizes, default=0)
    shape = (len(sizes), width)
    if all(size == width for size in sizes):
        return Groups(None, shape)
    slots = [group * width + c for group, size in enumerate(sizes) for c in range(size)]
    slots_on_device, starts = (to_device(torch.tensor(v, device="cpu"), device) for v in (slots, list(cu_groups)))
    return Groups(slots_on_device, shape, starts)


def default_ranks(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Make the ranks (0, 1, ..., 1) of every group: the first candidate against the others."""
    return (torch.arange(shape[1], device=device) > 0).long().expand(shape)


class Contrast(NamedTuple):
    """Loss (G,) of each group and its derivative (G, C) with respect to the scores; 0 for absent candidates."""

    loss: Tensor
    coef: Tensor


def preferences(ranks: Tensor, present: Tensor) -> Tensor:
    """Tell for each group (G, C, C) whether present candidate i is ranked strictly better than present candidate j."""
    better = ranks.unsqueeze(-1) < ranks.unsqueeze(-2)
    return better & present.unsqueeze(-1) & present.unsqueeze(-2)


def log_ratios(logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """Subtract the reference; candidates impossible under the policy stay -inf, whatever the reference gives them."""
    return logps if ref_logps is None else logps - ref_logps.masked_fill(logps == -math.inf, 0.0)


def plackett_luce(scores: Tensor, better: Tensor) -> Contrast:
    """Compute the ranked contrast of scores (G, C), -inf for impossible candidates, under preferences (G, C, C)."""
    lower = scores.unsqueeze(-2).masked_fill(~better, -math.inf)
    # Where all lower-ranked candidates are impossible, (-inf) - (-inf) must not make loss or gradient NaN.
    top = lower.amax(-1).detach()
    top = top.masked_fill(top == -math.inf, 0.0)
    weights = (lower - top.unsqueeze(-1)).exp()
    total = weights.sum(-1)
    beats_all = total == 0
    total = total.masked_fill(beats_all, 1.0)
    margins = top + total.log() - scores
    settled = ~better.any(-1) | (beats_all & (scores != -math.inf))
    loss = softplus(margins).masked_fill(settled, 0.0).sum(-1)
    losing = torch.sigmoid(margins).masked_fill(settled, 0.0)
    coef = (losing.unsqueeze(-1) * weights / total.unsqueeze(-1)).sum(-2) - losing
    return Contrast(loss, coef)


# Stands for an infinite score: every sigmoid of it is 0 or 1, and no product of two such scores overflows.
FAR = 1e15
# At scores FAR apart, slopes above this belong to squared losses; the slopes of all other losses are far below.
STEEP = 1e8


def pair_loss(scores: Tensor, better: Tensor, objective: Objective) -> Contrast:
    """Compute the loss of the one preference in each group (K = 1) by its row of the table of losses.

    Where a candidate is impossible, loss and slopes are their limits; the loss is infinite if its slope has not
    vanished there. The slope of an impossible rejected candidate is 0, as is a slope without a finite limit.
    """
    wins, loses = better.any(-1), better.any(-2)
    chosen = scores.masked_fill(~wins, 0.0).sum(-1)
    rejected = scores.masked_fill(~loses, 0.0).sum(-1)
    hopeless, beaten = chosen == -math.inf, rejected == -math.inf
    chosen, rejected = chosen.masked_fill(hopeless, -FAR), rejected.masked_fill(beaten, -FAR)
    difference = (chosen - rejected).masked_fill(hopeless, -FAR)
    pair = Pair(chosen, rejected, difference, objective.beta, objective.label_smoothing)
    loss, chosen_slope, rejected_slope = LOSSES[objective.loss_type].formula(pair)
    impossible, far_slope = hopeless | beaten, torch.where(hopeless, chosen_slope, rejected_slope)
    unbounded = impossible & (far_slope != 0)
    loss = torch.where(unbounded, -far_slope.sign() * math.inf, loss).masked_fill(~wins.any(-1), 0.0)
    chosen_slope = chosen_slope.masked_fill(impossible & (chosen_slope.abs() > STEEP), 0.0)
    rejected_slope = rejected_slope.masked_fill(beaten | (impossible & (rejected_slope.abs() > STEEP)), 0.0)
    none = torch.zeros_like(scores)
    coef = torch.where(wins, chosen_slope.unsqueeze(-1), torch.where(loses, rejected_slope.unsqueeze(-1), none))
    return Contrast(loss, coef)


class ClosedForm(torch.autograd.Function):
    """A loss (G,) of log-likelihoods (G, C) whose derivative is given as ``coef`` (G, C).

    Autograd of the loss would miss the limits of :func:`pair_loss`. Second derivatives are those of ``coef``.
    """

    @staticmethod
    def forward(logps: Tensor, loss: Tensor, coef: Tensor) -> Tensor:
        """Return the loss."""
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Save the derivative."""
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        """Multiply the upstream gradient by the derivative."""
        (coef,) = ctx.saved_tensors
        return grad_loss.unsqueeze(-1) * coef, None, None


class ClosedFormBothModes(ClosedForm):
    """A :class:`ClosedForm` with a forward mode, which the compiler cannot trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Save the derivative for both modes."""
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def jvp(ctx: Any, logps: Tensor, _loss: Tensor, _coef: Tensor) -> Tensor:
        """Multiply the direction by the derivative."""
        return (logps * ctx.saved_tensors[0]).sum(-1)


def contrast(logps: Tensor, ref_logps: Tensor | None, ranks: Tensor, present: Tensor, objective: Objective) -> Contrast:
    """Compute loss and ``dL_g / dlogp_c`` of padded groups; logps, ref_logps, ranks, present are (G, C).

    A log-likelihood of -inf is an impossible candidate. NaN or a score of +inf makes its whole group NaN.
    """
    rewards = log_ratios(logps, ref_logps)
    scores = objective.beta * rewards + objective.margin * (ranks > 0).to(rewards.dtype)
    scores = scores.masked_fill(~present, 0.0)
    better = preferences(ranks, present)
    loss, coef = pair_loss(scores, better, objective) if objective.of_pairs else plackett_luce(scores, better)
    undefined = ~(scores < math.inf).all(-1)
    coef = (objective.beta * coef).masked_fill(undefined.unsqueeze(-1) & present, math.nan)
    if objective.of_pairs:  # autograd gets the limits of Plackett-Luce right
        function = ClosedForm if torch.compiler.is_compiling() else ClosedFormBothModes
        loss = function.apply(logps, loss, coef)
    return Contrast(loss * torch.where(undefined, math.nan, 1.0).to(loss.dtype), coef)


class LossTerms(NamedTuple):
    """The loss and the two terms that it is the sum of, all scalars; see :class:`CPOOutput`."""

    loss: Tensor
    contrastive_loss: Tensor
    nll_loss: Tensor


@dataclass(frozen=True)
class CPOProblem:
    """The objective bound to the groups of a batch: all that the loss needs but the log-likelihoods.

    Attributes:
        objective: the options of the objective.
        groups: the padded layout of the S segments.
        lengths: (S,) tokens of each segment.
        ref_logps: (S,) sums under the reference as users gave them, or None.
        segment_ranks: (S,) ranks as users gave them, or None.
        ranks: (G, C).
        present: (G, C).
        num_groups: denominator of the contrast.
        num_target_tokens: denominator of the NLL.
    """

    objective: Objective
    groups: Groups
    lengths: Tensor
    ref_logps: Tensor | None
    segment_ranks: Tensor | None
    ranks: Tensor
    present: Tensor
    num_groups: float
    num_target_tokens: float | Tensor

    @property
    def given(self) -> tuple[Tensor | None, Tensor | None]:
        """The tensors that users gave and may change: ref_logps and ranks, (S,) or None."""
        return self.ref_logps, self.segment_ranks

    def with_given(self, ref_logps: Tensor | None, ranks: Tensor | None) -> CPOProblem:
        """Replace ref_logps and ranks by other tensors of the same values."""
        padded = self.ranks if ranks is None else self.groups.pad(ranks)
        return replace(self, ref_logps=ref_logps, segment_ranks=ranks, ranks=padded)

    @property
    def best(self) -> Tensor:
        """Mark the segments (S,) of rank 0 that have tokens."""
        return self.groups.unpad((self.ranks == 0) & self.present)

    def logps(self, sums: Tensor) -> Tensor:
        """Turn sums of token log-probabilities (S,) into the log-likelihoods (S,) that are contrasted."""
        return sums / self.lengths.clamp(min=1) if self.objective.length_normalized else sums

    @property
    def contrasted_refs(self) -> Tensor | None:
        """The log-likelihoods (S,) under the reference that are contrasted, or None."""
        return None if self.ref_logps is None else self.logps(self.ref_logps)

    def contrast(self, sums: Tensor) -> Contrast:
        """Compute the contrast's loss (G,) of each group and ``dL_g / dlogp_c`` (G, C)."""
        refs = self.contrasted_refs
        ref = None if refs is None else self.groups.pad(refs)
        return contrast(self.groups.pad(self.logps(sums)), ref, self.ranks, self.present, self.objective)

    def loss(self, sums: Tensor) -> LossTerms:
        """Compute the loss, differentiable in ``sums``."""
        return self.terms(sums, self.contrast(sums).loss)

    def terms(self, sums: Tensor, group_losses: Tensor) -> LossTerms:
        """Put the loss together from the contrast's loss (G,) of each group."""
        contrast_weight, mle_weight = self.objective.contrast_weight, self.objective.mle_weight
        contrastive = group_losses.sum() / self.num_groups
        nll = -sums.masked_fill(~self.best, 0.0).sum() / self.num_target_tokens
        nll = nll.to(sums.dtype)
        # A term of weight 0 is left out: 0 * inf is NaN.
        if contrast_weight == 0:
            return LossTerms(mle_weight * nll, contrastive, nll)
        loss = contrast_weight * contrastive
        return LossTerms(loss + mle_weight * nll if mle_weight else loss, contrastive, nll)

    def coefficients(self, sums: Tensor) -> Tensor:
        """Compute ``dloss / dsums`` (S,), in closed form."""
        return self.sum_coefficients(self.contrast_coefficients(self.contrast(sums)))

    def contrast_coefficients(self, contrast: Contrast) -> Tensor:
        """Compute the contrast's share of ``dloss / dlogps`` (S,), by per-token means if length_normalized."""
        coef, weight = self.groups.unpad(contrast.coef), self.objective.contrast_weight
        return coef * (weight / self.num_groups) if weight else torch.zeros_like(coef)

    def sum_coefficients(self, coef: Tensor) -> Tensor:
        """Compute ``dloss / dsums`` (S,) from the contrast's coefficients (S,) and the likelihood term."""
        if self.objective.length_normalized:
            coef = coef / self.lengths.clamp(min=1)
        return coef - self.best.to(coef.dtype) * (self.objective.mle_weight / self.num_target_tokens)

    def chunk(self, groups: range, segments: slice) -> CPOProblem:
        """Take the problem of some consecutive groups, with the denominators of the whole batch."""
        g = slice(groups.start, groups.stop)
        slots, width = self.groups.slots, self.groups.shape[1]
        return replace(
            self,
            groups=Groups(None if slots is None else slots[segments] - groups.start * width, (len(groups), width)),
            lengths=self.lengths[segments],
            ref_logps=None if self.ref_logps is None else self.ref_logps[segments],
            segment_ranks=None if self.segment_ranks is None else self.segment_ranks[segments],
            ranks=self.ranks[g],
            present=self.present[g],
        )


def make_problem(
    objective: Objective, groups: Groups, lengths: Tensor, ref_logps: Tensor | None, ranks: Tensor | None
) -> CPOProblem:
    """Bind the objective to groups without reading any value; lengths, ref_logps and ranks are (S,)."""
    padded_ranks = default_ranks(groups.shape, lengths.device) if ranks is None else groups.pad(ranks)
    present = groups.pad(lengths) > 0
    num_target_tokens: float | Tensor | None = objective.num_target_tokens
    if num_target_tokens is None:
        num_target_tokens = (groups.pad(lengths) * (padded_ranks == 0)).sum().clamp(min=1).double()
    return CPOProblem(
        objective=objective,
        groups=groups,
        lengths=lengths,
        ref_logps=ref_logps,
        segment_ranks=ranks,
        ranks=padded_ranks,
        present=present,
        num_groups=objective.num_groups or groups.shape[0],
        num_target_tokens=num_target_tokens,
    )


def check_problem(problem: CPOProblem) -> None:
    """Raise ``ValueError`` naming the first group with a rank below 0, without a rank 0, or without a contrast.

    A check on a GPU is not waited for; its failure is a device assertion.
    """
    ranks, present, weight = problem.ranks, problem.present, problem.objective.contrast_weight
    if problem.segment_ranks is not None:
        check_groups(problem, ((ranks >= 0) | ~present).all(-1), "has a rank below 0")
    check_groups(problem, ((ranks == 0) & present).any(-1), "has no rank-0 candidate with tokens")
    if weight > 0:
        contrasted = preferences(ranks, present).flatten(-2).any(-1)
        check_groups(problem, contrasted, f"has nothing to contrast while contrast_weight={weight}")


def check_groups(problem: CPOProblem, good: Tensor, complaint: str) -> None:
    """Raise ``ValueError`` naming the first group that is not ``good`` (G,)."""
    if not is_host(good.device):
        torch._assert_async(good.all(), f"a group {complaint}")
    elif not good.all():
        group = int((~good).nonzero()[0])
        raise ValueError(f"group {group} {complaint}: {describe_group(problem, group)}")


def describe_group(problem: CPOProblem, group: int) -> str:
    """Describe the ranks and the presence of one group's candidates, for a message."""
    return f"ranks {problem.ranks[group].tolist()}, present {problem.present[group].tolist()}"


class CPOOutput(NamedTuple):
    """The result of a CPO loss. Only ``loss`` is differentiable.

    Attributes:
        loss: ``contrast_weight * contrastive_loss + mle_weight * nll_loss``, scalar.
        contrastive_loss: mean of the groups' contrast over ``num_groups``, scalar.
        nll_loss: negative log-likelihood of the rank-0 candidates per token, in nats, scalar.
        logps: log-likelihood of every candidate, (G, C) or (S,): the sum of its token log-probabilities, or with
            length_normalized their mean, which is no ``ref_logps``: those are sums, as ``linear_sequence_logps``
            returns them.
        rewards: ``beta * (logp - ref_logp)``, like logps and with the mean of the reference where logps are means; 0
            for absent candidates.
        accuracy: fraction of groups whose rank-0 candidates all score above all others; NaN without others.
        margin: mean over groups of the mean reward of rank 0 minus the mean reward of the others; NaN without others.
        dropped: share of the gradient's mass left out by the filters; 0 when exact.
    """

    loss: Tensor
    contrastive_loss: Tensor
    nll_loss: Tensor
    logps: Tensor
    rewards: Tensor
    accuracy: Tensor
    margin: Tensor
    dropped: Tensor


def summarize(
    problem: CPOProblem, terms: LossTerms, sums: Tensor, shape: tuple[int, ...], dropped: Tensor | None = None
) -> CPOOutput:
    """Make the output from log-likelihood sums (S,); logps and rewards come in ``shape``."""
    sums, loss = sums.detach(), terms.loss
    logps = problem.logps(sums)
    rewards = problem.objective.beta * log_ratios(logps, problem.contrasted_refs)
    rewards = problem.groups.pad(rewards).masked_fill(~problem.present, 0.0)
    best = (problem.ranks == 0) & problem.present
    others = (problem.ranks > 0) & problem.present
    counted = best.any(-1) & others.any(-1)
    worst_best = rewards.masked_fill(~best, math.inf).amin(-1)
    best_other = rewards.masked_fill(~others, -math.inf).amax(-1)
    wins = ((worst_best > best_other) & counted).sum()
    means = [rewards.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1) for mask in (best, others)]
    return CPOOutput(
        loss=loss,
        contrastive_loss=terms.contrastive_loss.detach(),
        nll_loss=terms.nll_loss.detach(),
        logps=logps.reshape(shape),
        rewards=problem.groups.unpad(rewards).reshape(shape),
        accuracy=wins / counted.sum(),
        margin=(means[0] - means[1]).masked_fill(~counted, 0.0).sum() / counted.sum(),
        dropped=loss.new_zeros(()).detach() if dropped is None else dropped,
    )
