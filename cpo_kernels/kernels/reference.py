"""Section 1 of the design in plain PyTorch: the oracle of every test.

Everything here is written for reading, in the dtype it is given (float64 included), with dense logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .numerics import (
    IGNORE_INDEX,
    accumulate_dtype,
)
from .transform import transform_logits


def token_logps(logits: Tensor, targets: Tensor, **transform: Any) -> Tensor:
    """Return log softmax(logits)[target] from dense logits: (..., V), (...) -> (...); 0 where the target is -100."""
    y = transform_logits(logits.to(accumulate_dtype(logits.dtype)), **transform)
    present = targets != IGNORE_INDEX
    picked = torch.log_softmax(y, -1).gather(-1, targets.where(present, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(present, picked, torch.zeros_like(picked))


def contrastive_loss(scores: Tensor, ranks: Tensor, present: Tensor) -> Tensor:
    """Return the loss of one group by its definition, a scalar; scores, ranks and present are (C,).

    ``sum_i [logsumexp({s_i} + {s_j : rank_j > rank_i}) - s_i]`` over the present candidates i that have a strictly
    lower-ranked present candidate (Plackett-Luce with ties left out).
    """
    loss = scores.new_zeros(())
    for i in range(scores.numel()):
        lower = [j for j in range(scores.numel()) if present[j] and ranks[j] > ranks[i]]
        if present[i] and lower:
            loss = loss + torch.logsumexp(scores[[i, *lower]], 0) - scores[i]
    return loss


def cpo_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    ref_logps: Tensor | None = None,
    ranks: Tensor | None = None,
    beta: float = 0.1,
    margin: float = 0.0,
    length_normalized: bool = False,
    contrast_weight: float = 1.0,
    mle_weight: float = 0.0,
    **transform: Any,
) -> Tensor:
    """Return the whole objective from dense logits: (G, C, T, V), (G, C, T) -> scalar, differentiable."""
    groups, candidates, _ = targets.shape
    present_tokens = targets != IGNORE_INDEX
    lengths = present_tokens.sum(-1)
    sums = token_logps(logits, targets, **transform).sum(-1)
    divisors = lengths.clamp(min=1) if length_normalized else torch.ones_like(lengths)
    if ranks is None:
        ranks = torch.tensor([0] + [1] * (candidates - 1), device=targets.device).expand(groups, candidates)
    rewards = beta * (sums if ref_logps is None else sums - ref_logps.to(sums.dtype)) / divisors
    scores = rewards + margin * (ranks > 0).to(sums.dtype)  # a bare bool would round the margin to float32
    contrast = sum(contrastive_loss(scores[g], ranks[g], lengths[g] > 0) for g in range(groups)) / groups
    best = (ranks == 0) & (lengths > 0)
    nll = -(sums * best).sum() / (lengths * best).sum()
    return contrast_weight * contrast + mle_weight * nll


# The bodies of the row operators. Tokens are grouped by row; `row_starts` is their prefix count, or None for one a row.
