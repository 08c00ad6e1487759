"""The floor: the three bare matrix products of one call, with the chunks that our plan would use.

Everything else the loss does (softmax, contrast, gather, accumulation) is on top of it. The products are `torch.mm`
and `Tensor.addmm_` in the dtype of the inputs; the gradient of the weight is summed over chunks as `addmm_` does it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import cpo_kernels
from benchmarks.problem import BETA, IGNORE, Problem
from cpo_kernels.planning import Plan


@dataclass(frozen=True)
class Outputs:
    """What the products are written to."""

    logits: Tensor  # (rows of a product, V)
    grad_hidden: Tensor  # (R, H)
    grad_weight: Tensor  # (V, H)


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


def allocate(hidden: Tensor, weight: Tensor, rows: list[int]) -> Outputs:
    """Fresh memory, as any call that returns new gradients needs it."""
    return Outputs(hidden.new_empty(max(rows), len(weight)), torch.empty_like(hidden), torch.empty_like(weight))


def three_gemms(hidden: Tensor, weight: Tensor, rows: list[int], out: Outputs) -> None:
    """GEMMs 1, 2 and 3 of (R, H) rows against a (V, H) weight, `rows[i]` rows at a time."""
    start = 0
    for index, count in enumerate(rows):
        some, logits = hidden[start : start + count], out.logits[:count]
        torch.mm(some, weight.T, out=logits)
        torch.mm(logits, weight, out=out.grad_hidden[start : start + count])
        if index == 0:
            torch.mm(logits.T, some, out=out.grad_weight)
        else:
            out.grad_weight.addmm_(logits.T, some)
        start += count


class Floor:
    """The products of one problem. `fresh`: allocate the outputs in every call, as every contestant must."""

    def __init__(self, problem: Problem, max_logits_bytes: int | None, *, fresh: bool) -> None:
        self.rows = product_rows(plan_of(problem, max_logits_bytes))
        self.hidden = problem.hidden.detach()[problem.targets != IGNORE]  # rows that predict nothing are no work
        self.weight = problem.weight.detach()
        if sum(self.rows) != len(self.hidden):
            raise ValueError(f"the plan multiplies {sum(self.rows)} rows, but {len(self.hidden)} rows predict a token")
        self.kept = None if fresh else allocate(self.hidden, self.weight, self.rows)

    def __call__(self) -> tuple[None, tuple[Tensor, Tensor]]:
        """Run the products once; like a contestant without a loss."""
        out = self.kept or allocate(self.hidden, self.weight, self.rows)
        three_gemms(self.hidden, self.weight, self.rows, out)
        return None, (out.grad_hidden, out.grad_weight)
