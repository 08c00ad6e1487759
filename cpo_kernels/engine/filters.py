"""Filtered gradients: easy candidates and quiet vocabulary columns are left out of GEMMs 2 and 3.

Both thresholds are in units of the largest coefficient that the loss gives a token, so that they do not depend on beta
or on the size of the batch. The mass of a gradient is the sum of the absolute values of the gradient with respect to
the logits, token by token: ``2 |coef| (1 - p)`` for a token of probability p. A row of ``dlogits`` moves the gradient
of hidden by at most its mass times the largest norm of a row of the weight, and likewise for the weight, so the mass
dropped bounds the error.

The columns that are left out still enter the products together, as one column that is their sum. They are close to
multiples of one another, since the low end of a softmax differs little between rows. So each column is approximated by
its share of their mass times the sum (a rank-one product), and only the small difference is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cpo_kernels.kernels.device import to_device
from cpo_kernels.kernels.numerics import IGNORE_INDEX, long_slices, tile_elements

from .products import REST_BLOCKS
from .tokens import Block

if TYPE_CHECKING:
    from cpo_kernels.kernels.registry import Backend

# Columns are compacted only if at most this share remains: a pass over the gradient must save more than it costs.
WORTHWHILE_COLUMNS = 0.75
# Lifts shares of 1e5 columns out of float16's subnormals, without lifting a mean of weights to its largest number.
SHARES_SCALE = 16.0
# Float32 numbers held for a column: its maximum, its mass, the mass left out, and the waiting shares, twice.
STATISTICS = 4 + 2 * REST_BLOCKS


class Kept(NamedTuple):
    """The part of a block's gradient that enters GEMMs 2 and 3.

    Attributes:
        dlogits: (k, c), within the memory of the block's logits; (k, c + 1) with the sum of the other columns last
            where only some are kept.
        rows: (k,) or a slice, rows of ``hidden``.
        columns: (c,) vocabulary entries, or None for all of them.
        absent: (k,) bool, rows whose gradient is 0 and whose hidden states may be anything; None: there are none.
        scale: (k,) float32, what each row of ``dlogits`` is still to be multiplied by; None: nothing.
        shares: (V,) share of every column in the sum of the left-out columns, 0 for kept ones; None if all are kept.
        spare: memory of the block's logits beyond ``dlogits``, for (c + 1, H) numbers; None if all columns are kept.
    """

    dlogits: Tensor
    rows: Tensor | slice
    columns: Tensor | None = None
    shares: Tensor | None = None
    spare: Tensor | None = None
    absent: Tensor | None = None
    scale: Tensor | None = None


@dataclass
class GradientFilter:
    """The filters of one call and the mass that they have seen and dropped.

    Attributes:
        candidate_threshold: absolute coefficient up to which a candidate is dropped; None keeps all.
        column_threshold: absolute gradient up to which a column is dropped; None keeps all.
        slope: derivative of the transformed logit by the raw one, without a softcap.
        hidden_size: H.
        total: mass of the exact gradient.
        dropped: mass left out.
    """

    candidate_threshold: float | Tensor | None
    column_threshold: float | Tensor | None
    slope: float
    hidden_size: int
    total: float | Tensor = 0.0
    dropped: float | Tensor = 0.0

    @property
    def share(self) -> Tensor:
        """Dropped mass over total mass, 0 without any gradient."""
        if not isinstance(self.total, Tensor):  # no chunk had a gradient
            return torch.zeros((), device="cpu")
        return (self.dropped / self.total).where(self.total > 0, 0.0).clamp(max=1.0)

    def drop_candidates(
        self, contrast: Tensor, coef: Tensor, logps: Tensor, slots: Tensor, always: Tensor | None = None
    ) -> Tensor:
        """Return the coefficients (n,) of a chunk's slots, 0 for candidates that the contrast has settled.

        Args:
            contrast: (S,) coefficient of each candidate in the contrast.
            coef: (S,) coefficient of each of its tokens.
            logps: (n,) log-probabilities.
            slots: (S,) slots of each candidate.
            always: (S,) bool, candidates that are never settled (those in the likelihood of the truth), or None.
        """

        def of_slots(values: Tensor) -> Tensor:
            return values.repeat_interleave(slots, output_size=logps.numel())

        mass = of_slots(coef).abs() * (-2 * abs(self.slope) * torch.expm1(logps))
        self.total = self.total + mass.sum(dtype=torch.float64)
        if self.candidate_threshold is None:
            return of_slots(coef)
        settled = contrast.abs() <= self.candidate_threshold  # NaN is not settled
        if always is not None:
            settled &= ~always
        self.dropped = self.dropped + mass.masked_fill(~of_slots(settled), 0.0).sum(dtype=torch.float64)
        return of_slots(coef.masked_fill(settled, 0.0))

    def compact(self, backend: Backend, block: Block, dlogits: Tensor, coef: Tensor) -> Kept | None:
        """Move the kept rows and columns of ``dlogits`` (r, V) to its front, and return them; None if none is kept.

        The host waits for a GPU once, to read the sizes.

        Args:
            backend: supplies the statistics of the columns.
            block: the rows.
            dlogits: (r, V), overwritten.
            coef: (n,) coefficients of the block's slots.
        """
        device = dlogits.device
        counts = (coef != 0) & (block.targets != IGNORE_INDEX)
        if self.column_threshold is None:
            rows, columns = active_rows(block, counts.cpu()), None
        else:
            largest, mass = backend.column_stats(dlogits)
            quiet = (largest <= self.column_threshold) & ~mass.isnan()  # the maximum may ignore NaN, the sum does not
            rows_flags, loud = torch.cat([counts, ~quiet]).cpu().split([counts.numel(), quiet.numel()])
            rows, columns = active_rows(block, rows_flags), loud.nonzero().squeeze(1)
        if rows.numel() == 0:
            return None
        if columns is None or not worth_compacting(dlogits, rows.numel(), columns.numel(), self.hidden_size):
            if rows.numel() == block.num_rows:
                return Kept(dlogits, block.rows)
            moved, rows = move_rows_(dlogits, rows)
            return Kept(moved, block.row_indices(device)[to_device(rows, device)])
        left_out = mass.masked_fill(~quiet, 0.0)
        self.dropped = self.dropped + left_out.sum(dtype=torch.float64)
        if columns.numel() == 0:
            return None
        rows, columns = to_device(rows, device), to_device(columns, device)
        kept, spare = move_elements_(backend, dlogits, rows, columns)
        shares = left_out / left_out.sum().clamp(min=torch.finfo(mass.dtype).tiny)
        return Kept(kept, block.row_indices(device)[rows], columns, shares, spare)


def scratch_bytes(rows: int, vocab: int, device: torch.device) -> int:
    """Count the bytes of a filtered call besides logits and gathered rows: three float32 tiles, (V,) statistics."""
    return 4 * (3 * min(tile_elements(device), rows * vocab) + STATISTICS * vocab)


def active_rows(block: Block, active: Tensor) -> Tensor:
    """Return the rows of a block, as increasing host integers, that have an ``active`` (n,) slot."""
    if block.host_row_starts is None:
        return active.nonzero().squeeze(1)
    counted = torch.cat([active.new_zeros(1, dtype=torch.int64), active.cumsum(0)])
    return counted[torch.from_numpy(block.host_row_starts)].diff().nonzero().squeeze(1)


def worth_compacting(dlogits: Tensor, rows: int, columns: int, hidden_size: int) -> bool:
    """Tell whether few columns remain, and whether their rows of the weight fit the memory of the logits as well."""
    room = (columns + 1) * (rows + hidden_size) <= flat_view(dlogits).numel()
    return room and columns <= WORTHWHILE_COLUMNS * dlogits.shape[1]


def flat_view(matrix: Tensor) -> Tensor:
    """Return the memory of a matrix of unit column stride, from first to last element with gaps between rows."""
    return matrix.as_strided(((matrix.shape[0] - 1) * matrix.stride(0) + matrix.shape[1],), (1,))


def move_rows_(matrix: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Move the k given ``rows``, increasing host integers, to the front of ``matrix``; return them and their order.

    Only rows beyond the first k move, into the places of rows that are not kept: at most half of the matrix.
    """
    order = torch.arange(rows.numel(), device="cpu")
    stay = rows < rows.numel()
    hole = torch.ones(rows.numel(), dtype=torch.bool, device="cpu")
    hole[rows[stay]] = False
    order[hole] = rows[~stay]
    holes, movers = (to_device(t, matrix.device) for t in (hole.nonzero().squeeze(1), rows[~stay]))
    for tile in moving_tiles(matrix, movers.numel()):
        matrix.index_copy_(0, holes[tile], matrix.index_select(0, movers[tile]))
    return matrix[: rows.numel()], order


def moving_tiles(matrix: Tensor, rows: int) -> list[slice]:
    """Return slices of ``rows`` rows, whose copy is small beside the matrix and large beside a launch."""
    return long_slices(rows, matrix.shape[1], tile_elements(matrix.device))


def move_elements_(backend: Backend, matrix: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Move ``matrix[rows][:, columns]`` to the front of its memory, and return it and the memory left over.

    Both ``rows`` and ``columns`` increase. The sum of the other columns is one more column of the result. It is summed
    from the rounded gradient, not derived from a row sum of 0: the rounding of a target is large beside it. Element
    (i, j) of the result lies at or before the start of its source row, which no later tile reads any more.
    """
    flat, width = flat_view(matrix), columns.numel() + 1
    for tile in moving_tiles(matrix, rows.numel()):
        part = backend.take_columns(matrix, rows[tile], columns)
        flat[tile.start * width : tile.stop * width].view(-1, width).copy_(part)
    size = rows.numel() * width
    return flat[:size].view(-1, width), flat[size:]


def mean_row(weight: Tensor, shares: Tensor) -> Tensor:
    """Return the (H,) mean of the rows of (V, H) weighted by ``shares`` (V,), which add up to 1.

    It has the dtype of the weight.
    """
    scale = SHARES_SCALE if weight.dtype == torch.float16 else 1.0
    return torch.mm((shares * scale).to(weight.dtype)[None], weight)[0] / scale
