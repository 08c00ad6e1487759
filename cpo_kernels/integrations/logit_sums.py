"""Sums of the logits of a linear head over the vocabulary, which need no logits: they are linear in its weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpo_kernels.kernels.numerics import accumulate_dtype

# Rows of a weight that are summed at a time, so that no float32 copy of a whole half-precision weight is made.
ROWS_SUMMED = 4096


def column_sums(weight: Tensor, of_words: Tensor | None = None) -> Tensor:
    """Sum the rows of a weight (V, H), each times its number in ``of_words`` (V,) if given; differentiable in weight.

    The result (H,) is float32, or float64 for float64.
    """
    dtype = accumulate_dtype(weight.dtype)
    parts = weight.split(ROWS_SUMMED)
    if of_words is None:
        sums = [part.sum(0, dtype=dtype) for part in parts]
    else:
        shares = of_words.to(dtype).split(ROWS_SUMMED)
        sums = [share @ part.to(dtype) for share, part in zip(shares, parts, strict=True)]
    return torch.stack(sums).sum(0)


def mean_logits(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Compute the mean logit of each of some parts (n, T, H) of the input, a scalar without gradient."""
    weight = weight.detach()
    dtype, sums = accumulate_dtype(weight.dtype), column_sums(weight)
    shift = 0.0 if bias is None else bias.detach().mean(dtype=dtype)
    means = [part.detach().mean((0, 1), dtype=dtype) for part in parts]
    return [(mean * sums).sum() / weight.shape[0] + shift for mean in means]


def summed_logits(sequences: Tensor, of_sequences: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Sum the logits of sequences (B, T, H), each times its number in ``of_sequences`` (B,); without gradient."""
    weight, dtype = weight.detach(), accumulate_dtype(weight.dtype)
    shares = of_sequences.to(dtype)
    total = (shares @ sequences.detach().sum(1, dtype=dtype) * column_sums(weight)).sum()
    positions = shares.sum() * sequences.shape[1]
    return total if bias is None else total + positions * bias.detach().sum(dtype=dtype)
