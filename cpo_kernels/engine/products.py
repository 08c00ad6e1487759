"""The three products of the engine, and how a gradient of the weight is summed over chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpo_kernels.kernels.device import float32_sums
from cpo_kernels.kernels.numerics import accumulate_pair_, long_slices, tile_elements
from cpo_kernels.kernels.scratch import lasting

if TYPE_CHECKING:
    from cpo_kernels.kernels.registry import Backend


def hidden_grad(
    backend: Backend,
    dlogits: Tensor,
    weight: Tensor,
    grad: Tensor,
    rows: Tensor | slice,
    scale: Tensor | None = None,
    *,
    once: bool,
) -> None:
    """Run GEMM 2, ``grad[rows] += scale * (dlogits @ weight)``: (r, V), (V, H) -> r rows of (R, H).

    ``once`` says that no other block has these rows, which are still 0: a slice of them is then written in place.
    """
    in_place = once and isinstance(rows, slice) and grad.dtype == dlogits.dtype
    term = grad[rows] if in_place else dlogits.new_empty((dlogits.shape[0], weight.shape[1]))
    backend.gemm_(dlogits, weight, term, False)
    if scale is not None:
        term.mul_(scale[:, None])
    if in_place:
        return
    if once and isinstance(rows, Tensor):
        grad.index_copy_(0, rows, term.to(grad.dtype))
    else:
        grad[rows] += term


def scaled_hidden(hidden: Tensor, scale: Tensor | None, absent: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return what enters GEMM 3: hidden (r, H) times ``scale`` (r,), and 0 in the rows that are ``absent`` (r,).

    ``out`` is memory for at least as many rows, or None.
    """
    if scale is not None:
        hidden = torch.mul(hidden, scale[:, None], out=torch.empty_like(hidden) if out is None else out[: len(hidden)])
    # Padding may hold NaN, and 0 * NaN is NaN.
    return hidden if absent is None else hidden.masked_fill(absent[:, None], 0.0)


def add_bias_grad(backend: Backend, dlogits: Tensor, scale: Tensor | None, grad: Tensor) -> None:
    """Add ``scale @ dlogits``, or the sum of the rows without a scale, to ``grad``: (r,), (r, V) -> (V,)."""
    if scale is None and dlogits.dtype == grad.dtype:
        grad += dlogits.sum(0)
        return
    # A sum in another dtype would copy dlogits. Half precision holds a scale in two parts, which one product reads.
    high = dlogits.new_ones(dlogits.shape[0]) if scale is None else scale.to(dlogits.dtype)
    parts = [high] if scale is None or dlogits.dtype == scale.dtype else [high, (scale - high).to(dlogits.dtype)]
    sums = grad.new_empty((dlogits.shape[1], len(parts)))
    backend.gemm_(dlogits.t(), torch.stack(parts, 1), sums, False)
    grad += sums.sum(1)


def accumulator_bytes(weight: Tensor) -> int:
    """Count the bytes of :class:`WeightGrad` besides the gradient when half-precision blocks are summed."""
    if weight.dtype.itemsize >= 4:
        return 0
    return weight.numel() * (4 if float32_sums(weight.device) else weight.dtype.itemsize)


# Blocks whose left-out columns are added in one pass over the gradient; each holds (V,) float32 until then.
REST_BLOCKS = 4


class WeightGrad:
    """GEMM 3: the sum over blocks of ``dlogits.T @ hidden``, (V, H) in the weight's dtype.

    A float32 gradient is summed in place. A half-precision sum over several blocks is accumulated in float32 where the
    product itself can (:func:`float32_sums`); elsewhere it is held as two halves (``gemm_pair_``), the high one being
    the gradient, which is nearly as exact and takes 2 more bytes an element instead of 4. ``out`` is memory for the
    result, or None.
    """

    def __init__(self, backend: Backend, weight: Tensor, num_blocks: int, out: Tensor | None = None) -> None:
        self.backend = backend
        self.dtype = weight.dtype
        half_sum, wide = weight.dtype.itemsize < 4 and num_blocks > 1, float32_sums(weight.device)
        sum_dtype = torch.float32 if half_sum and wide else weight.dtype
        self.out = out
        here = None if out is None or out.dtype != sum_dtype else out
        contiguous = torch.contiguous_format
        self.value = torch.empty_like(weight, dtype=sum_dtype, memory_format=contiguous) if here is None else here
        self.low: Tensor | None = None
        if half_sum and not wide:
            size = weight.numel(), weight.dtype, weight.device
            self.low = lasting(*size, own_pages=True).view(weight.shape)
        self.empty = True
        self.rest: list[tuple[Tensor, Tensor]] = []

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        """Add the product of one block: (r, V), (r, H)."""
        if self.low is None:
            self.backend.gemm_(dlogits.t(), hidden, self.value, not self.empty)
        else:
            self.backend.gemm_pair_(dlogits.t(), hidden, self.value, self.low, not self.empty)
        self.empty = False

    def add_columns(self, dlogits: Tensor, hidden: Tensor, columns: Tensor, shares: Tensor, spare: Tensor) -> None:
        """Add the products of some columns, and of all other columns as shares of the last column of ``dlogits``.

        Args:
            dlogits: (r, c + 1).
            hidden: (r, H).
            columns: (c,), increasing.
            shares: (V,) the part that each left-out column has in the last column of ``dlogits``, 0 for ``columns``.
            spare: memory for (c + 1, H) numbers.
        """
        both = spare[: dlogits.shape[1] * hidden.shape[1]].view(dlogits.shape[1], -1)
        self.backend.gemm_(dlogits.t(), hidden, both, False)
        term = both[:-1]
        self.add_rest(shares, both[-1].to(shares.dtype, copy=True))  # a copy: the next block overwrites the memory
        for tile in long_slices(term.shape[0], term.shape[1], tile_elements(term.device)):
            # No column occurs twice, so adding by index is deterministic.
            if self.low is None:
                self.value.index_add_(0, columns[tile], term[tile].to(self.value.dtype))
            else:
                high, low = self.value[columns[tile]], self.low[columns[tile]]
                accumulate_pair_(high, low, term[tile])
                self.value[columns[tile]], self.low[columns[tile]] = high, low

    def add_rest(self, shares: Tensor, total: Tensor) -> None:
        """Add left-out columns, each as its share (V,) of their sum (H,): the first at once, later ones together."""
        if not self.empty:
            self.rest.append((shares, total))
            if len(self.rest) == REST_BLOCKS:
                self.add_rest_()
            return
        for tile in self.tiles():
            torch.mul(shares[tile, None], total, out=self.value[tile])
        if self.low is not None:
            self.low.zero_()
        self.empty = False

    def add_rest_(self) -> None:
        """Add the left-out columns that wait, in one pass over the gradient."""
        if not self.rest:
            return
        shares, sums = (torch.stack(part) for part in zip(*self.rest, strict=True))
        for tile in self.tiles():
            total = shares[:, tile].t() @ sums
            if self.low is None:
                self.value[tile] = total.add_(self.value[tile])
            else:
                accumulate_pair_(self.value[tile], self.low[tile], total)
        self.rest.clear()

    def tiles(self) -> list[slice]:
        """Return slices of rows of the gradient that stay in the cache."""
        return long_slices(self.value.shape[0], self.value.shape[1], tile_elements(self.value.device))

    def zero_if_empty(self) -> None:
        """Set the sum to zero unless a block was added."""
        if self.empty:
            self.value.zero_()
            if self.low is not None:
                self.low.zero_()
        self.empty = False

    def result(self) -> Tensor:
        """Return the sum, zero when no block was added."""
        self.zero_if_empty()
        self.add_rest_()
        if self.out is None or self.out is self.value:
            return self.value.to(self.dtype)
        return self.out.copy_(self.value)
