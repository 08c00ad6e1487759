"""The floor: the bare matrix products of one call, with the chunks that our plan would use.

Three for a trained head, two for a frozen one, one without gradients. Everything else the loss does (softmax, contrast,
gather, accumulation) is on top of it. The products are `torch.mm` and `Tensor.addmm_` in the dtype of the inputs, into
fresh outputs in every call as a contestant must; the gradient of the weight is summed over chunks as `addmm_` does it.
"""

from __future__ import annotations

import torch
from torch import Tensor

import cpo_kernels
from benchmarks.problem import BETA, IGNORE, Problem
from benchmarks.shapes import FROZEN, NO_GRAD, TRAINED
from cpo_kernels.engine.plan import Plan

PRODUCTS = {TRAINED: 3, FROZEN: 2, NO_GRAD: 1}


def plan_of(problem: Problem, max_logits_bytes: int | None) -> Plan:
    """Return what our call will do with a problem."""
    tensors = (problem.hidden, problem.weight, problem.targets)
    options = {"ref_logps": problem.ref_logps, "beta": BETA, "max_logits_bytes": max_logits_bytes}
    return cpo_kernels.plan(*tensors, **options)


def product_rows(plan: Plan) -> list[int]:
    """Return the rows of each product of one call: a chunk's, a block at a time where a chunk has several."""
    return [
        min(chunk.rows_per_block, chunk.num_rows - start)
        for chunk in plan.chunks
        for start in range(0, chunk.num_rows, chunk.rows_per_block or 1)
    ]


class Floor:
    """Multiplies `rows[i]` rows at a time, for so many gradients (of hidden states, then of the head)."""

    def __init__(self, hidden: Tensor, weight: Tensor, rows: list[int], mode: str = TRAINED) -> None:
        self.hidden, self.weight, self.rows, self.mode = hidden.detach(), weight.detach(), rows, mode
        if sum(rows) != len(hidden):
            raise ValueError(f"the plan multiplies {sum(rows)} rows, but {len(hidden)} rows predict a token")

    @classmethod
    def of(cls, problem: Problem, max_logits_bytes: int | None) -> Floor:
        """Return the products of a problem; rows that predict nothing are no work."""
        predicting = problem.targets != IGNORE
        rows = product_rows(plan_of(problem, max_logits_bytes))
        return cls(problem.hidden[predicting], problem.weight, rows, problem.shape.mode)

    def __call__(self) -> tuple[None, tuple[Tensor, ...]]:
        """Run the products once; like a contestant without a loss."""
        logits = self.hidden.new_empty(max(self.rows), len(self.weight))
        grads = tuple(torch.empty_like(x) for x in (self.hidden, self.weight)[: PRODUCTS[self.mode] - 1])
        start = 0
        for index, count in enumerate(self.rows):
            hidden, out = self.hidden[start : start + count], logits[:count]
            torch.mm(hidden, self.weight.T, out=out)
            if grads:
                torch.mm(out, self.weight, out=grads[0][start : start + count])
            if len(grads) > 1 and index == 0:
                torch.mm(out.T, hidden, out=grads[1])
            elif len(grads) > 1:
                grads[1].addmm_(out.T, hidden)
            start += count
        return None, grads
