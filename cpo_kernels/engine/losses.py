"""The losses of a call: coefficients for the loop, chunk by chunk, and the result made of the loop's sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels.kernels.numerics import accumulate_dtype
from cpo_kernels.objective import CPOOutput, CPOProblem, Groups, check_problem, make_groups, make_problem, summarize
from cpo_kernels.options import Head, Objective

from . import loop
from .call import Call, Grads, Needs, resolve
from .filters import GradientFilter
from .inputs import Inputs, largest_group, merge_ranks, per_segment

# The largest scaled coefficient of a float16 gradient: below 1, since products sum thousands of coefficients.
FLOAT16_TARGET = 2.0**-4


class LossResult(NamedTuple):
    """A loss computed with its gradients.

    Attributes:
        outputs: the loss, and what else the caller returns, of which nothing is differentiable.
        grads: gradients of hidden, weight and bias, times the gain.
        gain: see :func:`float16_gain`.
        scale_: the backend's kernel that scales the gradients in place.
    """

    outputs: tuple[Tensor, ...]
    grads: Grads
    gain: float | Tensor
    scale_: Callable[[Tensor, Tensor], None]

    def without_outputs(self) -> LossResult:
        """Leave the outputs out: a graph that held its own output would not be freed when its last user is gone."""
        return self._replace(outputs=())

    def scaled_(self, factor: Tensor) -> Grads:
        """Scale the gradients by ``factor`` in place, and undo the gain they were built with."""
        exact = isinstance(self.gain, float) and self.gain == 1.0
        scale = factor if exact else factor / self.gain
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


def coefficients_are_known(head: Head, objective: Objective, needs: Needs) -> bool:
    """Tell whether no coefficient depends on a log-probability: the loss is the likelihood of the truth alone."""
    return any(needs) and objective.contrast_weight == 0 and not head.filtered


class CPOLossOfCall:
    """The CPO objective of one call, as a :class:`loop.SequenceLoss`.

    What it needs of the groups is put together when the loop asks for it, after it has launched the first product.

    Args:
        objective: the objective.
        shape: of results with one number a segment.
        dtype: of hidden.
        hidden_size: H.
        call: the call.
        ref_logps: (S,) sums in the dtype of those of the call, or None.
        ranks: (S,) or None.
    """

    def __init__(
        self,
        objective: Objective,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        hidden_size: int,
        call: Call,
        ref_logps: Tensor | None,
        ranks: Tensor | None,
    ) -> None:
        self.objective, self.shape, self.call = objective, shape, call
        self.dtype, self.hidden_size = dtype, hidden_size
        self.ref_logps, self.ranks = ref_logps, ranks
        self.needs_any = any(call.needs)
        self.known_beforehand = coefficients_are_known(call.head, objective, call.needs)
        self.num_groups = objective.num_groups or len(call.tokens.rows_per_group)
        self.max_candidates = largest_group(call.tokens.segment_starts)
        fits = objective.has_kernel and self.max_candidates <= call.backend.contrast_candidates
        self.contrast_in_one_launch = fits and not (call.head.filtered and self.needs_any)
        self.summary_in_one_launch = fits and call.backend.summarize is not None
        self.group_losses: list[Tensor] = []

    @cached_property
    def groups(self) -> Groups:
        """The segments as padded groups."""
        return make_groups(self.call.tokens.segment_starts, self.call.tokens.lengths.device)

    @cached_property
    def problem(self) -> CPOProblem:
        """The objective bound to the groups on the device."""
        objective = replace(self.objective, num_target_tokens=self.known_target_tokens)
        return make_problem(objective, self.groups, self.call.tokens.lengths, self.ref_logps, self.ranks)

    @cached_property
    def host_problem(self) -> CPOProblem | None:
        """The groups of the call on the host, without a reference; None where the host does not know them."""
        tokens, ranks = self.call.tokens, self.call.tokens.host_ranks
        if tokens.host_lengths is None or (ranks is None) != (self.ranks is None):
            return None
        groups = make_groups(tokens.segment_starts, tokens.host_lengths.device)
        return make_problem(self.objective, groups, tokens.host_lengths, None, ranks)

    @cached_property
    def counted_targets(self) -> int | None:
        """Tokens of the candidates of rank 0 as the backend counts them; None where it does not or finds a fault."""
        count, tokens = self.call.backend.count_targets, self.call.tokens
        if count is None or tokens.host_lengths is None:
            return None
        options = {"max_candidates": self.max_candidates, "contrasts": self.objective.contrast_weight > 0}
        return count(self.groups.starts, tokens.lengths, self.ranks, **options)

    @cached_property
    def known_target_tokens(self) -> float | None:
        """The denominator of the negative log-likelihood, if the host knows it."""
        if self.objective.num_target_tokens is None and self.counted_targets is not None:
            return float(max(self.counted_targets, 1))
        if self.objective.num_target_tokens is not None or self.host_problem is None:
            return self.objective.num_target_tokens
        counted = self.host_problem.num_target_tokens
        return float(counted.numpy() if isinstance(counted, Tensor) else counted)

    @cached_property
    def num_target_tokens(self) -> float | Tensor:
        """The denominator of the negative log-likelihood."""
        known = self.known_target_tokens
        return self.problem.num_target_tokens if known is None else known

    @cached_property
    def unit(self) -> float | Tensor:
        """The largest coefficient that the objective gives a token's log-probability."""
        return unit_coefficient(self.objective, self.num_groups, self.num_target_tokens)

    @cached_property
    def gain(self) -> float | Tensor:
        """The gain of the gradients."""
        return float16_gain(self.dtype, self.unit) if self.needs_any and self.dtype == torch.float16 else 1.0

    @cached_property
    def filters(self) -> GradientFilter | None:
        """The filters of the gradients, or None."""
        if not (self.call.head.filtered and self.needs_any):
            return None
        candidate_unit = self.objective.beta / self.num_groups
        return make_filter(self.call.head, self.hidden_size, candidate_unit, self.unit, self.gain)

    def check(self) -> None:
        """Check the groups: on the host if it knows them."""
        if self.counted_targets is None:
            check_problem(self.problem if self.host_problem is None else self.host_problem)

    def contrast(self, logps: Tensor, part: loop.ChunkTokens, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Return the sums of a chunk's segments and the coefficients of its slots."""
        if self.contrast_in_one_launch and (wanted or self.summary_in_one_launch):
            sums, coef = self.launch_contrast(logps, part)
            return sums, coef if wanted else None
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
        # Candidates with a likelihood term, which a filter of the contrast must not drop.
        always = here.best if self.objective.mle_weight else None
        return sums, self.filters.drop_candidates(of_contrast, coef, logps, part.slots, always)

    def launch_contrast(self, logps: Tensor, part: loop.ChunkTokens) -> tuple[Tensor, Tensor]:
        """Run the contrast of a chunk in one launch of the backend."""
        launch, gain, here = self.call.backend.contrast, self.gain, part.segments
        assert launch is not None
        sums, coef = launch(
            logps,
            part.starts,
            self.segment_starts_of(part.groups),
            self.call.tokens.lengths[here],
            None if self.ref_logps is None else self.ref_logps[here],
            None if self.ranks is None else self.ranks[here],
            gain=1.0 if isinstance(gain, Tensor) else gain,
            **self.launch_options(self.num_target_tokens if self.objective.mle_weight else 1.0),
        )
        return sums, coef * gain if isinstance(gain, Tensor) else coef

    def segment_starts_of(self, groups: range) -> Tensor | None:
        """Return the prefix count of the segments of some groups; None where every group has as many."""
        starts = self.groups.starts
        return None if starts is None else starts[groups.start : groups.stop + 1]

    def launch_options(self, num_target_tokens: float | Tensor | None) -> dict[str, Any]:
        """Return the objective's numbers as keyword arguments of a backend's launch."""
        return launch_options(self.objective, self.num_groups, num_target_tokens, self.max_candidates)

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
        return LossResult(self.output(sums), grads, self.gain, self.call.backend.scale_)

    def output(self, sums: Tensor) -> CPOOutput:
        """Return the loss and its metrics from the sums (S,) of all segments."""
        if not self.summary_in_one_launch:
            per_group = torch.cat(self.group_losses) if self.group_losses else self.problem.contrast(sums).loss
            terms = self.problem.terms(sums, per_group)
            dropped = dropped_share(self.filters, terms.loss)
            return summarize(self.problem, terms, sums, self.shape, dropped)
        launch, tokens = self.call.backend.summarize, self.call.tokens
        assert launch is not None
        starts, num_target_tokens = self.groups.starts, self.known_target_tokens
        options = self.launch_options(num_target_tokens)
        given = sums, starts, tokens.lengths, self.ref_logps, self.ranks
        loss, contrastive, nll, accuracy, margin, nothing, logps, rewards = launch(*given, **options, shape=self.shape)
        dropped = nothing if self.filters is None else dropped_share(self.filters, loss)
        return CPOOutput(loss, contrastive, nll, logps, rewards, accuracy, margin, dropped)


def launch_options(
    objective: Objective, num_groups: float, num_target_tokens: float | Tensor | None, max_candidates: int
) -> dict[str, Any]:
    """Return an objective's numbers as keyword arguments of a backend's launch."""
    return {
        "beta": objective.beta,
        "margin": objective.margin,
        "label_smoothing": objective.label_smoothing,
        "loss_type": objective.loss_type,
        "length_normalized": objective.length_normalized,
        "contrast_weight": objective.contrast_weight,
        "mle_weight": objective.mle_weight,
        "num_groups": num_groups,
        "num_target_tokens": num_target_tokens,
        "max_candidates": max_candidates,
    }


def resolve_cpo(
    inputs: Inputs, ref_logps: Tensor | None, ranks: Tensor | None, objective: Objective, needs: Needs
) -> tuple[Call, tuple[Tensor | None, Tensor | None]]:
    """Check ``ref_logps`` and ``ranks``, resolve the call, and return it with both as the loss takes them."""
    objective.check_candidates(largest_group(inputs.cu_groups))
    ref = per_segment("ref_logps", ref_logps, inputs.shape, inputs.hidden)
    flat_ranks = merge_ranks(ranks, inputs.layout_ranks, inputs.shape, inputs.hidden)
    ref = None if ref is None else ref.to(accumulate_dtype(inputs.logits_dtype))
    known = coefficients_are_known(inputs.head, objective, needs)
    return resolve(inputs, needs, known_coefficients=known, ranks=flat_ranks), (ref, flat_ranks)


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

    def check(self) -> None:
        """Check nothing: any groups will do."""

    def finish(self, sums: Tensor, grads: Grads) -> LossResult:
        """Put the result together once all chunks have run."""
        loss = torch.stack(self.losses).sum()
        gain = 1.0 if self.gain is None else self.gain
        return LossResult((loss,), grads, gain, self.call.backend.scale_)


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
