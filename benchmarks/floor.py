"""The floor: the bare matrix products of one call, with the chunks that our plan would use.

Three for a trained head, two for a frozen one, one without gradients. Everything else the loss does (softmax, contrast,
gather, accumulation) is on top of it. Torch's products are `torch.mm` and `Tensor.addmm_` in the dtype of the inputs,
into fresh outputs in every call as a contestant must; the gradient of the weight is summed over chunks as `addmm_` does
it. Ours are those of the engine. What both could reach at best is the machine's peak (benchmarks.ceilings).
"""

from __future__ import annotations

import torch
from torch import Tensor

import cpo_kernels
from benchmarks.problem import BETA, IGNORE, Problem
from benchmarks.shapes import FROZEN, NO_GRAD, TRAINED
from cpo_kernels.engine.plan import Plan
from cpo_kernels.engine.products import WeightGrad
from cpo_kernels.kernels import registry
from cpo_kernels.kernels.cpu import gemm as cpu_gemm

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


def has_products_of_ours(problem: Problem) -> bool:
    """Return whether our call runs products of its own, and not torch's."""
    dtype = problem.hidden.dtype
    return not problem.hidden.is_cuda and cpu_gemm.gemm_supported(dtype, dtype)


class Floor:
    """Multiplies `rows[i]` rows at a time, for so many gradients (of hidden states, then of the head)."""

    def __init__(self, hidden: Tensor, weight: Tensor, rows: list[int], mode: str = TRAINED, *, ours: bool = False):
        self.hidden, self.weight, self.rows, self.mode = hidden.detach(), weight.detach(), rows, mode
        self.backend = registry.select("auto", hidden.device, hidden.dtype) if ours else None
        if sum(rows) != len(hidden):
            raise ValueError(f"the plan multiplies {sum(rows)} rows, but {len(hidden)} rows predict a token")

    @classmethod
    def of(cls, problem: Problem, max_logits_bytes: int | None, *, ours: bool = False) -> Floor:
        """Return the products of a problem, torch's or ours; rows that predict nothing are no work."""
        predicting = problem.targets != IGNORE
        rows = product_rows(plan_of(problem, max_logits_bytes))
        return cls(problem.hidden[predicting], problem.weight, rows, problem.shape.mode, ours=ours)

    def __call__(self) -> tuple[None, tuple[Tensor, ...]]:
        """Run the products once; like a contestant without a loss."""
        logits, start = self.hidden.new_empty(max(self.rows), len(self.weight)), 0
        gemm_ = torch_gemm_ if self.backend is None else self.backend.gemm_
        of_hidden = torch.empty_like(self.hidden) if self.mode != NO_GRAD else None
        trained, ours = self.mode == TRAINED, self.backend
        of_weight = torch.empty_like(self.weight) if trained and not ours else None
        summed = WeightGrad(ours, self.weight, len(self.rows)) if trained and ours else None
        for index, count in enumerate(self.rows):
            hidden, out = self.hidden[start : start + count], logits[:count]
            gemm_(hidden, self.weight.T, out, False)
            if of_hidden is not None:
                gemm_(out, self.weight, of_hidden[start : start + count], False)
            if summed is not None:
                summed.add(out, hidden)
            elif of_weight is not None:
                gemm_(out.T, hidden, of_weight, index > 0)
            start += count
        of_weight = of_weight if summed is None else summed.result()
        return None, tuple(grad for grad in (of_hidden, of_weight) if grad is not None)


def torch_gemm_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Write or add a @ b to `out` by torch's product."""
    if accumulate:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)
