"""Holds contestants against the loss in float64 over every token, and its gradients on a sample of rows.

Sampling costs one float64 product instead of three; the sample is the same for every contestant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor

from benchmarks.measure import AnotherLossError
from benchmarks.problem import IGNORE, Problem
from benchmarks.shapes import NO_GRAD

BLOCK = 2048  # entries of the vocabulary at a time: their weights in fp64 stay in memory that is used again
SAMPLED_ROWS = 64  # rows of grad_hidden that are compared
SAMPLED_COLUMNS = 2048  # rows of grad_weight that are compared
# Beyond this a contestant computes another loss; its rounding errors, which are printed, are half of it at most.
SAME_LOSS = {torch.float32: 1e-3, torch.bfloat16: 3e-2}

Errors = dict[str, float]  # by the names of records' values


class Dense:
    """Holds what the logits say in float64, by one pass over all of them in blocks of the vocabulary."""

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None = None) -> None:
        """Run the pass over rows (R, H) and a head (V, H), for targets (N,) and the row (N,) of each, or one a row."""
        self.hidden, self.weight, self.targets = hidden.detach().double(), weight.detach(), targets
        self.rows = torch.arange(len(targets), device=targets.device) if rows is None else rows
        half = SAMPLED_COLUMNS // 2  # half of the columns are targets, half are any
        self.columns = torch.cat([targets[:half], some(len(weight), half, 1, targets.device)])
        self.lse = self.hidden.new_full(self.hidden.shape[:1], -math.inf)
        self.column_logits = self.hidden.new_empty(len(self.hidden), len(self.columns))
        logits_of_targets = self.hidden.new_empty(targets.shape)
        for start, block in self.blocks():
            logits = self.hidden @ block.T
            self.lse = torch.logaddexp(self.lse, torch.logsumexp(logits, dim=-1))
            here = inside(targets, start, block)
            logits_of_targets[here] = logits[self.rows[here], targets[here] - start]
            here = inside(self.columns, start, block)
            self.column_logits[:, here] = logits[:, self.columns[here] - start]
        self.token_logps = logits_of_targets - self.lse[self.rows]

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield first row and rows of the head in float64, in the memory of the block before."""
        buffer = self.weight.new_empty(BLOCK, self.weight.shape[1], dtype=torch.float64)
        for start in range(0, len(self.weight), BLOCK):
            rows = self.weight[start : start + BLOCK]
            yield start, buffer[: len(rows)].copy_(rows)


class Oracle:
    """Has a loss of token log-probabilities (N,) in float64, and its gradients on a sample."""

    def __init__(self, dense: Dense, objective: Callable[[Tensor], Tensor]) -> None:
        logps = dense.token_logps.clone().requires_grad_()
        loss = objective(logps)
        (coef,) = torch.autograd.grad(loss, logps)
        self.loss, self.columns = loss.item(), dense.columns
        total = torch.zeros_like(dense.lse).index_add_(0, dense.rows, coef)
        of_columns = -total[:, None] * torch.exp(dense.column_logits - dense.lse[:, None])
        hits = (dense.targets[:, None] == dense.columns).double()
        self.grad_weight = of_columns.index_add_(0, dense.rows, coef[:, None] * hits).T @ dense.hidden
        self.rows = some(len(dense.hidden), SAMPLED_ROWS, 2, coef.device)
        place = torch.full_like(dense.lse, -1, dtype=torch.int64)
        place[self.rows] = torch.arange(len(self.rows), device=coef.device)
        place, hidden = place[dense.rows], dense.hidden[self.rows]
        self.grad_hidden = torch.zeros_like(hidden)
        for start, block in dense.blocks():
            dlogits = -total[self.rows, None] * torch.exp(hidden @ block.T - dense.lse[self.rows, None])
            here = inside(dense.targets, start, block) & (place >= 0)
            dlogits.index_put_((place[here], dense.targets[here] - start), coef[here], accumulate=True)
            self.grad_hidden += dlogits @ block

    def errors(self, loss: float, grad_hidden: Tensor, grad_weight: Tensor | None) -> Errors:
        """Compare a loss and gradients (R, H) and (V, H), None where the head is frozen."""
        found = {"error_loss": abs(loss - self.loss) / abs(self.loss)}
        found["error_grad_hidden"] = relative(grad_hidden[self.rows], self.grad_hidden)
        if grad_weight is not None:
            found["error_grad_weight"] = relative(grad_weight[self.columns], self.grad_weight)
        return found


class Oracles:
    """Holds results on a problem against the oracle of the work they do; the logits are computed once."""

    def __init__(self, problem: Problem) -> None:
        rows = problem.targets.flatten() != IGNORE
        predicting = problem.hidden.flatten(0, 2)[rows], problem.weight, problem.targets.flatten()[rows]
        self.problem, self.dense = problem, Dense(*predicting)
        self.of = cache(self._of)

    def _of(self, work: str) -> Oracle:
        """Return the oracle of some work on these tensors."""
        problem = self.problem.as_work(work)
        reference = None if problem.ref_logps is None else problem.ref_logps.double()
        return Oracle(self.dense, lambda logps: problem.objective(sequence_sums(problem, logps), reference))

    def check(self, work: str, result: tuple[Tensor, tuple[Tensor, ...]]) -> Errors:
        """Return the errors of a result; raise AnotherLossError where rounding does not explain them."""
        problem, (out, grads) = self.problem.as_work(work), result
        if problem.shape.mode == NO_GRAD:
            exact = sequence_sums(problem, self.dense.token_logps)
            nats = (out.double() - exact).abs()
            errors = {"error_loss": relative(out, exact), "nats_largest": nats.max().item()}
            errors["nats_mean"] = nats.mean().item()
        else:
            check_gradients(problem, grads)
            predicting = problem.targets.flatten() != IGNORE
            grad_hidden, *of_weight = grads
            rows = grad_hidden.flatten(0, 2)[predicting]
            errors = self.of(work).errors(out.item(), rows, of_weight[0] if of_weight else None)
        require_same(errors, problem.shape.dtype)
        return errors


def require_same(errors: Mapping[str, float], dtype: torch.dtype) -> None:
    """Raise :class:`AnotherLossError` where a relative error is more than rounding in a dtype explains."""
    bounded = [error for name, error in errors.items() if name.startswith("error_")]
    if not all(error <= SAME_LOSS[dtype] for error in bounded):  # not `>`: NaN is another loss too
        raise AnotherLossError(f"computes another loss: {errors}, expected at most {SAME_LOSS[dtype]}")


def check_gradients(problem: Problem, grads: tuple[Tensor, ...]) -> None:
    """Raise :class:`AnotherLossError` for gradients of another form, or of a row that predicts nothing."""
    if [(g.shape, g.dtype) for g in grads] != [(t.shape, t.dtype) for t in problem.wanted]:
        raise AnotherLossError(
            f"{len(grads)} gradients of other shapes or dtypes than the {len(problem.wanted)} wanted"
        )
    if grads[0][problem.targets == IGNORE].any():
        raise AnotherLossError("a row that predicts nothing got a gradient")


def sequence_sums(problem: Problem, token_logps: Tensor) -> Tensor:
    """Add up the log-probabilities of predicted tokens to log-likelihoods (G, C)."""
    there = problem.targets != IGNORE
    return token_logps.new_zeros(there.shape).masked_scatter(there, token_logps).sum(-1)


def inside(entries: Tensor, start: int, block: Tensor) -> Tensor:
    """Return which vocabulary entries are of the block that starts there."""
    return (entries >= start) & (entries < start + len(block))


def some(size: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Return at most `count` different indices below `size`, the same ones on every device."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].to(device)


def relative(out: Tensor, ref: Tensor) -> float:
    """Return ||out - ref|| / ||ref|| of two tensors in float64."""
    out, ref = out.double(), ref.double()
    return ((out - ref).norm() / ref.norm()).item()
