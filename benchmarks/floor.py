"""The floor: the bare matrix products of one call, with the chunks that our plan would use.

Three for a trained head, two for a frozen one, one without gradients, and one more where a reference model's
log-likelihoods are to be had from its hidden states. Everything else the loss does (softmax, contrast, gather,
accumulation) is on top of it. The products are `torch.mm` and `Tensor.addmm_` in the dtype of the inputs; the gradient
of the weight is summed over chunks as `addmm_` does it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import cpo_kernels
from benchmarks.problem import BETA, IGNORE, Problem
from benchmarks.shapes import DPO, FROZEN, NO_GRAD, TRAINED, Shape
from cpo_kernels.engine.plan import Plan

PRODUCTS = {TRAINED: 3, FROZEN: 2, NO_GRAD: 1}


def products(shape: Shape) -> int:
    """Products of (R, V, H) that the work cannot do without."""
    return PRODUCTS[shape.mode] + (shape.work == DPO)


@dataclass(frozen=True)
class Outputs:
    """What the products are written to; None for a product that is not wanted."""

    logits: Tensor  # (rows of a product, V)
    grad_hidden: Tensor | None  # (R, H)
    grad_weight: Tensor | None  # (V, H)

    @property
    def grads(self) -> tuple[Tensor, ...]:
        """The gradients there are."""
        return tuple(grad for grad in (self.grad_hidden, self.grad_weight) if grad is not None)


def plan_of(problem: Problem, max_logits_bytes: int | None) -> Plan:
    """What our call will do with `problem`."""
    return cpo_kernels.plan(
        problem.hidden,
        problem.weight,
        problem.targets,
        ref_logps=problem.ref_logps,
        beta=BETA,
        max_logits_bytes=max_logits_bytes,
    )


def product_rows(plan: Plan) -> list[int]:
    """Rows of each product of one call: those of the plan's chunks, a block at a time where a chunk has several."""
    rows = []
    for chunk in plan.chunks:
        left = chunk.num_rows
        while left:
            rows.append(min(left, chunk.rows_per_block))
            left -= rows[-1]
    return rows


def allocate(hidden: Tensor, weight: Tensor, rows: list[int], mode: str = TRAINED) -> Outputs:
    """Fresh memory, as any call that returns new gradients needs it."""
    return Outputs(
        hidden.new_empty(max(rows), len(weight)),
        torch.empty_like(hidden) if mode != NO_GRAD else None,
        torch.empty_like(weight) if mode == TRAINED else None,
    )


def gemms(hidden: Tensor, weight: Tensor, rows: list[int], out: Outputs) -> None:
    """GEMM 1 of (R, H) rows against a (V, H) weight, and 2 and 3 where wanted, `rows[i]` rows at a time."""
    start = 0
    for index, count in enumerate(rows):
        some, logits = hidden[start : start + count], out.logits[:count]
        torch.mm(some, weight.T, out=logits)
        if out.grad_hidden is not None:
            torch.mm(logits, weight, out=out.grad_hidden[start : start + count])
        if out.grad_weight is not None and index == 0:
            torch.mm(logits.T, some, out=out.grad_weight)
        elif out.grad_weight is not None:
            out.grad_weight.addmm_(logits.T, some)
        start += count


class Floor:
    """The products of one problem. `fresh`: allocate the outputs in every call, as every contestant must."""

    def __init__(self, problem: Problem, max_logits_bytes: int | None, *, fresh: bool) -> None:
        self.rows = product_rows(plan_of(problem, max_logits_bytes))
        predicting = problem.targets != IGNORE  # the other rows are no work
        self.hidden, self.weight = problem.hidden.detach()[predicting], problem.weight.detach()
        self.mode, self.reference = problem.shape.mode, None
        if problem.shape.work == DPO:
            self.reference = (problem.ref_hidden[predicting], problem.ref_weight)
        if sum(self.rows) != len(self.hidden):
            raise ValueError(f"the plan multiplies {sum(self.rows)} rows, but {len(self.hidden)} rows predict a token")
        self.kept = None if fresh else self.allocate()

    def allocate(self) -> Outputs:
        """What one call writes to."""
        return allocate(self.hidden, self.weight, self.rows, self.mode)

    def __call__(self) -> tuple[None, tuple[Tensor, ...]]:
        """Run the products once; like a contestant without a loss."""
        out = self.kept or self.allocate()
        if self.reference is not None:
            gemms(*self.reference, self.rows, Outputs(out.logits, None, None))
        gemms(self.hidden, self.weight, self.rows, out)
        return None, out.grads
