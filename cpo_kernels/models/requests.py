"""The requests that a model with an attached loss answers, and the form of its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from cpo_kernels.engine.statistics import linear_token_statistics
from cpo_kernels.functional import linear_cpo_loss, linear_sequence_logps, linear_sequence_loss
from cpo_kernels.kernels.numerics import IGNORE_INDEX
from cpo_kernels.layout import CandidateLayout
from cpo_kernels.options import suggests_arguments

from .adapters import AppliedHead


@dataclass
class LinearLossOutput(ModelOutput):
    """The answer of a model to a request; a field that the request does not compute is None.

    Attributes:
        loss: scalar, differentiable.
        logits: always None; they are never materialised.
        logps: (S,) log-likelihoods, differentiable for a :class:`LogpsRequest`, else detached.
        rewards: (S,) ``beta * (logp - ref_logp)``.
        contrastive_loss, nll_loss, accuracy, margin, dropped: scalars, see :class:`~cpo_kernels.CPOOutput`.
        embeddings: (S, H) float32, see :class:`LogpsRequest`.
        token_logps, entropy, samples, top1: (N,), see :class:`StatisticsRequest`.
        aux_loss: scalar, differentiable, the load-balancing loss of a mixture of experts that outputs router logits.
        router_loss: scalar, detached, the part of ``loss`` that comes from ``aux_loss``: ``router_aux_loss_coef`` times
            ``aux_loss``, as the model adds it with labels, times the ``router_share`` of the request.
        exact: internal, see :meth:`protected`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    logps: Tensor | None = None
    rewards: Tensor | None = None
    contrastive_loss: Tensor | None = None
    nll_loss: Tensor | None = None
    accuracy: Tensor | None = None
    margin: Tensor | None = None
    dropped: Tensor | None = None
    embeddings: Tensor | None = None
    token_logps: Tensor | None = None
    entropy: Tensor | None = None
    samples: Tensor | None = None
    top1: Tensor | None = None
    aux_loss: Tensor | None = None
    router_loss: Tensor | None = None
    exact: ExactValues | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in () if self.exact is None else self.exact.values.items():
            if getattr(self, name).dtype != value.dtype:
                setattr(self, name, value)

    def protected(self) -> LinearLossOutput:
        """Return a copy safe from FSDP2's ``output_dtype``, by which accelerate rounds all outputs to 16 bits.

        FSDP2 rounds a copy of an output field by field; the protected output restores its exact values when it is
        copied. FSDP2 has by then put the hooks on them by which it learns of the backward pass.
        """
        values = {name: value for name, value in self.items() if torch.is_floating_point(value)}
        return replace(self, exact=ExactValues(values))


class ExactValues:
    """Fields of an output by name, in a class in which FSDP2 does not look for tensors."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values


@partial(suggests_arguments, passes_to=linear_cpo_loss)
class CPORequest:
    """A request to a model for the loss of :func:`cpo_kernels.linear_cpo_loss`.

    Not a dataclass, because FSDP casts the tensors of dataclasses among a forward's arguments to its compute dtype,
    and reference log-likelihoods must stay in float32.

    Args:
        targets: (N,) int64, the vocabulary entry of each token; -100 for none.
        layout: which row of the flattened (B * L, H) hidden states predicts each token, and which candidate of
            which group it belongs to.
        router_share: factor of the model's own load-balancing loss: the batch's share of the accumulated batches, or 0
            to leave that loss to the caller.
        options: objective and head keywords of ``linear_cpo_loss`` (``ref_logps``, ``beta``, ``mle_weight``, ...).
            ``bias``, ``logit_scale`` and ``softcap`` are the model's own.
    """

    def __init__(self, targets: Tensor, layout: CandidateLayout, *, router_share: float = 1.0, **options: Any) -> None:
        self.targets, self.layout, self.router_share, self.options = targets, layout, router_share, options

    def compute(self, hidden: Tensor, head: AppliedHead, transform: Mapping[str, float]) -> LinearLossOutput:
        """Compute the loss from hidden states (R, H), the applied head and the transform of its logits."""
        options = {**head.options, **self.options, **transform}
        out = linear_cpo_loss(head.features, head.weight, self.targets, layout=self.layout, **options)
        return LinearLossOutput(
            loss=out.loss,
            logps=out.logps,
            rewards=out.rewards,
            contrastive_loss=out.contrastive_loss,
            nll_loss=out.nll_loss,
            accuracy=out.accuracy,
            margin=out.margin,
            dropped=out.dropped,
        )


@partial(suggests_arguments, passes_to=linear_sequence_loss)
class SequenceLossRequest:
    """A request for the loss of :func:`cpo_kernels.linear_sequence_loss`, any function of the log-likelihoods.

    Args:
        targets: as for :class:`CPORequest`.
        layout: as for :class:`CPORequest`.
        loss_fn: called with log-likelihoods (s,) of the segments of some whole groups, and ``groups``, the range of
            their indices; returns the sum of their losses, a scalar.
        router_share: as for :class:`CPORequest`.
        options: head keywords of ``linear_sequence_loss``.
    """

    def __init__(
        self,
        targets: Tensor,
        layout: CandidateLayout,
        loss_fn: Callable[[Tensor, range], Tensor],
        *,
        router_share: float = 1.0,
        **options: Any,
    ) -> None:
        self.targets, self.layout, self.loss_fn, self.options = targets, layout, loss_fn, options
        self.router_share = router_share

    def compute(self, hidden: Tensor, head: AppliedHead, transform: Mapping[str, float]) -> LinearLossOutput:
        """Compute the loss; arguments as for :meth:`CPORequest.compute`."""
        options = {**head.options, **self.options, **transform}
        tensors = head.features, head.weight, self.targets
        return LinearLossOutput(loss=linear_sequence_loss(*tensors, self.loss_fn, layout=self.layout, **options))


@partial(suggests_arguments, passes_to=linear_sequence_logps)
class LogpsRequest:
    """A request for the log-likelihoods of :func:`cpo_kernels.linear_sequence_logps`, one per segment.

    Args:
        targets, layout: as for :class:`CPORequest`.
        pool: also return ``embeddings`` (S, H) float32, without gradient: for each segment the mean of the hidden
            states of the rows that predict its tokens, 0 for an absent one.
        options: head keywords of ``linear_sequence_logps``.
    """

    def __init__(self, targets: Tensor, layout: CandidateLayout, *, pool: bool = False, **options: Any) -> None:
        self.targets, self.layout, self.pool, self.options = targets, layout, pool, options

    def compute(self, hidden: Tensor, head: AppliedHead, transform: Mapping[str, float]) -> LinearLossOutput:
        """Compute the log-likelihoods (S,); arguments as for :meth:`CPORequest.compute`."""
        options = {**head.options, **self.options, **transform}
        logps = linear_sequence_logps(head.features, head.weight, self.targets, layout=self.layout, **options)
        embeddings = mean_rows(hidden.detach(), self.targets, self.layout) if self.pool else None
        return LinearLossOutput(logps=logps, embeddings=embeddings)


@partial(suggests_arguments, passes_to=linear_token_statistics)
class StatisticsRequest:
    """A request for :func:`cpo_kernels.linear_token_statistics` of some rows, without gradient.

    Args:
        targets: (N,) int64, the vocabulary entry of each token; -100 for none.
        rows: (N,) int64, the row of the flattened (B * L, H) hidden states that predicts each token.
        seed: of the samples, see ``linear_token_statistics``; None for no samples.
        num_samples: None for samples (N,), a number for samples (N, num_samples).
        sample_mask: bool of the shape of the samples, which of them to draw; None: all.
        entropy: whether to compute entropies (N,).
        top1: whether to tell which targets are most probable words, (N,) bool.
        options: head keywords of ``linear_token_statistics``.
    """

    def __init__(
        self,
        targets: Tensor,
        rows: Tensor,
        *,
        seed: int | Tensor | None = None,
        num_samples: int | None = None,
        sample_mask: Tensor | None = None,
        entropy: bool = False,
        top1: bool = False,
        **options: Any,
    ) -> None:
        self.targets, self.rows = targets, rows
        own = {"seed": seed, "num_samples": num_samples, "sample_mask": sample_mask, "entropy": entropy, "top1": top1}
        self.options = options | own

    def compute(self, hidden: Tensor, head: AppliedHead, transform: Mapping[str, float]) -> LinearLossOutput:
        """Compute the statistics (N,); arguments as for :meth:`CPORequest.compute`."""
        options = {**head.options, **self.options, **transform}
        out = linear_token_statistics(head.features.detach()[self.rows], head.weight, self.targets, **options)
        return LinearLossOutput(token_logps=out.logps, entropy=out.entropy, samples=out.samples, top1=out.top1)


def mean_rows(hidden: Tensor, targets: Tensor, layout: CandidateLayout) -> Tensor:
    """Average the rows of ``hidden`` (R, H) that predict a segment's tokens: (S, H) float32, 0 for absent ones."""
    present = targets != IGNORE_INDEX
    rows = torch.arange(layout.num_tokens, device=hidden.device) if layout.rows is None else layout.rows
    counts = torch.cat([present.new_zeros(1, dtype=torch.int64), present.cumsum(0)])
    lengths = counts[torch.tensor(layout.cu_tokens, device=hidden.device)].diff()
    sums = torch.segment_reduce(hidden[rows[present]].float(), "sum", lengths=lengths, initial=0)
    return sums / lengths.clamp(min=1).unsqueeze(1)
