"""Inputs of one shape and the fp64 oracle that every contestant is held against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import CPO, DPO, NLL, NO_GRAD, PAIRS, TRAINED, Shape

BETA = 0.1
IGNORE = -100
_ROWS_PER_BLOCK = 512  # bounds the oracle's fp64 logits
_DRAWN_ROWS = 4096  # rows of a weight that are drawn number by number
_SAMPLED_ROWS = 64  # rows of grad_hidden that are compared
_SAMPLED_COLUMNS = 2048  # rows of grad_weight that are compared


@dataclass(frozen=True)
class Problem:
    """Tensors of one shape, and the work that is done on them: `shape.work`."""

    shape: Shape
    hidden: Tensor  # (G, C, T, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (G, C, T)
    ref_logps: Tensor | None = None  # (G, C) fp32, for "cpo"
    ref_hidden: Tensor | None = None  # (G, C, T, H) and ...
    ref_weight: Tensor | None = None  # ... (V, H) of a reference model, for "dpo"

    @property
    def reference(self) -> tuple[Tensor | None, ...]:
        """What the loss takes of a reference, after hidden states, head and targets."""
        if self.shape.work == NLL:
            return ()
        return (self.ref_hidden, self.ref_weight) if self.shape.work == DPO else (self.ref_logps,)

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """The tensors whose gradients are taken."""
        return tuple(tensor for tensor in (self.hidden, self.weight) if tensor.requires_grad)

    def as_work(self, work: str) -> Problem:
        """The same tensors for other work; that of one negative reads the candidates of each group two by two."""
        return self if work == self.shape.work else {PAIRS: self.as_pairs, DPO: self.as_dpo}[work]()

    def as_pairs(self) -> Problem:
        """K = 1 without a reference (Xu et al.'s CPO)."""
        pairs = self.shape.pairs()
        dims = (pairs.groups, pairs.candidates, pairs.tokens)
        hidden = self.hidden.detach().view(*dims, pairs.hidden).requires_grad_(self.hidden.requires_grad)
        return Problem(pairs, hidden, self.weight, self.targets.view(dims))

    def as_dpo(self) -> Problem:
        """K = 1 with hidden states and head of a reference model, which differ from the policy's."""
        pairs = self.as_pairs()
        hidden, drawn = pairs.hidden.detach(), torch.Generator(self.hidden.device).manual_seed(1)
        noise = torch.randn(hidden.shape, generator=drawn, device=hidden.device, dtype=hidden.dtype)
        reference = {"ref_hidden": hidden + 0.5 * noise, "ref_weight": 0.9 * self.weight.detach()}
        return replace(pairs, shape=replace(pairs.shape, work=DPO), **reference)

    def objective(self, logps: Tensor, ref_logps: Tensor | None) -> Tensor:
        """The loss of this work from (G, C) sequence log-likelihoods of policy and reference."""
        if self.shape.work == NLL:
            return -logps.sum() / (self.targets != IGNORE).sum()
        return contrast(logps, ref_logps)


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
    weight = random_rows(shape.vocab, shape.hidden, shape.dtype, drawn).mul_(2 / shape.hidden**0.5)
    targets = torch.randint(shape.vocab, dims, **drawn)
    hidden = torch.randn(*dims, shape.hidden, **drawn) + 2.5 * weight[targets].float()
    targets[..., : shape.prompt_tokens] = IGNORE
    ref = 10 * torch.randn(dims[:2], **drawn) - 3 * (shape.tokens - shape.prompt_tokens)
    hidden = hidden.to(shape.dtype).requires_grad_(shape.mode != NO_GRAD)
    weight.requires_grad_(shape.mode == TRAINED)
    return Problem(shape, hidden, weight, targets, ref if shape.work == CPO else None)


def random_rows(count: int, width: int, dtype: torch.dtype, drawn: dict[str, Any]) -> Tensor:
    """(count, width) normal numbers; all rows differ, but beyond 4,096 each is the sum of two of those.

    Drawing every number takes most of the time of the largest heads: a host's generator runs on one thread.
    """
    if count <= _DRAWN_ROWS:
        return torch.randn(count, width, dtype=dtype, **drawn)
    some = torch.randn(_DRAWN_ROWS, width, dtype=dtype, **drawn)
    index = torch.arange(count, device=some.device)
    first = index % _DRAWN_ROWS
    return some[first].add_(some[(first + 1 + index // _DRAWN_ROWS) % _DRAWN_ROWS]).mul_(0.5**0.5)


@dataclass(frozen=True)
class Dense:
    """One fp64 pass over all logits, a block of rows at a time; no loss in it yet."""

    lse: Tensor  # (N,)
    token_logps: Tensor  # (N,), 0 where there is no target
    columns: Tensor  # vocabulary entries whose logits were kept
    column_logits: Tensor  # (N, len(columns))
    weight: Tensor  # (V, H)

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
        return cls(torch.cat(lse), torch.cat(logps), columns, torch.cat(kept), weight)

    def sequence_logps(self, problem: Problem) -> Tensor:
        """(G, C)."""
        return self.token_logps.view(problem.targets.shape).sum(-1)


class Oracle:
    """The loss in fp64 over every token, and its gradients on a sample of rows of `hidden` and of `weight`.

    Sampling costs one fp64 GEMM instead of three; the sample is the same for every contestant.
    """

    def __init__(self, problem: Problem, dense: Dense) -> None:
        hidden, targets = problem.hidden.detach().flatten(0, 2).double(), problem.targets.flatten()
        self.problem, self.columns = problem, dense.columns
        self.logps = dense.sequence_logps(problem)
        if problem.shape.mode == NO_GRAD:
            return
        logps = self.logps.clone().requires_grad_()
        loss = problem.objective(logps, _exact_reference(problem))
        (coef,) = torch.autograd.grad(loss, logps)
        coef = coef.unsqueeze(-1).expand(problem.targets.shape).flatten() * (targets != IGNORE)
        self.loss = loss.item()
        self.grad_weight = _logit_grad(dense.column_logits, dense.lse, targets, coef, self.columns).T @ hidden
        predicting = torch.nonzero(targets != IGNORE).squeeze(-1)
        self.rows = predicting[_some(len(predicting), _SAMPLED_ROWS, 2, hidden.device)]
        some = (hidden[self.rows] @ dense.weight.T, dense.lse[self.rows], targets[self.rows], coef[self.rows])
        every = torch.arange(len(dense.weight), device=hidden.device)
        self.grad_hidden = _logit_grad(*some, every) @ dense.weight

    def errors(self, out: Tensor, grads: Sequence[Tensor]) -> Errors:
        """Compare one contestant's results; a row that predicts nothing must have a gradient of exactly 0.

        Args:
            out: the loss; or the log-likelihoods (G, C) where no gradient is wanted.
            grads: those of `problem.wanted`, in order.
        """
        if self.problem.shape.mode == NO_GRAD:
            nats = (out.double() - self.logps).abs()
            return Errors(_relative(out, self.logps), nats=(nats.max().item(), nats.mean().item()))
        for name, grad, tensor in zip(("grad_hidden", "grad_weight"), grads, self.problem.wanted, strict=False):
            _check_like(name, grad, tensor)
        grad_hidden, *of_weight = grads
        if len(grads) != len(self.problem.wanted):
            raise ValueError(f"{len(grads)} gradients, expected {len(self.problem.wanted)}")
        if grad_hidden[self.problem.targets == IGNORE].any():
            raise ValueError("a row that predicts nothing got a gradient")
        return Errors(
            loss=abs(out.item() - self.loss) / abs(self.loss),
            grad_hidden=_relative(grad_hidden.flatten(0, 2)[self.rows], self.grad_hidden),
            grad_weight=_relative(of_weight[0][self.columns], self.grad_weight) if of_weight else None,
        )


def _exact_reference(problem: Problem) -> Tensor | None:
    """Log-likelihoods of the reference in fp64, (G, C); None without one."""
    if problem.shape.work == DPO:
        model = replace(problem, hidden=problem.ref_hidden, weight=problem.ref_weight)
        return Dense.of(model).sequence_logps(problem)
    return None if problem.ref_logps is None else problem.ref_logps.double()


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
