"""Requests to a model with an attached loss, made from the padded rows of other trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.kernels.numerics import IGNORE_INDEX
from cpo_kernels.layout import CandidateLayout
from cpo_kernels.models import LinearLossOutput, SequenceLossRequest, StatisticsRequest
from cpo_kernels.models.adapters import AppliedHead
from cpo_kernels.options import HEAD_OPTIONS


def candidate_rows(
    labels: Tensor, group_sizes: Sequence[int], order: Tensor | None = None
) -> tuple[Tensor, CandidateLayout]:
    """Find targets and layout of candidates of which each has its own padded row.

    Args:
        labels: (B, L) int64, the token at each position, -100 for those that are not targets (prompt, padding). As
            everywhere in ``transformers``, position t - 1 predicts the label of position t.
        group_sizes: how many rows each group has, its best candidate first.
        order: (B,) int64, rows in the order of the candidates; None keeps their order.

    Returns:
        Targets (N,), and the layout of the B segments over the flattened (B * L) positions.
    """
    order = torch.arange(len(labels), device=labels.device) if order is None else order
    shifted = labels[order, 1:]
    present = shifted != IGNORE_INDEX
    segments, positions = present.nonzero(as_tuple=True)
    rows = order[segments] * labels.shape[1] + positions
    cu_tokens = [0, *present.sum(1).cumsum(0).tolist()]
    return shifted[present], CandidateLayout(cu_tokens, [0, *accumulate(group_sizes)], rows=rows)


def exact_head(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the head among ``options`` for a call without gradients, which has no filters."""
    names = [name for name in HEAD_OPTIONS if name not in ("grad_filter_eps", "candidate_eps")]
    return {name: options[name] for name in names if name in options}


class ObservedLossRequest(SequenceLossRequest):
    """A :class:`~cpo_kernels.models.SequenceLossRequest` whose answer also has the log-likelihoods (S,), detached."""

    def compute(self, hidden: Tensor, head: AppliedHead, transform: Mapping[str, Any]) -> LinearLossOutput:
        """Compute the loss and the log-likelihoods from which it is computed."""
        seen = torch.zeros(self.layout.num_segments, device=hidden.device)
        starts, loss_fn = self.layout.cu_groups, self.loss_fn

        def observed(logps: Tensor, groups: range) -> Tensor:
            seen[starts[groups.start] : starts[groups.stop]] = logps.detach().float()
            return loss_fn(logps, groups)

        request = SequenceLossRequest(self.targets, self.layout, observed, **self.options)
        return LinearLossOutput(loss=request.compute(hidden, head, transform).loss, logps=seen)


@dataclass
class OutputWithMeanLogits(LinearLossOutput):
    """The answer to a :class:`MeanLogitsRequest`, with the fields of its statistics.

    Attributes:
        mean_logits: (M,) float32, detached.
    """

    mean_logits: Tensor | None = None


class MeanLogitsRequest:
    """Another request, with the mean logits of some rows, which trainers log; they need no logits.

    The mean of a linear head's logits over the vocabulary is the product with the mean of its weight's rows, so M
    means cost one pass over the weight. A softcap is not linear: with one they are NaN.

    Args:
        request: the other request, see :mod:`cpo_kernels.models`.
        row_sets: M index tensors; each mean is taken over the whole vocabulary at these rows of the hidden states.
        statistics: a request for what needs a product of its own, or None.
    """

    def __init__(self, request: Any, *row_sets: Tensor, statistics: StatisticsRequest | None = None) -> None:
        self.request, self.row_sets = request, row_sets
        # They are no part of a compiled graph, and the compiler stops at how their tokens are found.
        self.statistics = None if statistics is None else torch.compiler.disable(statistics.compute)
        self.router_share = 0.0  # trainers add the router's loss with their own coefficient

    def compute(self, hidden: Tensor, head: AppliedHead, transform: Mapping[str, float]) -> OutputWithMeanLogits:
        """Compute the request's output with ``mean_logits``; arguments as for :meth:`CPORequest.compute`."""
        out = self.request.compute(hidden, head, transform)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            features = torch.stack([head.features[rows].float().mean(0) for rows in self.row_sets])
            means = features @ head.weight.mean(0, dtype=torch.float32)
            means = (means + (0 if head.bias is None else head.bias.float().mean())) * transform.get("logit_scale", 1.0)
            means = means * torch.nan if transform.get("softcap") else means
        more = {} if self.statistics is None else self.statistics(hidden, head, transform)
        return OutputWithMeanLogits(**out, **more, mean_logits=means)
