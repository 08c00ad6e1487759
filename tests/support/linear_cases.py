"""Cases of the fused linear path for Hopper: arguments, what plain torch makes of them, and the rule of tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from row_kernels import PLAIN
from tolerance import assert_accurate
from torch import Tensor

from cpo_kernels.kernels import plain
from cpo_kernels.kernels.cuda.hopper import Kept, linear_backward_, linear_forward, new_kept


@dataclass
class Case:
    """Arguments of a call, with logits of a standard deviation of about 3."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    row_starts: Tensor | None = None
    head: tuple[Tensor | None, float, float, float] = field(default=PLAIN)

    def run(self, kept: Kept | None = None) -> tuple[Tensor, Tensor]:
        return linear_forward(self.hidden, self.weight, self.targets, self.row_starts, *self.head, kept)

    def gradient(self, coef: Tensor) -> Tensor:
        """Compute the gradient (R, V) from log-probabilities and statistics that keep what it needs."""
        kept = new_kept(self.hidden, self.weight, self.targets)
        stats, logps = self.run(kept)
        return linear_backward_(kept, self.targets, self.row_starts, stats, logps, coef, *self.head[1:])

    def expected_gradient(self, dtype: torch.dtype, coef: Tensor) -> Tensor:
        bias, *numbers = self.head
        logits, (stats, _) = self.hidden.to(dtype) @ self.weight.to(dtype).T, self.expected(dtype)
        bias = None if bias is None else bias.to(dtype)
        return plain.row_backward(logits, self.targets, self.row_starts, stats, coef.to(dtype), bias, *numbers)

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Compute statistics and log-probabilities from logits of ``dtype``."""
        bias, *numbers = self.head
        logits = self.hidden.to(dtype) @ self.weight.to(dtype).T
        bias = None if bias is None else bias.to(dtype)
        return plain.row_forward(logits, self.targets, self.row_starts, bias, *numbers)


def aligned(matrix: Tensor) -> Tensor:
    """Copy numbers to rows at multiples of 16 bytes, with NaN between the rows."""
    rows, columns = matrix.shape
    wide = torch.full((rows, columns // 8 * 8 + 16), math.nan, dtype=matrix.dtype)
    return wide[:, :columns].copy_(matrix)


def case(dtype=torch.bfloat16, R=5, V=101, H=72, counts: list[int] | None = None, head=PLAIN) -> Case:
    """Make a case in which row r has ``counts[r]`` tokens, of which every fourth is absent.

    None means one token a row, of which the second is absent.
    """
    targets = torch.randint(0, V, (R if counts is None else sum(counts),))
    row_starts = None
    if counts is None:
        targets[1:2] = -100
    else:
        R = len(counts)
        row_starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
        targets[3::4] = -100
    hidden, weight = torch.randn(R, H).to(dtype), (torch.randn(V, H) * (3 / H**0.5)).to(dtype)
    return Case(aligned(hidden), aligned(weight), targets, row_starts, head)


def check(c: Case, kept: Kept | None = None) -> tuple[Tensor, Tensor]:
    """Check results by the rule of tolerance; eager is plain torch with logits in float32."""
    stats, logps = c.run(kept)
    eager_stats, eager_logps = c.expected(torch.float32)
    oracle_stats, oracle_logps = c.expected(torch.float64)
    present = torch.unique(plain.token_rows(c.targets, c.row_starts)[c.targets != -100])
    for part, name in ((lambda stats: stats[0], "max"), (lambda stats: stats.sum(0), "log-sum-exp")):
        assert_accurate(*(part(s[:, present]) for s in (stats, eager_stats, oracle_stats)), name)
    assert_accurate(logps, eager_logps, oracle_logps, "logps")
    assert (logps[c.targets == -100] == 0).all()
    return stats, logps


def coefs(c: Case) -> Tensor:
    """Draw coefs of the tokens; NaN where there is none."""
    return torch.where(c.targets == -100, math.nan, torch.randn(c.targets.shape))


def check_gradient(c: Case, coef: Tensor | None = None) -> Tensor:
    """Check forward and gradient by the rule of tolerance; eager is plain torch in float32, rounded once."""
    coef = coefs(c) if coef is None else coef
    check(c, new_kept(c.hidden, c.weight, c.targets))
    grad = c.gradient(coef)
    eager, oracle = (c.expected_gradient(dtype, coef) for dtype in (torch.float32, torch.float64))
    assert_accurate(grad, eager.to(grad.dtype), oracle, "gradient")
    return grad
