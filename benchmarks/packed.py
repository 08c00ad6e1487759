"""A CPO problem in the packed form, as a trainer has it: calls of the head, and their fp64 oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import cpo_kernels
from benchmarks.oracle import blocks, inside, relative
from benchmarks.real_run import Looked
from cpo_kernels import CandidateLayout, CPOOutput
from cpo_kernels.engine.plan import Plan


@dataclass(frozen=True)
class Result:
    """Loss (scalar), gradients (R, H) and (V, H), and the share of the gradient's mass that was left out."""

    loss: float
    grad_hidden: Tensor
    grad_weight: Tensor
    dropped: float = 0.0


@dataclass(frozen=True)
class Packed:
    """What a call is given: hidden (R, H) and weight (V, H) that require gradients, targets (N,), layout, options."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    layout: CandidateLayout
    options: dict[str, Any]

    @classmethod
    def of(cls, looked: Looked, dtype: torch.dtype, mle_weight: float | None = None) -> Packed:
        """A batch of the run in a dtype; `mle_weight`: other than the run's."""
        hidden, weight = (t.to(dtype, copy=True).requires_grad_() for t in (looked.hidden, looked.weight))
        options = looked.options if mle_weight is None else looked.options | {"mle_weight": mle_weight}
        return cls(hidden, weight, looked.targets, looked.layout, options)

    def to(self, dtype: torch.dtype) -> Packed:
        """The same values in another dtype."""
        hidden, weight = (t.detach().to(dtype, copy=True).requires_grad_() for t in (self.hidden, self.weight))
        return replace(self, hidden=hidden, weight=weight)

    @property
    def conditions(self) -> dict[str, Any]:
        """Sizes, for records; K is that of the first group."""
        vocab, width = self.weight.shape
        sizes = {"V": vocab, "H": width, "N": self.targets.numel(), "rows": self.hidden.shape[0]}
        dtype = {"dtype": str(self.hidden.dtype).removeprefix("torch.")}
        return sizes | {"K": self.layout.cu_groups[1] - 1} | dtype | {"mle_weight": self.options["mle_weight"]}

    def output(self, **head: Any) -> CPOOutput:
        """Of our call."""
        return cpo_kernels.linear_cpo_loss(
            self.hidden, self.weight, self.targets, layout=self.layout, **self.options, **head
        )

    def plan(self) -> Plan:
        """Of our call."""
        return cpo_kernels.plan(self.hidden, self.weight, self.targets, layout=self.layout, **self.options)

    def run(self, **head: Any) -> Result:
        """Our call: loss and all gradients."""
        out = self.output(**head)
        return Result(out.loss.item(), *self.gradients(out.loss), out.dropped.item())

    def run_by_token_logps(self, token_logps: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Result:
        """A peer that knows log-probabilities (N,) of tokens that each have a row (N, H)."""
        logps = token_logps(self.hidden[self.rows], self.weight, self.targets)
        loss = self.loss_of(logps.float())
        return Result(loss.item(), *self.gradients(loss))

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Of hidden and weight."""
        grad_hidden, grad_weight = torch.autograd.grad(loss, (self.hidden, self.weight))
        return grad_hidden, grad_weight

    @property
    def rows(self) -> Tensor:
        """(N,) row of each token."""
        rows = self.layout.rows
        return torch.arange(self.targets.numel(), device=self.targets.device) if rows is None else rows

    def loss_of(self, logps: Tensor) -> Tensor:
        """The objective by its definition, from token log-probabilities (N,); the first of each group is the truth."""
        options = self.options
        sums = torch.stack([logps[a:b].sum() for a, b in pairwise(self.layout.cu_tokens)])
        scores = options["beta"] * (sums - options["ref_logps"].to(sums))
        bounds = list(pairwise(self.layout.cu_groups))
        contrast = torch.stack([torch.logsumexp(scores[a:b], 0) - scores[a] for a, b in bounds]).mean()
        truths = [a for a, _ in bounds]
        tokens = sum(self.layout.cu_tokens[a + 1] - self.layout.cu_tokens[a] for a in truths)
        return options["contrast_weight"] * contrast - options["mle_weight"] * sums[truths].sum() / tokens


class Oracle:
    """The loss in fp64 and its gradients, all of them, by logits of some entries of the vocabulary at a time."""

    def __init__(self, problem: Packed) -> None:
        hidden, rows, targets = problem.hidden.detach().double(), problem.rows, problem.targets
        lse, logits_of_targets = hidden.new_full(hidden.shape[:1], -math.inf), hidden.new_empty(targets.shape)
        for start, block in blocks(problem.weight):
            logits = hidden @ block.T
            lse = torch.logaddexp(lse, torch.logsumexp(logits, dim=-1))
            here = inside(targets, start, block)
            logits_of_targets[here] = logits[rows[here], targets[here] - start]
        logps = (logits_of_targets - lse[rows]).requires_grad_()
        loss = problem.loss_of(logps)
        (coef,) = torch.autograd.grad(loss, logps)
        self.loss = loss.item()
        self.grad_hidden, self.grad_weight = torch.zeros_like(hidden), hidden.new_empty(problem.weight.shape)
        total = torch.zeros_like(lse).index_add_(0, rows, coef)
        for start, block in blocks(problem.weight):
            dlogits = -total[:, None] * torch.exp(hidden @ block.T - lse[:, None])
            here = inside(targets, start, block)
            dlogits.index_put_((rows[here], targets[here] - start), coef[here], accumulate=True)
            self.grad_hidden += dlogits @ block
            self.grad_weight[start : start + len(block)] = dlogits.T @ hidden

    def errors(self, result: Result) -> dict[str, float]:
        """Relative errors of a result by the names of records' values."""
        return {
            "error_loss": abs(result.loss - self.loss) / abs(self.loss),
            "error_grad_hidden": relative(result.grad_hidden, self.grad_hidden),
            "error_grad_weight": relative(result.grad_weight, self.grad_weight),
        }
