"""The three products of the engine, and how a gradient of the weight is summed over chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .backends import Backend


def logits(backend: Backend, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """GEMM 1: ``out[:] = hidden @ weight.T``; (r, H), (V, H) -> (r, V), in the dtype of ``out``."""
    backend.gemm_(hidden, weight.t(), out, False)


def hidden_grad(
    backend: Backend, dlogits: Tensor, weight: Tensor, grad: Tensor, rows: Tensor | slice, *, once: bool
) -> None:
    """GEMM 2: ``grad[rows] += dlogits @ weight``; (r, V), (V, H) -> r rows of (R, H).

    ``once`` says that no other block has these rows, which are still 0: a slice of them is then written in place.
    """
    if once and isinstance(rows, slice) and grad.dtype == dlogits.dtype:
        backend.gemm_(dlogits, weight, grad[rows], False)
        return
    term = dlogits.new_empty((dlogits.shape[0], weight.shape[1]))
    backend.gemm_(dlogits, weight, term, False)
    grad[rows] += term


class WeightGrad:
    """GEMM 3: the sum over blocks of ``dlogits.T @ hidden``, (V, H) in the weight's dtype.

    Float32 sums in place. A half-precision sum over several blocks is held as two halves (``gemm_pair_``), of which
    ``value`` is the high one: float32-like accumulation for 2 more bytes an element instead of 4.
    """

    def __init__(self, backend: Backend, weight: Tensor, num_blocks: int) -> None:
        self.backend = backend
        self.value = torch.empty_like(weight, memory_format=torch.contiguous_format)
        half = weight.dtype.itemsize < 4 and num_blocks > 1
        self.low = torch.empty_like(self.value) if half else None
        self.empty = True

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        """Add the product of one block: (r, V), (r, H)."""
        if self.low is None:
            self.backend.gemm_(dlogits.t(), hidden, self.value, not self.empty)
        else:
            self.backend.gemm_pair_(dlogits.t(), hidden, self.value, self.low, not self.empty)
        self.empty = False

    def result(self) -> Tensor:
        """The sum; zero when no block was added."""
        return self.value.zero_() if self.empty else self.value
