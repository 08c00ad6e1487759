"""Losses that come with their gradients: what the autograd function and the compiled operator run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels.kernels import registry
from cpo_kernels.layout import Tokens
from cpo_kernels.objective import CPOProblem, Objective, check_problem, make_problem
from cpo_kernels.options import Head

from . import loop
from .call import Grads, LinearCall, Needs
from .filters import GradientFilter
from .head import LinearHead

# Headroom under 1 for the scaled coefficients of a float16 gradient: products sum thousands of them.
FLOAT16_TARGET = 2.0**-4


class LossResult(NamedTuple):
    """A loss computed with its gradients.

    Attributes:
        loss: scalar.
        sums: (S,) sums of token log-probabilities.
        lengths: (S,) tokens of each segment.
        dropped: share of the gradient's mass left out, scalar.
        grads: gradients of hidden, weight and bias, times the gain.
        gain: see :func:`float16_gain`.
        scale_: the backend's way to scale them in place.
    """

    loss: Tensor
    sums: Tensor
    lengths: Tensor
    dropped: Tensor
    grads: Grads
    gain: float | Tensor
    scale_: Callable[[Tensor, Tensor], None]


def float16_gain(dtype: torch.dtype, largest_coefficient: float | Tensor) -> float | Tensor:
    """Power of two that lifts coefficients of a float16 gradient out of its subnormals; 1 for every other dtype.

    Gradients are built before the upstream gradient (a loss scale, say) is known, so they must not underflow first.
    """
    if dtype != torch.float16:
        return 1.0
    if isinstance(largest_coefficient, Tensor):
        gain = torch.exp2(torch.floor(torch.log2(FLOAT16_TARGET / largest_coefficient)))
        return gain.where(gain.isfinite() & (gain > 0), 1.0)
    if not 0 < largest_coefficient < math.inf:
        return 1.0
    return 2.0 ** math.floor(math.log2(FLOAT16_TARGET / largest_coefficient))


def unit_coefficient(objective: Objective, num_groups: float, num_target_tokens: float | Tensor) -> float | Tensor:
    """The largest coefficient that the objective gives a token's log-probability."""
    per_group = abs(objective.contrast_weight) * objective.beta / num_groups
    return per_group + abs(objective.mle_weight) / num_target_tokens if objective.mle_weight else per_group


def make_filter(
    linear: LinearHead, candidate_unit: float, token_unit: float | Tensor, gain: float | Tensor
) -> GradientFilter | None:
    """The filters that the head asks for; None for exact gradients."""
    head = linear.head
    if not head.filtered:
        return None
    return GradientFilter(
        candidate_threshold=None if head.candidate_eps is None else head.candidate_eps * candidate_unit,
        column_threshold=None if head.grad_filter_eps is None else head.grad_filter_eps * token_unit * gain,
        slope=head.logit_scale / head.temperature,
        hidden_size=linear.weight.shape[1],
    )


def dropped_share(filters: GradientFilter | None, loss: Tensor) -> Tensor:
    """What the filters left out, 0 without any, as a scalar like the loss."""
    return loss.new_zeros(()).detach() if filters is None else filters.share.to(loss)


def check_groups_of(
    objective: Objective, problem: CPOProblem, tokens: Tokens, cu_groups: Sequence[int], ranks: Tensor | None
) -> None:
    """:func:`check_problem`, on the host if the host knows the lengths anyway."""
    if tokens.host_lengths is not None and problem.lengths.device.type != "cpu":
        problem = make_problem(objective, cu_groups, tokens.host_lengths, None, None if ranks is None else ranks.cpu())
    check_problem(problem)


def coefficients_are_known(call: LinearCall, objective: Objective, needs: Needs) -> bool:
    """Whether tokens get coefficients that depend on no log-probability: the likelihood of the truth alone."""
    return any(needs) and objective.contrast_weight == 0 and not call.head.filtered


def run_cpo(
    call: LinearCall,
    objective: Objective,
    ref_logps: Tensor | None,
    ranks: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: Needs,
) -> LossResult:
    """The CPO loss and its gradients; ref_logps and ranks are (S,)."""
    linear, tokens = call.linear(hidden, weight, bias, needs), call.tokens(hidden, weight)
    problem = make_problem(objective, call.cu_groups, tokens.lengths, ref_logps, ranks)
    check_groups_of(objective, problem, tokens, call.cu_groups, ranks)
    unit = unit_coefficient(objective, problem.num_groups, problem.num_target_tokens)
    gain = float16_gain(hidden.dtype, unit) if any(needs) else 1.0
    filters = make_filter(linear, objective.beta / problem.num_groups, unit, gain) if any(needs) else None
    always = problem.best if objective.mle_weight else None

    def general(logps: Tensor, part: loop.ChunkTokens, wanted: bool) -> tuple[Tensor, Tensor | None]:
        sums = loop.segment_sums(logps, part)
        if not wanted:
            return sums, None
        here = problem.chunk(part.groups, part.segments)
        contrast = here.contrast_coefficients(sums)
        coef = here.sum_coefficients(contrast) * gain
        if filters is None:
            return sums, coef.repeat_interleave(part.slots, output_size=logps.numel())
        also = None if always is None else always[part.segments]
        return sums, filters.drop_candidates(contrast, coef, logps, part.slots, also)

    def without_contrast(part: loop.ChunkTokens) -> Tensor:
        here = problem.chunk(part.groups, part.segments)
        none = torch.zeros_like(here.lengths, dtype=loop.accumulate_dtype(linear.logits_dtype))
        coef = here.sum_coefficients(none) * gain
        return coef.repeat_interleave(part.slots, output_size=part.num_slots)

    known = without_contrast if coefficients_are_known(call, objective, needs) else None
    fits = objective.has_kernel and problem.groups.shape[1] <= linear.backend.contrast_candidates
    one_launch = fits and filters is None and any(needs) and known is None
    contrast = backend_contrast(linear.backend, problem, ranks, gain) if one_launch else general
    plan = call.plan(tokens, hidden, weight, needs, known_coefficients=known is not None)
    sums, grads = loop.run(linear, tokens, plan, needs, contrast, filters, known)
    loss = problem.loss(sums)[0]
    dropped = dropped_share(filters, loss)
    return LossResult(loss, sums, tokens.lengths, dropped, call.summed(grads.result()), gain, linear.backend.scale_)


def launch_options(problem: CPOProblem) -> dict[str, Any]:
    """The objective's numbers as a backend's launch takes them."""
    objective = problem.objective
    return {
        "beta": objective.beta,
        "margin": objective.margin,
        "label_smoothing": objective.label_smoothing,
        "loss_type": objective.loss_type,
        "length_normalized": objective.length_normalized,
        "contrast_weight": objective.contrast_weight,
        "mle_weight": objective.mle_weight,
        "num_groups": problem.num_groups,
        "num_target_tokens": problem.num_target_tokens,
        "max_candidates": problem.groups.shape[1],
    }


def backend_contrast(
    backend: registry.Backend, problem: CPOProblem, ranks: Tensor | None, gain: float | Tensor
) -> loop.Contrast:
    """The contrast of a chunk by the backend's one launch."""
    launch, options = backend.contrast, launch_options(problem)
    assert launch is not None
    segment_starts = None
    sizes = problem.groups.sizes
    if sizes is not None:
        segment_starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])

    def contrast(logps: Tensor, part: loop.ChunkTokens, _wanted: bool) -> tuple[Tensor, Tensor | None]:
        here = part.segments
        sums, coef = launch(
            logps,
            part.starts,
            None if segment_starts is None else segment_starts[part.groups.start : part.groups.stop + 1],
            problem.lengths[here],
            None if problem.ref_logps is None else problem.ref_logps[here],
            None if ranks is None else ranks[here],
            gain=1.0 if isinstance(gain, Tensor) else gain,
            **options,
        )
        return sums, coef * gain if isinstance(gain, Tensor) else coef

    return contrast


@dataclass(frozen=True)
class LogitsCall:
    """Everything of a loss of given logits (R, V) but them and the bias: padded groups of C segments of T rows.

    Attributes:
        backend: has a ``logits_loss``.
        head: the options of the head.
        targets: (R,) int64.
        problem: the objective bound to the groups.
        ranks: (S,) or None.
    """

    backend: registry.Backend
    head: Head
    targets: Tensor
    problem: CPOProblem
    ranks: Tensor | None

    def run(self, logits: Tensor, _weight: None, bias: Tensor | None, needs: Needs) -> LossResult:
        """The loss and the gradients of the logits and the bias, in one launch; the gradient is a tensor of its own."""
        problem, launch = self.problem, self.backend.logits_loss
        assert launch is not None
        segments = problem.lengths.numel()
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format) if any(needs) else None
        sums, _ = launch(
            logits.detach(),
            self.targets,
            grad,
            torch.arange(segments + 1, device=logits.device) * (self.targets.numel() // segments),
            None,
            problem.lengths,
            problem.ref_logps,
            self.ranks,
            None if bias is None else bias.detach(),
            *self.head.transform,
            gain=1.0,
            **launch_options(problem),
        )
        loss = problem.loss(sums)[0]
        grad_bias = None
        if needs[2] and grad is not None and bias is not None:
            grad_bias = grad.sum(0, dtype=torch.float32).to(bias.dtype)
        grads = (grad if needs[0] else None, None, grad_bias)
        return LossResult(loss, sums, problem.lengths, dropped_share(None, loss), grads, 1.0, self.backend.scale_)


def run_loss_fn(
    call: LinearCall,
    loss_fn: Callable[[Tensor, range], Tensor],
    candidates: int | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    needs: Needs,
) -> LossResult:
    """Any loss of the log-likelihoods: ``loss_fn`` sees (groups, candidates), or packed segments if that is None."""
    linear, tokens = call.linear(hidden, weight, bias, needs), call.tokens(hidden, weight)
    gain: float | Tensor | None = None
    losses: list[Tensor] = []
    num_groups = len(call.cu_groups) - 1
    # A loss of one's own has no beta: a candidate's coefficient is taken to be at most that of a mean over groups.
    filters = make_filter(linear, 1.0 / num_groups, 1.0 / num_groups, 1.0) if any(needs) else None

    def contrast(logps: Tensor, part: loop.ChunkTokens, wanted: bool) -> tuple[Tensor, Tensor | None]:
        nonlocal gain
        sums = loop.segment_sums(logps, part)
        if not wanted:
            losses.append(loss_fn(grouped(sums, part.groups), part.groups))
            return sums, None
        with torch.enable_grad():
            leaf = sums.detach().requires_grad_()
            loss = loss_fn(grouped(leaf, part.groups), part.groups)
            check_loss(loss)
            (coef,) = torch.autograd.grad(loss, leaf)
        losses.append(loss.detach())
        if gain is None:
            gain = loss_fn_gain(coef, hidden.dtype, num_groups)
            if filters is not None and filters.column_threshold is not None:
                filters.column_threshold = filters.column_threshold * gain
        if filters is None:
            return sums, (coef * gain).repeat_interleave(part.slots, output_size=logps.numel())
        return sums, filters.drop_candidates(coef, coef * gain, logps, part.slots)

    def grouped(sums: Tensor, groups: range) -> Tensor:
        return sums if candidates is None else sums.view(len(groups), candidates)

    plan = call.plan(tokens, hidden, weight, needs)
    sums, grads = loop.run(linear, tokens, plan, needs, contrast, filters)
    loss, scale_ = torch.stack(losses).sum(), linear.backend.scale_
    dropped, built = dropped_share(filters, loss), call.summed(grads.result())
    return LossResult(loss, sums, tokens.lengths, dropped, built, 1.0 if gain is None else gain, scale_)


def loss_fn_gain(coef: Tensor, dtype: torch.dtype, num_groups: int) -> float | Tensor:
    """Gain of a user's loss from its first coefficients: not more than for a mean over groups, not less than 1.

    A plain sum has coefficients near 1, which the gain of a mean would push beyond float16.
    """
    if dtype != torch.float16:
        return 1.0
    gain = float16_gain(dtype, coef.abs().max().clamp(min=1.0 / num_groups))
    return torch.clamp(gain, min=1.0) if isinstance(gain, Tensor) else max(gain, 1.0)


def check_loss(loss: Tensor) -> None:
    """Raise ``ValueError`` unless a user's loss is a differentiable scalar."""
    expected = "loss_fn must return a scalar tensor that depends differentiably on logps, got"
    if not isinstance(loss, Tensor):
        raise ValueError(f"{expected} {type(loss).__name__}")
    if loss.dim() != 0 or not loss.requires_grad:
        raise ValueError(f"{expected} shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}")
