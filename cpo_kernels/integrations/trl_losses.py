"""TRL's DPO losses: the options of the objective that gives them, or else a function of log-likelihoods of pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cpo_kernels.kernels.device import to_device
from cpo_kernels.layout import CandidateLayout
from cpo_kernels.loss_table import LOSSES, TRL_NAMES, Pair, logistic, trl_options
from cpo_kernels.models import LinearLossOutput, LogpsRequest
from cpo_kernels.models.adapters import AppliedHead
from cpo_kernels.options import Objective

from .host import WAY_OUT
from .padded_rows import ObservedLossRequest, exact_head

# Losses that sort over the batch: Melnyk et al. 2024, arXiv 2406.05882, algorithms 1 and 2.
SORTED = ("aot", "aot_unpaired")
NAMES = (*TRL_NAMES, *SORTED, "sft")
# TRL's alpha divergence takes exp of at most this.
LARGEST_EXPONENT = 80.0


@dataclass(frozen=True)
class PairLosses:
    """The losses, with weights, that a ``trl.DPOTrainer`` trains on.

    Attributes:
        weights: names and weights.
        beta, label_smoothing, discopop_tau, use_weighting, f_divergence_type, f_alpha_divergence_coef: see
            ``trl.DPOConfig``.
        ld_alpha: weight of a candidate's tokens beyond the length of the shorter one of its pair (Liu et al. 2024,
            arXiv 2409.06411), or None.
    """

    weights: tuple[tuple[str, float], ...]
    beta: float
    label_smoothing: float = 0.0
    discopop_tau: float = Pair._field_defaults["tau"]
    ld_alpha: float | None = None
    use_weighting: bool = False
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5

    @classmethod
    def of(cls, trainer: Any) -> PairLosses:
        """Read the losses of a ``trl.DPOTrainer``.

        Raises:
            ValueError: a loss that is not known here, or a number that a loss does not take.
        """
        names = ("beta", "label_smoothing", "ld_alpha", "use_weighting", "f_divergence_type", "f_alpha_divergence_coef")
        options = {name: getattr(trainer, name) for name in names}
        weights = tuple(zip(trainer.loss_types, trainer.loss_weights, strict=True))
        return cls(weights, discopop_tau=trainer.args.discopop_tau, **options)

    def __post_init__(self) -> None:
        for name, weight in self.weights:
            if name not in NAMES:
                raise ValueError(f"loss_type={name!r} is not computed here; expected one of {NAMES}. {WAY_OUT}")
            self._options(name, contrast_weight=weight)
        if self.f_divergence_type not in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"):
            raise ValueError(f"f_divergence_type={self.f_divergence_type!r} is not computed here. {WAY_OUT}")

    def _options(self, name: str, **weights: Any) -> dict[str, Any]:
        """Return the options of the objective for one loss, checked; ``sft`` has those of no contrast."""
        named = {} if name == "sft" else {"label_smoothing": self.label_smoothing}
        options = {"beta": self.beta} | (named if name in (*SORTED, "sft") else trl_options(name, self.label_smoothing))
        Objective(**options, **weights)  # checks the numbers before anything runs
        return options | weights

    @property
    def objective(self) -> dict[str, Any] | None:
        """The options of :func:`cpo_kernels.linear_cpo_loss` that give the losses' sum; None where none do."""
        weights, contrasts = dict(self.weights), [name for name, _ in self.weights if name != "sft"]
        changed = self.use_weighting or self.ld_alpha not in (None, 1.0) or self.divergence is not None
        tau = self.discopop_tau != Pair._field_defaults["tau"] and "discopop" in weights
        if changed or tau or len(contrasts) > 1 or len(weights) < len(self.weights) or set(contrasts) & set(SORTED):
            return None
        contrast_weight = weights[contrasts[0]] if contrasts else 0.0
        mle_weight = weights.get("sft", 0.0)
        return self._options(*contrasts or ["sft"], contrast_weight=contrast_weight, mle_weight=mle_weight)

    @property
    def whole_batch(self) -> bool:
        """Whether a pair's loss depends on the log-likelihoods of the others."""
        names = [name for name, _ in self.weights]
        return bool({*names} & {*SORTED}) or (self.use_weighting and "sft" in names)

    @property
    def divergence(self) -> Callable[[Tensor], Tensor] | None:
        """The derivative of f at ``exp(x)``, up to a constant, by which x is scored; None for x itself, reverse KL.

        Wang et al. 2024, arXiv 2309.16240, table 1. The alpha divergence at 1 is reverse KL.
        """
        order = self.f_alpha_divergence_coef - 1.0
        if self.f_divergence_type == "forward_kl":
            return lambda x: -(-x).expm1()
        if self.f_divergence_type == "js_divergence":
            return lambda x: math.log(2) + logsigmoid(x)
        if self.f_divergence_type == "alpha_divergence" and abs(order) >= 1e-6:
            return lambda x: (order * x).clamp(max=LARGEST_EXPONENT).expm1() / order
        return None

    def split(self, layout: CandidateLayout) -> CandidateLayout:
        """Split each candidate in two segments where ``ld_alpha`` asks: the length that a pair shares, and the rest.

        Raises:
            ValueError: several negatives, of which no objective computes the losses.
        """
        if self.objective is not None:
            return layout
        most = max(end - start for start, end in pairwise(layout.cu_groups))
        if most != 2:
            asked = f"loss_type={[name for name, _ in self.weights]}, ld_alpha={self.ld_alpha}, "
            asked += f"use_weighting={self.use_weighting}, f_divergence_type={self.f_divergence_type!r}"
            raise ValueError(
                f"{asked} needs one negative per prompt (K = 1), got K = {most - 1}; plain 'sigmoid' or "
                "'sigmoid_norm', with or without 'sft', takes several"
            )
        if self.ld_alpha is None:
            return layout
        lengths = [end - start for start, end in pairwise(layout.cu_tokens)]
        shared = [min(pair) for pair in zip(lengths[::2], lengths[1::2], strict=True) for _ in pair]
        parts = [part for whole, own in zip(lengths, shared, strict=True) for part in (own, whole - own)]
        return CandidateLayout([0, *accumulate(parts)], [2 * start for start in layout.cu_groups], rows=layout.rows)

    def weighted_sums(self, segments: Tensor) -> Tensor:
        """Return the log-likelihoods (S,) that the losses compare from those of the segments of :meth:`split`."""
        if self.objective is not None or self.ld_alpha is None:
            return segments
        shared, beyond = segments.view(-1, 2).T
        return shared + self.ld_alpha * beyond

    def of_batch(
        self, layout: CandidateLayout, ref_logps: Tensor, sharpened: Tensor | None
    ) -> Callable[[Tensor, range], Tensor]:
        """Make the ``loss_fn`` of :func:`cpo_kernels.linear_sequence_loss` for a batch of G pairs.

        Args:
            layout: as :meth:`split` returns it.
            ref_logps: (2 G,) sums under the reference, with :meth:`weighted_sums`.
            sharpened: of ``use_weighting``, the log-likelihoods of the segments under the policy at half of its
                temperature; see :meth:`certainty`.
        """
        pairs = layout.num_groups
        lengths = to_device(layout.boundaries[0].diff(), ref_logps.device).view(pairs, 2, -1).sum(-1)

        def loss_fn(logps: Tensor, groups: range) -> Tensor:
            here = slice(groups.start, groups.stop)
            own, ref, tokens = logps.view(len(groups), 2, -1), ref_logps.view(pairs, 2)[here], lengths[here]
            policy = self.weighted_sums(logps).view(-1, 2)
            scores = policy - ref if self.divergence is None else self.divergence(policy - ref)
            total = torch.zeros_like(policy[:, 0])
            for name, weight in self.weights:
                if name == "sft":  # of the whole batch's tokens; each pair gets an equal share of these pairs' sum
                    share = pairs / (lengths[:, 0].sum().clamp(min=1) * len(groups))
                    losses = (-own[:, 0].sum() * share).expand(len(groups))
                else:
                    losses = self._contrast(name, policy, ref, scores, tokens.clamp(min=1))
                total = total + weight * losses
            if sharpened is not None:
                total = total * self.certainty(own, sharpened.view(pairs, 2, -1)[here], tokens)
            return total.sum() / pairs

        return loss_fn

    def _contrast(self, name: str, policy: Tensor, ref: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
        """Compute one loss (G,) of pairs from their log-likelihoods, scores and lengths, (G, 2) each."""
        if name in SORTED:
            sides = scores.unbind(1) if name == "aot_unpaired" else (x[:, 0] - x[:, 1] for x in (policy, ref))
            better, worse = (side.sort().values for side in sides)
            return logistic(Pair.of_ratios(better, worse, self.beta, label_smoothing=self.label_smoothing)).loss
        options = trl_options(name, self.label_smoothing)
        better, worse = (scores / tokens if options["length_normalized"] else scores).unbind(1)
        numbers = {"label_smoothing": options["label_smoothing"], "tau": self.discopop_tau}
        return LOSSES[options["loss_type"]].formula(Pair.of_ratios(better, worse, self.beta, **numbers)).loss

    @staticmethod
    def certainty(logps: Tensor, sharpened: Tensor, tokens: Tensor) -> Tensor:
        """Compute the weights (G,) of WPO, Zhou et al. 2024, arXiv 2406.11827, equation 2, without gradient.

        A token's ``log p - log sum_v p_v^2`` is its log-probability at half of the temperature less the one at the
        whole, because the former is ``2 log p - log sum_v p_v^2``.

        Args:
            logps: (G, 2, P) sums of P parts of each candidate.
            sharpened: (G, 2, P), at half of the temperature.
            tokens: (G, 2).
        """
        return ((sharpened - logps.detach()).sum(-1) / tokens.clamp(min=1)).sum(-1).exp()


class PairLossRequest:
    """A request to a model for :class:`PairLosses`, in one pass or, for losses of the whole batch, by log-likelihoods.

    Its answer has the loss, and the log-likelihoods of the layout's segments, detached.

    Args:
        losses: the losses.
        targets: (N,) int64.
        layout: of pairs, as :meth:`PairLosses.split` returns it.
        ref_logps: (S,), see :meth:`PairLosses.of_batch`.
        options: head keywords of ``linear_sequence_loss``.
    """

    def __init__(
        self, losses: PairLosses, targets: Tensor, layout: CandidateLayout, ref_logps: Tensor, **options: Any
    ) -> None:
        self.losses, self.targets, self.layout, self.ref_logps = losses, targets, layout, ref_logps
        self.options = options

    def compute(self, hidden: Tensor, head: AppliedHead, transform: Mapping[str, float]) -> LinearLossOutput:
        """Compute the loss; arguments as for :meth:`cpo_kernels.models.CPORequest.compute`."""
        arguments = hidden, head, transform
        sharpened = None
        if self.losses.use_weighting:
            half = exact_head(self.options) | {"temperature": self.options.get("temperature", 1.0) / 2}
            with torch.no_grad():
                sharpened = LogpsRequest(self.targets, self.layout, **half).compute(*arguments).logps
        loss_fn = self.losses.of_batch(self.layout, self.ref_logps, sharpened)
        if not self.losses.whole_batch:
            return ObservedLossRequest(self.targets, self.layout, loss_fn, **self.options).compute(*arguments)
        logps: Any = LogpsRequest(self.targets, self.layout, **self.options).compute(*arguments).logps
        return LinearLossOutput(loss=loss_fn(logps, range(self.layout.num_groups)), logps=logps.detach())
