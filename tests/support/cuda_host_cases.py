"""The row kernels of CUDA on the CPU, and what they are given."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cpo_kernels.kernels.cuda import rows as cuda_rows

PLAIN = (None, 1.0, 0.0, 1.0)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


NARROW = [torch.bfloat16, torch.float16]


SHARED = pytest.mark.parametrize("shared", [False, True], ids=["one token a row", "shared rows"])


HEADS = {
    "plain": lambda V: PLAIN,
    "scaled": lambda V: (None, 1.7, 0.0, 0.6),
    "negative scale": lambda V: (None, -0.8, 0.0, 1.0),  # the largest y is at the smallest x
    "zero scale": lambda V: (None, 0.0, 0.0, 1.0),
    "bias": lambda V: (torch.randn(V), 1.0, 0.0, 1.0),
    "softcap": lambda V: (None, 1.0, 3.0, 1.0),
    "all": lambda V: (torch.randn(V).bfloat16(), 1.3, 30.0, 0.7),
}


class Tokens(NamedTuple):
    """Targets, row_starts and coefs."""

    targets: Tensor
    row_starts: Tensor | None
    coef: Tensor


def shared_rows(V: int, counts: list[int]) -> Tokens:
    """Rows with these numbers of tokens; every fourth token is absent, with a coef of NaN."""
    row_starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    targets, coef = torch.randint(0, V, (sum(counts),)), torch.randn(sum(counts))
    targets[3::4], coef[3::4] = -100, torch.nan
    return Tokens(targets, row_starts, coef)


def some_tokens(V: int, shared: bool) -> Tokens:
    """Of three rows."""
    return shared_rows(V, [2, 0, 5]) if shared else one_token_a_row(V, 3)


def forward(logits: Tensor, tokens: Tokens, head=PLAIN, threads: int = 32) -> tuple[Tensor, Tensor]:
    return cuda_rows.row_forward(logits, tokens.targets, tokens.row_starts, *head, threads=threads)


def backward(logits: Tensor, tokens: Tokens, stats: Tensor, head=PLAIN, threads: int = 32) -> Tensor:
    return cuda_rows.row_backward(logits, *tokens[:2], stats, tokens.coef, *head, threads=threads)


def one_token_a_row(V: int, R: int) -> Tokens:
    """The second token is absent, with a coef of NaN."""
    targets, coef = torch.randint(0, V, (R,)), torch.randn(R)
    targets[1], coef[1] = -100, torch.nan
    return Tokens(targets, None, coef)
