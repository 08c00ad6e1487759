"""The fp64 oracle that every contestant is held against."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.problem import IGNORE, Problem
from benchmarks.shapes import DPO, NO_GRAD

_BLOCK = 2048  # entries of the vocabulary at a time: their weights in fp64 stay in memory that is used again
_COMPARED_ROWS = 512  # of two matrices, at a time
_SAMPLED_ROWS = 64  # rows of grad_hidden that are compared
_SAMPLED_COLUMNS = 2048  # rows of grad_weight that are compared


@dataclass(frozen=True)
class Errors:
    """How far a contestant is from the fp64 oracle, each as ||out - ref|| / ||ref||; None for what is not computed.

    `loss` is the error of the (G, C) log-likelihoods where those are all that is computed; `nats` holds the largest and
    the mean error of one of them.
    """

    loss: float
    grad_hidden: float | None = None
    grad_weight: float | None = None
    nats: tuple[float, float] | None = None

    def worst(self) -> float:
        """The largest of the ratios, NaN if one is."""
        errors = [error for error in (self.loss, self.grad_hidden, self.grad_weight) if error is not None]
        return math.nan if any(map(math.isnan, errors)) else max(errors)


@dataclass(frozen=True)
class Dense:
    """What the logits say in fp64, by one pass over all of them in blocks of the vocabulary; no loss in it yet."""

    rows: Tensor  # (P,) positions, of N, that predict a token
    targets: Tensor  # (P,)
    lse: Tensor  # (P,)
    token_logps: Tensor  # (P,)
    columns: Tensor  # vocabulary entries whose logits were kept
    column_logits: Tensor  # (P, len(columns))

    @classmethod
    def of(cls, problem: Problem) -> Dense:
        """Run the pass; the kept columns are half targets, half any."""
        rows = torch.nonzero(problem.targets.flatten() != IGNORE).squeeze(-1)
        hidden, targets = _double(problem.hidden)[rows], problem.targets.flatten()[rows]
        half = _SAMPLED_COLUMNS // 2
        columns = torch.cat([targets[:half], _some(len(problem.weight), half, 1, targets.device)])
        lse, logits_of_targets = hidden.new_full(rows.shape, -math.inf), hidden.new_empty(rows.shape)
        kept = hidden.new_empty(len(rows), len(columns))
        for start, block in blocks(problem.weight):
            logits = hidden @ block.T
            lse = torch.logaddexp(lse, torch.logsumexp(logits, dim=-1))
            here = inside(targets, start, block)
            logits_of_targets[here] = logits[here, targets[here] - start]
            here = inside(columns, start, block)
            kept[:, here] = logits[:, columns[here] - start]
        return cls(rows, targets, lse, logits_of_targets - lse, columns, kept)

    def sequence_logps(self, problem: Problem) -> Tensor:
        """(G, C)."""
        tokens = self.lse.new_zeros(problem.targets.numel())
        tokens[self.rows] = self.token_logps
        return tokens.view(problem.targets.shape).sum(-1)


class Oracle:
    """The loss in fp64 over every token, and its gradients on a sample of rows of `hidden` and of `weight`.

    Sampling costs one fp64 GEMM instead of three; the sample is the same for every contestant.
    """

    def __init__(self, problem: Problem, dense: Dense) -> None:
        self.problem, self.columns = problem, dense.columns
        self.logps = dense.sequence_logps(problem)
        if problem.shape.mode == NO_GRAD:
            return
        logps = self.logps.clone().requires_grad_()
        loss = problem.objective(logps, _exact_reference(problem))
        (coef,) = torch.autograd.grad(loss, logps)
        coef = coef.unsqueeze(-1).expand(problem.targets.shape).flatten()[dense.rows]
        hidden = _double(problem.hidden)[dense.rows]
        self.loss = loss.item()
        of_columns = _logit_grad(dense.column_logits, dense.lse, dense.targets, coef, self.columns)
        self.grad_weight = of_columns.T @ hidden
        some = _some(len(dense.rows), _SAMPLED_ROWS, 2, hidden.device)
        self.rows = dense.rows[some]
        self.grad_hidden = torch.zeros_like(hidden[some])
        for start, block in blocks(problem.weight):
            entries = torch.arange(start, start + len(block), device=hidden.device)
            given = (hidden[some] @ block.T, dense.lse[some], dense.targets[some], coef[some], entries)
            self.grad_hidden += _logit_grad(*given) @ block

    def errors(self, out: Tensor, grads: Sequence[Tensor]) -> Errors:
        """Compare one contestant's results; a row that predicts nothing must have a gradient of exactly 0.

        Args:
            out: the loss; or the log-likelihoods (G, C) where no gradient is wanted.
            grads: those of `problem.wanted`, in order.
        """
        if self.problem.shape.mode == NO_GRAD:
            nats = (out.double() - self.logps).abs()
            return Errors(relative(out, self.logps), nats=(nats.max().item(), nats.mean().item()))
        for name, grad, tensor in zip(("grad_hidden", "grad_weight"), grads, self.problem.wanted, strict=False):
            _check_like(name, grad, tensor)
        grad_hidden, *of_weight = grads
        if len(grads) != len(self.problem.wanted):
            raise ValueError(f"{len(grads)} gradients, expected {len(self.problem.wanted)}")
        if grad_hidden[self.problem.targets == IGNORE].any():
            raise ValueError("a row that predicts nothing got a gradient")
        return Errors(
            loss=abs(out.item() - self.loss) / abs(self.loss),
            grad_hidden=relative(grad_hidden.flatten(0, 2)[self.rows], self.grad_hidden),
            grad_weight=relative(of_weight[0][self.columns], self.grad_weight) if of_weight else None,
        )


def _exact_reference(problem: Problem) -> Tensor | None:
    """Log-likelihoods of the reference in fp64, (G, C); None without one."""
    if problem.shape.work == DPO:
        model = replace(problem, hidden=problem.ref_hidden, weight=problem.ref_weight)
        return Dense.of(model).sequence_logps(problem)
    return None if problem.ref_logps is None else problem.ref_logps.double()


def _double(hidden: Tensor) -> Tensor:
    """(N, H) in fp64."""
    return hidden.detach().flatten(0, 2).double()


def blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and rows in fp64, the memory of the block before; all at once would be the largest tensor of a case."""
    buffer = weight.new_empty(_BLOCK, weight.shape[1], dtype=torch.float64, requires_grad=False)
    for start in range(0, len(weight), _BLOCK):
        rows = weight.detach()[start : start + _BLOCK]
        yield start, buffer[: len(rows)].copy_(rows)


def inside(entries: Tensor, start: int, block: Tensor) -> Tensor:
    """Which vocabulary entries are of the block that starts there."""
    return (entries >= start) & (entries < start + len(block))


def _some(size: int, count: int, seed: int, device: torch.device) -> Tensor:
    """At most `count` different indices below `size`, the same ones on every device."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].to(device)


def _check_like(name: str, grad: Tensor, like: Tensor) -> None:
    if grad.shape != like.shape or grad.dtype != like.dtype:
        raise ValueError(f"{name} is {grad.dtype} {tuple(grad.shape)}, expected {like.dtype} {tuple(like.shape)}")


def relative(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| of two matrices, in fp64 some rows at a time: all of them would be fresh memory."""
    distances, norms = [], []
    for own, right in zip(out.split(_COMPARED_ROWS), ref.split(_COMPARED_ROWS), strict=True):
        distances.append(torch.linalg.vector_norm(own.double() - right.double()))
        norms.append(torch.linalg.vector_norm(right.double()))
    return (torch.linalg.vector_norm(torch.stack(distances)) / torch.linalg.vector_norm(torch.stack(norms))).item()


def _logit_grad(logits: Tensor, lse: Tensor, targets: Tensor, coef: Tensor, columns: Tensor) -> Tensor:
    """d loss / d logits on `columns`: coef * (1[column = target] - softmax)."""
    onehot = columns == targets.unsqueeze(-1)
    return coef.unsqueeze(-1) * (onehot.double() - torch.exp(logits - lse.unsqueeze(-1)))
