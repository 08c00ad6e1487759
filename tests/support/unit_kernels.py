"""The unit-gradient kernels of a backend, and rows of tokens to try them on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from row_kernels import PLAIN, Tokens
from tolerance import assert_accurate
from torch import Tensor

from cpo_kernels.kernels import numerics
from cpo_kernels.kernels.transform import transform_logits

# Target and coef of each token of each row; NaN is what a coef without a token may be.
NAN = float("nan")
ONE_TOKEN = [[(1, 0.7)], [(-100, NAN)], [(-1, -1.3)], [(3, 0.0)], [(0, 2.0)]]
SHARED_ROWS = [
    [(5, 0.7)],
    [(5, 0.1), (5, -0.7), (-100, NAN), (5, 0.3)],
    [],
    [(-100, NAN), (-100, NAN)],
    [(1, 0.5), (6, -0.25)],
    [(-100, NAN), (-1, 1.5)],
    [(2, 0.3), (3, 0.0), (2, -0.9)],
    [(4, 0.0), (4, 0.0)],
    [(4, -0.0), (7, 0.0)],
    [(3, 1.0), (3, -1.0)],
    [(3, 1.0), (4, -1.0)],
    [(n % 2, 0.1 * n) for n in range(40)],
    [(9, 0.1 * n) for n in range(40)],
]


def tokens_of(rows, V) -> Tokens:
    """Make the tokens of rows; targets count modulo V."""
    targets, coef = ([token[part] for row in rows for token in row] for part in (0, 1))
    starts = [sum(map(len, rows[:n])) for n in range(len(rows) + 1)]
    targets = torch.tensor([target if target == -100 else target % V for target in targets])
    return Tokens(targets, torch.tensor(starts), torch.tensor(coef))


def some_tokens(V, shared) -> Tokens:
    return tokens_of(SHARED_ROWS, V) if shared else tokens_of(ONE_TOKEN, V)._replace(row_starts=None)


def by_row(tokens):
    """Targets and coefs of the tokens that count, row by row."""
    starts = range(len(tokens.targets) + 1) if tokens.row_starts is None else tokens.row_starts.tolist()
    for begin, end in itertools.pairwise(starts):
        there = tokens.targets[begin:end] != -100
        yield tokens.targets[begin:end][there], tokens.coef[begin:end][there]


def plain_torch(logits, tokens, head):
    """Log-sum-exp (R,), log-probabilities (N,), unit gradients (R, V) of one target, whole gradient (R, V)."""
    raw = logits.clone().requires_grad_()
    bias, *numbers = head
    y = transform_logits(raw, None if bias is None else bias.to(raw.dtype), *numbers)
    logps, units, losses = [], [], []
    for row, (targets, coef) in zip(y.log_softmax(-1), by_row(tokens), strict=True):
        logps.append(row[targets])
        units.append(row[targets[:1]].sum() if len(targets.unique()) == 1 else 0 * row[0])
        losses.append((logps[-1] * coef).sum())
    unit, whole = (torch.autograd.grad(sum(terms), raw, retain_graph=True)[0] for terms in (units, losses))
    found = torch.zeros(len(tokens.targets), dtype=raw.dtype)
    found[tokens.targets != -100] = torch.cat(logps).detach()
    return y.detach().logsumexp(-1), found, unit, whole


@dataclass(frozen=True)
class UnitKernels:
    """The launchers of a backend.

    Attributes:
        module: has ``unit_forward_`` and ``unit_finish_``.
        rows: has ``row_forward`` and ``row_backward_``.
        options: of every launch, with which rows of some thousand words cross several blocks.
        of_forward: of the forward alone.
        in_order: whether coefs are added in the order of the tokens.
    """

    module: Any
    rows: Any
    options: dict[str, Any]
    of_forward: dict[str, Any]
    in_order: bool

    def forward_(self, logits: Tensor, tokens: Tokens, head=PLAIN, grad_dtype=None, **options: Any) -> Any:
        options = self.options | self.of_forward | options
        return self.module.unit_forward_(logits, *tokens[:2], *head, grad_dtype, **options)

    def finish_(self, logits: Tensor, tokens: Tokens, stats: Tensor, head=PLAIN, grad_dtype=None) -> Tensor:
        given = (*tokens[:2], stats, tokens.coef, *head, grad_dtype)
        return self.module.unit_finish_(logits, *given, **self.options)

    def check(self, logits, tokens, head=PLAIN, grad_dtype=None, **options):
        """Check against plain PyTorch in float64, by the rule of tolerance; what is to stay, to the last bit."""
        before, dtype = logits.clone(), grad_dtype or logits.dtype
        lse, logps, unit, whole = zip(
            plain_torch(before.float(), tokens, head), plain_torch(before.double(), tokens, head), strict=True
        )
        rows = list(by_row(tokens))
        numbers = torch.tensor([len(targets.unique()) for targets, _ in rows])
        active = torch.tensor([bool(coef.any()) for _, coef in rows])

        out_stats, out_logps = self.forward_(logits, tokens, head, grad_dtype, **options)
        grad = numerics.narrow_view(logits, dtype)
        assert (out_stats[:, numbers == 0] == 0).all() and (grad[numbers == 0] == 0).all()
        assert_accurate(out_stats.sum(0)[numbers > 0], *(each[numbers > 0] for each in lse), "log-sum-exp")
        assert_accurate(out_logps, *logps, "logps")
        eager, oracle = (each[numbers == 1] for each in unit)
        assert_accurate(grad[numbers == 1], eager.to(dtype), oracle, "unit gradient")
        assert torch.equal(logits[numbers > 1], before[numbers > 1])

        held = grad[numbers == 1]
        held[~active[numbers == 1]] = 0
        scale = self.finish_(logits, tokens, out_stats, head, grad_dtype)
        assert torch.equal(grad[numbers == 1], held)
        assert (grad[~active] == 0).all()
        in_order = torch.stack([sum(coef, torch.zeros(())) for _, coef in rows])
        expected = torch.where(numbers > 1, active.float(), in_order)
        off = 0 if self.in_order else 1e-6
        torch.testing.assert_close(scale, expected, rtol=off, atol=off)
        apart = before.clone()
        self.rows.row_backward_(apart, *tokens[:2], out_stats, tokens.coef, *head, grad_dtype, **self.options)
        several = numerics.narrow_view(apart, dtype)[numbers > 1]
        assert torch.equal(grad[numbers > 1], several)
        assert_accurate((grad * scale[:, None]).to(dtype), whole[0].to(dtype), whole[1], "gradient")


def cuda_unit(slice_bytes: int = 0) -> UnitKernels:
    """Return CUDA's launchers, for blocks of one warp."""
    module = import_module("cpo_kernels.kernels.cuda.rows")
    return UnitKernels(module, module, {"threads": 32}, {"slice_bytes": slice_bytes}, in_order=True)


def triton_unit() -> UnitKernels:
    """Return Triton's launchers, with fewer programs than rows."""
    module = import_module("cpo_kernels.kernels.triton.unit")
    small = {"config": {"BLOCK": 64, "TOKENS": 4, "num_warps": 1, "num_stages": 1}}
    rows = import_module("cpo_kernels.kernels.triton.rows")
    return UnitKernels(module, rows, small, {"programs": 3}, in_order=False)
