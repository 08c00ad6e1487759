"""Dtypes of sums, sums of half precision in two halves, and slices of what is too large to convert at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .device import is_host

IGNORE_INDEX = -100


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values stored as ``dtype`` are summed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def narrow_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the (R, V) tensor of ``dtype`` at the front of each row of the memory of ``logits`` (R, V)."""
    return logits if dtype == logits.dtype else logits.view(dtype)[:, : logits.shape[1]]


# Elements of a matrix converted for a product at a time: a tile of that size stays in a shared cache.
TILE_ELEMENTS = 2**21


def tile_elements(device: torch.device) -> int:
    """Return how many elements to move at a time: few beside a budget of logits, many beside the cost of a launch."""
    return 2**19 if is_host(device) else 2**22


def long_slices(length: int, width: int, elements: int = TILE_ELEMENTS) -> list[slice]:
    """Return slices of the long dimension of a (length, width) matrix, of about ``elements`` elements each."""
    step = max(1, elements // max(1, width))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def accumulate_pair_(high: Tensor, low: Tensor, term: Tensor) -> None:
    """Add ``term`` to the sum held as ``high + low``: two tensors of a half-precision dtype, 16 more bits than one.

    ``high`` alone is at all times the sum rounded to its dtype, so it is the result and costs no conversion.
    """
    total = term.float().add_(low).add_(high)
    high.copy_(total)
    low.copy_(total.sub_(high))
