"""The losses of a call: coefficients for the loop, chunk by chunk, and the result made of the loop's sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels.kernels.backend import Backend
from cpo_kernels.kernels.device import is_host
from cpo_kernels.kernels.numerics import accumulate_dtype
from cpo_kernels.objective import CPOProblem, LossTerms, check_problem, make_groups, make_problem
from cpo_kernels.options import Head, Objective

from . import loop
from .call import Call, Grads, Needs, resolve
from .filters import GradientFilter
from .inputs import Inputs, largest_group, merge_ranks, per_segment
from .tokens import Tokens

# The largest scaled coefficient of a float16 gradient: below 1, since products sum thousands of coefficients.
FLOAT16_TARGET = 2.0**-4


class LossResult(NamedTuple):
    """A loss computed with its gradients.

    Attributes:
        terms: the loss, and the terms that it is the sum of.
        sums: (S,) sums of token log-probabilities.
        dropped: share of the gradient's mass that filters left out, scalar.
        grads: gradients of hidden, weight and bias, times the gain.
        gain: see :func:`float16_gain`.
        scale_: the backend's kernel that scales the gradients in place.
    """

    terms: LossTerms
    sums: Tensor
    dropped: Tensor
    grads: Grads
    gain: float | Tensor
    scale_: Callable[[Tensor, Tensor], None]

    def scaled_(self, factor: Tensor) -> Grads:
        """Scale the gradients by ``factor`` in place, and undo the gain they were built with."""
        scale = factor / self.gain
        for grad in self.grads:
            if grad is not None:
                self.scale_(grad, scale)
        return self.grads


def float16_gain(dtype: torch.dtype, largest_coefficient: float | Tensor) -> float | Tensor:
    """Return the power of two that lifts coefficients of a float16 gradient out of its subnormals.

    For every other dtype it is 1.

    Gradients are built before the upstream gradient (a loss scale, say) is known, and must not underflow before.
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
    """Return the largest coefficient that the objective gives a token's log-probability."""
    per_group = abs(objective.contrast_weight) * objective.beta / num_groups
    return per_group + abs(objective.mle_weight) / num_target_tokens if objective.mle_weight else per_group


def make_filter(
    head: Head, hidden_size: int, candidate_unit: float, token_unit: float | Tensor, gain: float | Tensor
) -> GradientFilter | None:
    """Make the filters that the head asks for; None for exact gradients."""
    if not head.filtered:
        return None
    return GradientFilter(
        candidate_threshold=None if head.candidate_eps is None else head.candidate_eps * candidate_unit,
        column_threshold=None if head.grad_filter_eps is None else head.grad_filter_eps * token_unit * gain,
        slope=head.logit_scale / head.temperature,
        hidden_size=hidden_size,
    )


def dropped_share(filters: GradientFilter | None, loss: Tensor) -> Tensor:
    """Return the share of the gradient that the filters left out, as a scalar like the loss; 0 without filters."""
    return loss.new_zeros(()).detach() if filters is None else filters.share.to(loss)


def bind_objective(objective: Objective, tokens: Tokens, ref_logps: Tensor | None, ranks: Tensor | None) -> CPOProblem:
    """Bind the objective to the groups of a call and check them: on the host if the lengths are known there."""
    groups = make_groups(tokens.segment_starts, tokens.lengths.device)
    problem = make_problem(objective, groups, tokens.lengths, ref_logps, ranks)
    if tokens.host_lengths is not None and not is_host(problem.lengths.device):
        groups = make_groups(tokens.segment_starts, tokens.host_lengths.device)
        check_problem(
            make_problem(objective, groups, tokens.host_lengths, None, None if ranks is None else ranks.cpu())
        )
    else:
        check_problem(problem)
    return problem


def coefficients_are_known(head: Head, objective: Objective, needs: Needs) -> bool:
    """Tell whether no coefficient depends on a log-probability: the loss is the likelihood of the truth alone."""
    return any(needs) and objective.contrast_weight == 0 and not head.filtered


def resolve_cpo(
    inputs: Inputs, ref_logps: Tensor | None, ranks: Tensor | None, objective: Objective, needs: Needs
) -> tuple[Call, CPOProblem]:
    """Check ``ref_logps`` and ``ranks``, resolve the call and bind the objective to its groups."""
    objective.check_candidates(largest_group(inputs.cu_groups))
    ref = per_segment("ref_logps", ref_logps, inputs.shape, inputs.hidden)
    flat_ranks = merge_ranks(ranks, inputs.layout_ranks, inputs.shape, inputs.hidden)
    ref = None if ref is None else ref.to(accumulate_dtype(inputs.logits_dtype))
    call = resolve(inputs, needs, known_coefficients=coefficients_are_known(inputs.head, objective, needs))
    return call, bind_objective(objective, call.tokens, ref, flat_ranks)


class CPOLossOfCall:
    """The CPO objective of one call, as a :class:`loop.SequenceLoss`."""

    def __init__(self, call: Call, problem: CPOProblem, dtype: torch.dtype, hidden_size: int) -> None:
        objective, needs = problem.objective, any(call.needs)
        unit = unit_coefficient(objective, problem.num_groups, problem.num_target_tokens)
        self.call, self.problem = call, problem
        self.gain = float16_gain(dtype, unit) if needs else 1.0
        candidate_unit = objective.beta / problem.num_groups
        self.filters = make_filter(call.head, hidden_size, candidate_unit, unit, self.gain) if needs else None
        self.known_beforehand = coefficients_are_known(call.head, objective, call.needs)
        # Candidates with a likelihood term, which a filter of the contrast must not drop.
        self.always = problem.best if objective.mle_weight else None
        fits = objective.has_kernel and problem.groups.shape[1] <= call.backend.contrast_candidates
        self.one_launch = needs and fits and self.filters is None and not self.known_beforehand
        self.group_losses: list[Tensor] = []

    def contrast(self, logps: Tensor, part: loop.ChunkTokens, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Return the sums of a chunk's segments and the coefficients of its slots."""
        if self.one_launch:
            return launch_contrast(self.call.backend, self.problem, self.gain, logps, part)
        sums = loop.segment_sums(logps, part)
        here = self.problem.chunk(part.groups, part.segments)
        contrast = here.contrast(sums)
        self.group_losses.append(contrast.loss)
        if not wanted:
            return sums, None
        of_contrast = here.contrast_coefficients(contrast)
        coef = here.sum_coefficients(of_contrast) * self.gain
        if self.filters is None:
            return sums, coef.repeat_interleave(part.slots, output_size=logps.numel())
        also = None if self.always is None else self.always[part.segments]
        return sums, self.filters.drop_candidates(of_contrast, coef, logps, part.slots, also)

    def coefficients(self, part: loop.ChunkTokens) -> Tensor | None:
        """Return the coefficients of a chunk's slots where the contrast has no weight, else None."""
        if not self.known_beforehand:
            return None
        here = self.problem.chunk(part.groups, part.segments)
        none = torch.zeros_like(here.lengths, dtype=accumulate_dtype(self.call.logits_dtype))
        coef = here.sum_coefficients(none) * self.gain
        return coef.repeat_interleave(part.slots, output_size=part.num_slots)

    def finish(self, sums: Tensor, grads: Grads) -> LossResult:
        """Put the result together once all chunks have run."""
        per_group = torch.cat(self.group_losses) if self.group_losses else self.problem.contrast(sums).loss
        terms = self.problem.terms(sums, per_group)
        dropped = dropped_share(self.filters, terms.loss)
        return LossResult(terms, sums, dropped, grads, self.gain, self.call.backend.scale_)


def make_cpo_loss(
    problem: CPOProblem, dtype: torch.dtype, hidden_size: int, call: Call, *given: Tensor | None
) -> CPOLossOfCall:
    """Make the loss of a call from ``given``, the tensors of the problem that users gave."""
    return CPOLossOfCall(call, problem.with_given(*given), dtype, hidden_size)


def launch_options(problem: CPOProblem) -> dict[str, Any]:
    """Return the objective's numbers as keyword arguments of a backend's launch."""
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


def launch_contrast(
    backend: Backend, problem: CPOProblem, gain: float | Tensor, logps: Tensor, part: loop.ChunkTokens
) -> tuple[Tensor, Tensor]:
    """Run the contrast of a chunk in one launch of the backend."""
    launch, here, starts = backend.contrast, part.segments, problem.groups.starts
    assert launch is not None
    sums, coef = launch(
        logps,
        part.starts,
        None if starts is None else starts[part.groups.start : part.groups.stop + 1],
        problem.lengths[here],
        None if problem.ref_logps is None else problem.ref_logps[here],
        None if problem.segment_ranks is None else problem.segment_ranks[here],
        gain=1.0 if isinstance(gain, Tensor) else gain,
        **launch_options(problem),
    )
    return sums, coef * gain if isinstance(gain, Tensor) else coef


class OwnLossOfCall:
    """A user's loss of the log-likelihoods of one call, as a :class:`loop.SequenceLoss`.

    ``loss_fn`` sees (groups, candidates), or packed segments if ``candidates`` is None.
    """

    def __init__(
        self,
        loss_fn: Callable[[Tensor, range], Tensor],
        candidates: int | None,
        dtype: torch.dtype,
        hidden_size: int,
        call: Call,
    ) -> None:
        self.call, self.loss_fn, self.candidates, self.dtype = call, loss_fn, candidates, dtype
        self.num_groups = len(call.tokens.segment_starts) - 1
        # A user's loss has no beta: a candidate's coefficient is assumed to be at most that in a mean over groups.
        unit = 1.0 / self.num_groups
        self.filters = make_filter(call.head, hidden_size, unit, unit, 1.0) if any(call.needs) else None
        self.gain: float | Tensor | None = None
        self.losses: list[Tensor] = []

    def contrast(self, logps: Tensor, part: loop.ChunkTokens, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Return the sums of a chunk's segments and the coefficients of its slots, by autograd of the loss."""
        sums = loop.segment_sums(logps, part)
        if not wanted:
            loss = self.loss_fn(self.grouped(sums, part.groups), part.groups)
            check_loss(loss, differentiable=False)
            self.losses.append(loss)
            return sums, None
        with torch.enable_grad():
            leaf = sums.detach().requires_grad_()
            loss = self.loss_fn(self.grouped(leaf, part.groups), part.groups)
            check_loss(loss, differentiable=True)
            (coef,) = torch.autograd.grad(loss, leaf)
        self.losses.append(loss.detach())
        if self.gain is None:
            self.gain = loss_fn_gain(coef, self.dtype, self.num_groups)
            if self.filters is not None and self.filters.column_threshold is not None:
                self.filters.column_threshold = self.filters.column_threshold * self.gain
        if self.filters is None:
            return sums, (coef * self.gain).repeat_interleave(part.slots, output_size=logps.numel())
        return sums, self.filters.drop_candidates(coef, coef * self.gain, logps, part.slots)

    def coefficients(self, part: loop.ChunkTokens) -> None:
        """Return None: a user's function may depend on the log-probabilities in any way."""

    def grouped(self, sums: Tensor, groups: range) -> Tensor:
        """Shape the sums of some groups as ``loss_fn`` takes them: (groups, candidates), or unchanged if packed."""
        return sums if self.candidates is None else sums.view(len(groups), self.candidates)

    def finish(self, sums: Tensor, grads: Grads) -> LossResult:
        """Put the result together once all chunks have run."""
        loss = torch.stack(self.losses).sum()
        nothing = loss.detach().new_zeros(())
        gain = 1.0 if self.gain is None else self.gain
        dropped = dropped_share(self.filters, loss)
        return LossResult(LossTerms(loss, nothing, nothing), sums, dropped, grads, gain, self.call.backend.scale_)


def loss_fn_gain(coef: Tensor, dtype: torch.dtype, num_groups: int) -> float | Tensor:
    """Return the gain of a user's loss from its first coefficients: from 1 to that of a mean over groups.

    A plain sum has coefficients near 1, which the gain of a mean would push beyond float16.
    """
    if dtype != torch.float16:
        return 1.0
    gain = float16_gain(dtype, coef.abs().max().clamp(min=1.0 / num_groups))
    return torch.clamp(gain, min=1.0) if isinstance(gain, Tensor) else max(gain, 1.0)


def check_loss(loss: object, *, differentiable: bool = True) -> None:
    """Raise ``ValueError`` unless a user's loss is a scalar, and depends on the log-likelihoods if that is needed."""
    expected = "loss_fn must return a scalar tensor that depends differentiably on logps, got"
    if not isinstance(loss, Tensor):
        raise ValueError(f"{expected} {type(loss).__name__}")
    if loss.dim() != 0 or not (loss.requires_grad or not differentiable):
        raise ValueError(f"{expected} shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}")
