"""The floor: the bare matrix products of one call, with the chunks that our plan would use.

Three for a trained head, two for a frozen one, one without gradients, and one more where a reference model's
log-likelihoods are to be had from its hidden states. Everything else the loss does (softmax, contrast, gather,
accumulation) is on top of it. The products are `torch.mm` and `Tensor.addmm_` in the dtype of the inputs; the gradient
of the weight is summed over chunks as `addmm_` does it.
"""

from __future__ import annotations

import torch
from torch import Tensor

import cpo_kernels
from benchmarks.problem import BETA, IGNORE, Problem
from benchmarks.shapes import DPO, FROZEN, NO_GRAD, TRAINED, Shape
from cpo_kernels.engine.plan import Plan

PRODUCTS = {TRAINED: 3, FROZEN: 2, NO_GRAD: 1}


def products(shape: Shape, work: str) -> int:
    """Return how many products of (R, V, H) some work on a shape cannot do without."""
    return PRODUCTS[shape.mode] + (work == DPO)


def plan_of(problem: Problem, max_logits_bytes: int | None) -> Plan:
    """Return what our call will do with a problem."""
    tensors = (problem.hidden, problem.weight, problem.targets)
    options = {"ref_logps": problem.ref_logps, "beta": BETA, "max_logits_bytes": max_logits_bytes}
    return cpo_kernels.plan(*tensors, **options)


def product_rows(plan: Plan) -> list[int]:
    """Return the rows of each product of one call: a chunk's, a block at a time where a chunk has several."""
    rows = []
    for chunk in plan.chunks:
        left = chunk.num_rows
        while left:
            rows.append(min(left, chunk.rows_per_block))
            left -= rows[-1]
    return rows


class Floor:
    """Multiplies `rows[i]` rows at a time, into fresh outputs in every call, as a contestant must, or into the same."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, rows: list[int], mode: str = TRAINED, *, fresh: bool = True
    ) -> None:
        self.hidden, self.weight, self.rows, self.mode = hidden.detach(), weight.detach(), rows, mode
        self.reference: tuple[Tensor, Tensor] | None = None  # hidden states and head of another model
        if sum(rows) != len(hidden):
            raise ValueError(f"the plan multiplies {sum(rows)} rows, but {len(hidden)} rows predict a token")
        self.kept = None if fresh else self.allocate()

    @classmethod
    def of(cls, problem: Problem, max_logits_bytes: int | None, *, fresh: bool = True) -> Floor:
        """Return the products of a problem; rows that predict nothing are no work."""
        predicting = problem.targets != IGNORE
        rows = product_rows(plan_of(problem, max_logits_bytes))
        made = cls(problem.hidden[predicting], problem.weight, rows, problem.shape.mode, fresh=fresh)
        if problem.shape.work == DPO:
            made.reference = (problem.ref_hidden[predicting], problem.ref_weight)
        return made

    def allocate(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the memory of logits and of the gradients that are wanted."""
        logits = self.hidden.new_empty(max(self.rows), len(self.weight))
        return logits, tuple(torch.empty_like(x) for x in (self.hidden, self.weight)[: PRODUCTS[self.mode] - 1])

    def __call__(self) -> tuple[None, tuple[Tensor, ...]]:
        """Run the products once; like a contestant without a loss."""
        logits, grads = self.kept or self.allocate()
        if self.reference is not None:
            multiply(*self.reference, self.rows, logits, ())
        multiply(self.hidden, self.weight, self.rows, logits, grads)
        return None, grads


def multiply(hidden: Tensor, weight: Tensor, rows: list[int], out: Tensor, grads: tuple[Tensor, ...]) -> None:
    """Run product 1 of (R, H) rows against a (V, H) weight, and 2 and 3 as far as there are gradients to write."""
    start = 0
    for index, count in enumerate(rows):
        some, logits = hidden[start : start + count], out[:count]
        torch.mm(some, weight.T, out=logits)
        if grads:
            torch.mm(logits, weight, out=grads[0][start : start + count])
        if len(grads) > 1 and index == 0:
            torch.mm(logits.T, some, out=grads[1])
        elif len(grads) > 1:
            grads[1].addmm_(logits.T, some)
        start += count
