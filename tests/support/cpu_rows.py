"""Rows, tokens and heads for the tests of the compiled row kernels, and the instruction sets to run them on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cpo_kernels.kernels.cpu import extension as cpu_extension
from cpo_kernels.kernels.cpu import rows as cpu_rows

BUILD = cpu_extension.build_info()
assert BUILD is not None, cpu_extension.unavailable_reason()


def _only_where_it_runs(isa: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(isa not in BUILD.supported_isas, reason=f"this machine does not run {isa}")


ISAS = [pytest.param(isa, marks=_only_where_it_runs(isa)) for isa in BUILD.compiled_isas]

NO_PRODUCT = ["scalar", "neon"]  # instruction sets without a matrix product of ours
PRODUCT_ISAS = [pytest.param(i, marks=_only_where_it_runs(i)) for i in BUILD.compiled_isas if i not in NO_PRODUCT]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCK = 4096  # columns that the forward sums at a time


@dataclass
class Head:
    """What comes between a raw logit and the softmax."""

    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0

    def args(self):
        return self.bias, self.logit_scale, self.softcap, self.temperature

    def transform(self, x):
        """Apply the transform by the definition of the operators, in the dtype of x."""
        y = x if self.bias is None else x + self.bias.to(x.dtype)
        y = y * self.logit_scale
        if self.softcap:
            y = self.softcap * torch.tanh(y / self.softcap)
        return y / self.temperature


HEADS = {
    "plain": lambda V: Head(),
    "scaled": lambda V: Head(logit_scale=1.7, temperature=0.6),
    "negative scale": lambda V: Head(logit_scale=-0.8),  # the largest y is at the smallest x
    "zero scale": lambda V: Head(logit_scale=0.0),
    "bias": lambda V: Head(bias=torch.randn(V)),
    "softcap": lambda V: Head(softcap=3.0),
    "all": lambda V: Head(torch.randn(V).bfloat16(), logit_scale=1.3, softcap=30.0, temperature=0.7),
}


def tokens_for(V: int, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Make targets, row_starts and coefs of rows with these numbers of tokens; every fourth token is absent."""
    row_starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    targets = torch.randint(0, V, (sum(counts),))
    targets[3::4] = -100
    return targets, row_starts, torch.randn(sum(counts))


def call(**changes):
    """Make a small valid call of row_backward_, with some arguments exchanged."""
    V = 5
    arguments = {
        "logits": torch.randn(2, V),
        "targets": torch.tensor([1, -100, 2]),
        "row_starts": torch.tensor([0, 2, 3]),
        "stats": torch.zeros(2, 2),
        "coef": torch.ones(3),
        "bias": None,
        "logit_scale": 1.0,
        "softcap": 0.0,
        "temperature": 1.0,
    }
    cpu_rows.row_backward_(**{**arguments, **changes})
