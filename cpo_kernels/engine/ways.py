"""Subclasses of the head that replace the row kernels, or the product as well.

:class:`UnitGradients` serves a backend that has the kernels for it. The others run kernels which a backend offers under
the way's name (:attr:`cpo_kernels.kernels.backend.Backend.ways`), where ``selection.json`` says that they are faster.
The loop calls the head's methods and names no way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpo_kernels.kernels.backend import Backend, UnitGradient
from cpo_kernels.kernels.device import SideStream, is_gpu
from cpo_kernels.kernels.numerics import narrow_view
from cpo_kernels.options import Head

from .head import Forward, LinearHead, LogitGradients
from .tokens import Block


class ForwardWithoutLogits(LinearHead):
    """Log-probabilities without logits in memory, where no gradient is to follow."""

    holds_logits = False

    def workspace(self, rows: int) -> None:
        """Return None: this way needs no workspace."""

    def forward(self, block: Block, workspace: Any, *, keep: bool = True) -> Forward:
        """Run the backend's fused forward; it leaves nothing that a gradient could be made of."""
        tokens = block.targets, block.row_starts
        run = self.backend.ways["linear_forward"].run
        logps = run(self.hidden[block.rows], self.weight, *tokens, *self.transform)
        return Forward(logps.new_empty((2, 0)), logps, None)


class KeptInPlaceOfLogits(LinearHead):
    """A fused forward that leaves what the gradient needs, in the dtype of hidden, in place of float32 logits."""

    keeps_statistics = False

    @classmethod
    def row_bytes(cls, backend: Backend, vocab: int, hidden: Tensor, logits_dtype: torch.dtype) -> int:
        """Count the bytes that are kept for a row."""
        return backend.ways["linear_kept"].row_elements(vocab) * hidden.dtype.itemsize

    def workspace(self, rows: int) -> Any:
        """Allocate memory for what is kept for ``rows`` rows."""
        return self.backend.ways["linear_kept"].room(rows, self.hidden, self.weight.shape[0])

    def forward(self, block: Block, workspace: Any, *, keep: bool = True) -> Forward:
        """Run the fused forward, into the workspace if a gradient is to follow."""
        space = workspace if keep else None
        tokens = block.targets, block.row_starts
        run = self.backend.ways["linear_kept"].forward
        return Forward(*run(space, self.hidden[block.rows], self.weight, *tokens, *self.transform))

    def recompute(self, block: Block, workspace: Any, before: Forward) -> Forward:
        """Run the forward a second time, and keep what the gradient needs."""
        return self.forward(block, workspace)

    def gradient_(self, block: Block, done: Forward, coef: Tensor) -> LogitGradients:
        """Write the gradient over what the forward kept."""
        tokens = block.targets, block.row_starts
        run_ = self.backend.ways["linear_kept"].backward_
        return LogitGradients(run_(done.source, *tokens, done.stats, done.logps, coef, *self.head.transform))


class BesideTheNextProduct(LinearHead):
    """The row kernel of a block runs beside the product of the next one, where no gradient is to follow.

    Blocks are as large as the matrix product needs to run at its full rate, so that only the last row kernel shows.
    """

    buffers = 2
    block_rows = 2048

    def log_probabilities(self, blocks: list[Block], workspace: Any, out: Tensor) -> None:
        """Run products on the current stream and row kernels on another, in two parts of the workspace."""
        if not blocks:
            return
        side, rows = SideStream(self.hidden.device), max(block.num_rows for block in blocks)
        parts, marks = -(-workspace.shape[0] // rows), list[Any]()
        try:
            for index, block in enumerate(blocks):
                if index >= parts:
                    side.wait(marks[index - parts])
                first = index % parts * rows
                logits = workspace[first : first + block.num_rows]
                self.backend.gemm_(self.hidden[block.rows], self.weight.t(), logits, False)
                with side.beside():
                    tokens = block.targets, block.row_starts
                    out[block.order] = self.backend.rows.forward(logits, *tokens, *self.transform)[1]
                marks.append(side.mark())
        finally:  # before anyone frees what the second stream reads
            side.join()


class UnitGradients(LinearHead):
    """One read and one write of the logits: the forward leaves gradients for a coefficient of 1 in their place.

    The coefficients, which come later, multiply the rows around GEMMs 2 and 3. Only a row that predicts several
    different tokens keeps its logits until then.
    """

    scales_hidden = True

    def forward(self, block: Block, workspace: Any, *, keep: bool = True) -> Forward:
        """Run the product, then forward and gradient of its rows in one pass; without ``keep`` the forward alone."""
        if not keep:
            return super().forward(block, workspace)
        logits = workspace[: block.num_rows]
        self.backend.gemm_(self.hidden[block.rows], self.weight.t(), logits, False)
        tokens, dtype = (block.targets, block.row_starts), self.hidden.dtype
        stats, logps = self.kernels.forward_(logits, *tokens, *self.transform, dtype)
        return Forward(stats, logps, logits)

    def recompute(self, block: Block, workspace: Any, before: Forward) -> Forward:
        """Run the forward a second time, with the gradient."""
        return self.forward(block, workspace)

    def gradient_(self, block: Block, done: Forward, coef: Tensor) -> LogitGradients:
        """Return the gradient that the forward left, and what its rows are to be multiplied by."""
        logits, tokens, dtype = done.source, (block.targets, block.row_starts), self.hidden.dtype
        scale = self.kernels.finish_(logits, *tokens, done.stats, coef, *self.transform, dtype)
        return LogitGradients(narrow_view(logits, dtype), scale)

    def unit_gradient_(self, block: Block, done: Forward) -> Tensor:
        """Return the gradient (r, V) that the forward left."""
        return narrow_view(done.source, self.hidden.dtype)

    @property
    def kernels(self) -> UnitGradient:
        """The backend's kernels for this way."""
        assert self.backend.unit_gradient is not None
        return self.backend.unit_gradient


def choose_way(
    backend: Backend, head: Head, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> type[LinearHead]:
    """Choose the way that serves a call; product and row kernels, :class:`LinearHead`, where no other does."""
    if any(needs):
        kept, unit = backend.ways.get("linear_kept"), backend.unit_gradient
        if kept is not None and kept.takes(hidden, weight):
            return KeptInPlaceOfLogits
        # Filters compare gradients with their thresholds, which a gradient without its coefficient cannot be.
        takes = unit is not None and unit.takes(weight.shape[0], head.logits_dtype or hidden.dtype, hidden.device)
        # A hidden state times a coefficient may be infinite in float16 where their gradient is tiny.
        overflows = hidden.dtype == torch.float16 and any(needs[1:])
        return UnitGradients if takes and not head.filtered and not overflows else LinearHead
    fused = backend.ways.get("linear_forward")
    if fused is not None and fused.takes(hidden, weight):
        return ForwardWithoutLogits
    # The processes of a vocabulary-parallel head exchange numbers between product and log-probabilities.
    return BesideTheNextProduct if is_gpu(hidden.device) and head.vocab_shard is None else LinearHead
