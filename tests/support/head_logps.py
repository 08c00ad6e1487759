"""Log-likelihoods of a linear head, dense and fused."""

from __future__ import annotations

from itertools import pairwise

import torch
from problems import (
    Problem,
    token_rows,
)
from torch import Tensor

from cpo_kernels import linear_sequence_logps
from cpo_kernels.kernels import reference

TRANSFORM = ("logit_scale", "softcap", "temperature")


def transform_of(problem: Problem) -> dict[str, float]:
    return {name: value for name, value in problem.options.items() if name in TRANSFORM}


def eager_logps(problem: Problem) -> Tensor:
    """Compute sequence log-likelihoods from dense logits, (G, C) or (S,)."""
    hidden = problem.hidden if problem.layout is None else problem.hidden[token_rows(problem)]
    logits = hidden @ problem.weight.T
    tokens = reference.token_logps(logits, problem.targets, bias=problem.bias, **transform_of(problem))
    if problem.layout is None:
        return tokens.sum(-1)
    return torch.stack([tokens[a:b].sum() for a, b in pairwise(problem.layout.cu_tokens)])


def fused_logps(problem: Problem, **head) -> Tensor:
    arguments = problem.hidden, problem.weight, problem.targets
    head = transform_of(problem) | head
    return linear_sequence_logps(*arguments, layout=problem.layout, bias=problem.bias, **head)
