"""Inputs of one shape and the fp64 oracle that every contestant is held against."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.shapes import Shape

BETA = 0.1
IGNORE = -100
_ROWS_PER_BLOCK = 512  # bounds the oracle's fp64 logits
_SAMPLED_ROWS = 256  # rows of grad_hidden that are compared
_SAMPLED_COLUMNS = 2048  # rows of grad_weight that are compared


@dataclass(frozen=True)
class Problem:
    """Tensors of one shape. `ref_logps` is None for the K = 1 loss without a reference."""

    shape: Shape
    hidden: Tensor  # (G, C, T, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (G, C, T)
    ref_logps: Tensor | None  # (G, C) fp32

    def as_pairs(self) -> Problem:
        """The same tensors read as K = 1 pairs without a reference (Xu et al.'s CPO)."""
        pairs = self.shape.pairs()
        dims = (pairs.groups, pairs.candidates, pairs.tokens)
        hidden = self.hidden.detach().view(*dims, pairs.hidden).requires_grad_()
        return Problem(pairs, hidden, self.weight, self.targets.view(dims), None)


@dataclass(frozen=True)
class Errors:
    """How far a contestant is from the fp64 oracle, each as ||out - ref|| / ||ref||."""

    loss: float
    grad_hidden: float
    grad_weight: float

    def worst(self) -> float:
        """The largest of the three, NaN if one is."""
        errors = (self.loss, self.grad_hidden, self.grad_weight)
        return math.nan if any(map(math.isnan, errors)) else max(errors)


def contrast(logps: Tensor, ref_logps: Tensor | None) -> Tensor:
    """Unranked CPO: mean over groups of -log softmax(beta * (logps - ref))[0]. `logps` is (G, C)."""
    scores = BETA * (logps if ref_logps is None else logps - ref_logps)
    return (torch.logsumexp(scores, dim=-1) - scores[:, 0]).mean()


def draw(shape: Shape, seed: int = 0, device: torch.device | str = "cpu") -> Problem:
    """Random inputs whose logits look like a small language model's: spread 2, NLL of a target about 3 nats.

    With that, a sequence's log-likelihood spreads by about 2 * sqrt(T) nats around -3 T; references spread by 10 more,
    so at beta 0.1 the contrast is not settled and every candidate has a gradient.
    """
    drawn = {"generator": torch.Generator(device).manual_seed(seed), "device": device}
    dims = (shape.groups, shape.candidates, shape.tokens)
    weight = torch.randn(shape.vocab, shape.hidden, **drawn) * (2 / shape.hidden**0.5)
    targets = torch.randint(shape.vocab, dims, **drawn)
    hidden = torch.randn(*dims, shape.hidden, **drawn) + 2.5 * weight[targets]
    targets[..., : shape.prompt_tokens] = IGNORE
    ref = 10 * torch.randn(dims[:2], **drawn) - 3 * (shape.tokens - shape.prompt_tokens)
    return Problem(
        shape, hidden.to(shape.dtype).requires_grad_(), weight.to(shape.dtype).requires_grad_(), targets, ref
    )


@dataclass(frozen=True)
class Dense:
    """One fp64 pass over all logits, a block of rows at a time; no loss in it yet."""

    lse: Tensor  # (N,)
    token_logps: Tensor  # (N,), 0 where there is no target
    columns: Tensor  # vocabulary entries whose logits were kept
    column_logits: Tensor  # (N, len(columns))

    @classmethod
    def of(cls, problem: Problem) -> Dense:
        """Run the pass; the kept columns are half targets, half any."""
        hidden, weight, targets = _flat(problem)
        half = _SAMPLED_COLUMNS // 2
        columns = torch.cat([targets[targets != IGNORE][:half], _some(len(weight), half, 1, targets.device)])
        lse, logps, kept = [], [], []
        for rows, target in zip(hidden.split(_ROWS_PER_BLOCK), targets.split(_ROWS_PER_BLOCK), strict=True):
            logits = rows @ weight.T
            lse.append(torch.logsumexp(logits, dim=-1))
            picked = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            logps.append(torch.where(target == IGNORE, 0.0, picked - lse[-1]))
            kept.append(logits[:, columns])
        return cls(torch.cat(lse), torch.cat(logps), columns, torch.cat(kept))

    def sequence_logps(self, problem: Problem) -> Tensor:
        """(G, C)."""
        return self.token_logps.view(problem.targets.shape).sum(-1)


class Oracle:
    """The loss in fp64 over every token, and its gradients on a sample of rows of `hidden` and of `weight`.

    Sampling costs one fp64 GEMM instead of three; the sample is the same for every contestant.
    """

    def __init__(self, problem: Problem, dense: Dense) -> None:
        hidden, weight, targets = _flat(problem)
        self.problem, self.columns = problem, dense.columns
        logps = dense.sequence_logps(problem).requires_grad_()
        loss = contrast(logps, None if problem.ref_logps is None else problem.ref_logps.double())
        (coef,) = torch.autograd.grad(loss, logps)
        coef = coef.unsqueeze(-1).expand(problem.targets.shape).flatten() * (targets != IGNORE)
        self.loss = loss.item()
        self.grad_weight = _logit_grad(dense.column_logits, dense.lse, targets, coef, self.columns).T @ hidden
        self.rows = _some(len(hidden), _SAMPLED_ROWS, 2, hidden.device)
        some = (hidden[self.rows] @ weight.T, dense.lse[self.rows], targets[self.rows], coef[self.rows])
        self.grad_hidden = _logit_grad(*some, torch.arange(len(weight), device=weight.device)) @ weight

    def errors(self, loss: Tensor, grad_hidden: Tensor, grad_weight: Tensor) -> Errors:
        """Compare one contestant's results; a row that predicts nothing must have a gradient of exactly 0."""
        _check_like("grad_hidden", grad_hidden, self.problem.hidden)
        _check_like("grad_weight", grad_weight, self.problem.weight)
        if grad_hidden[self.problem.targets == IGNORE].any():
            raise ValueError("a row that predicts nothing got a gradient")
        return Errors(
            loss=abs(loss.item() - self.loss) / abs(self.loss),
            grad_hidden=_relative(grad_hidden.flatten(0, 2)[self.rows], self.grad_hidden),
            grad_weight=_relative(grad_weight[self.columns], self.grad_weight),
        )


def _some(size: int, count: int, seed: int, device: torch.device) -> Tensor:
    """At most `count` different indices below `size`, the same ones on every device."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].to(device)


def _check_like(name: str, grad: Tensor, like: Tensor) -> None:
    if grad.shape != like.shape or grad.dtype != like.dtype:
        raise ValueError(f"{name} is {grad.dtype} {tuple(grad.shape)}, expected {like.dtype} {tuple(like.shape)}")


def _relative(out: Tensor, ref: Tensor) -> float:
    return (torch.linalg.vector_norm(out.double() - ref) / torch.linalg.vector_norm(ref)).item()


def _flat(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """(N, H) and (V, H) in fp64, (N,)."""
    hidden = problem.hidden.detach().flatten(0, 2)
    return hidden.double(), problem.weight.detach().double(), problem.targets.flatten()


def _logit_grad(logits: Tensor, lse: Tensor, targets: Tensor, coef: Tensor, columns: Tensor) -> Tensor:
    """d loss / d logits on `columns`: coef * (1[column = target] - softmax)."""
    onehot = columns == targets.unsqueeze(-1)
    return coef.unsqueeze(-1) * (onehot.double() - torch.exp(logits - lse.unsqueeze(-1)))
