"""The three products of the engine, and how a gradient of the weight is summed over chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .ops import accumulate_pair_

# Allocates an uninitialised tensor of a shape, dtype and device.
Empty = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]

# Rows of the weight converted or accumulated at a time: the tile stays in a core's cache at any hidden size in use.
TILE_ELEMENTS = 2**21


def vocab_tiles(weight: Tensor) -> list[slice]:
    """Slices of the vocabulary of about TILE_ELEMENTS elements of the weight (V, H) each."""
    vocab, hidden = weight.shape
    step = max(1, TILE_ELEMENTS // max(1, hidden))
    return [slice(start, min(start + step, vocab)) for start in range(0, vocab, step)]


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """GEMM 1: ``out[:] = hidden @ weight.T``; (r, H), (V, H) -> (r, V), in the dtype of ``out``."""
    if out.dtype == weight.dtype:
        torch.mm(hidden, weight.t(), out=out)
        return
    hidden = hidden.to(out.dtype)
    for tile in vocab_tiles(weight):
        out[:, tile] = hidden @ weight[tile].to(out.dtype).t()


def hidden_grad(dlogits: Tensor, weight: Tensor) -> Tensor:
    """GEMM 2: ``dlogits @ weight``; (r, V), (V, H) -> (r, H) in the dtype of ``dlogits``."""
    if dlogits.dtype == weight.dtype:
        return dlogits @ weight
    grad = dlogits.new_zeros((dlogits.shape[0], weight.shape[1]))
    for tile in vocab_tiles(weight):
        grad.addmm_(dlogits[:, tile], weight[tile].to(dlogits.dtype))
    return grad


class WeightGrad:
    """GEMM 3: the sum over blocks of ``dlogits.T @ hidden``, (V, H) in the weight's dtype.

    Float32 sums in place. A half-precision sum over several blocks is held as two halves (``accumulate_pair_``), of
    which ``value`` is the high one: float32-like accumulation for 2 more bytes an element instead of 4.
    """

    def __init__(self, weight: Tensor, num_blocks: int, empty: Empty) -> None:
        shape = (weight.shape[0], weight.shape[1])
        self.value = empty(shape, weight.dtype, weight.device)
        half = weight.dtype.itemsize < 4 and num_blocks > 1
        self.low = empty(shape, weight.dtype, weight.device) if half else None
        self.empty = True

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        """Add the product of one block: (r, V), (r, H)."""
        if self.low is None and dlogits.dtype == self.value.dtype:
            if self.empty:
                torch.mm(dlogits.t(), hidden, out=self.value)
            else:
                self.value.addmm_(dlogits.t(), hidden)
        else:
            self._add_tiles(dlogits, hidden.to(dlogits.dtype))
        self.empty = False

    def _add_tiles(self, dlogits: Tensor, hidden: Tensor) -> None:
        for tile in vocab_tiles(self.value):
            term = dlogits[:, tile].t() @ hidden
            if self.empty:
                self.value[tile] = term
                if self.low is not None:
                    self.low[tile] = term - self.value[tile]
            elif self.low is not None:
                accumulate_pair_(self.value[tile], self.low[tile], term)
            else:
                self.value[tile] += term

    def result(self) -> Tensor:
        """The sum; zero when no block was added."""
        return self.value.zero_() if self.empty else self.value
