"""Subclasses of the head that replace the product and the row kernels where ``selection.json`` says they are faster.

Such a way is a subclass of :class:`cpo_kernels.engine.head.LinearHead` that runs kernels which a backend offers under
the way's name (:attr:`cpo_kernels.kernels.backend.Backend.ways`). The loop calls the head's methods and names no way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpo_kernels.kernels.backend import Backend
from cpo_kernels.kernels.numerics import narrow_view

from .head import Forward, LinearHead
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

    def gradient_(self, block: Block, done: Forward, coef: Tensor) -> Tensor:
        """Write the gradient (r, V) over what the forward kept."""
        tokens = block.targets, block.row_starts
        run_ = self.backend.ways["linear_kept"].backward_
        return run_(done.source, *tokens, done.stats, done.logps, coef, *self.head.transform)


class RowGradientAtOnce(LinearHead):
    """Forward and gradient of rows in one read and one write, for coefficients that are known beforehand."""

    def forward_with_gradient(self, block: Block, workspace: Any, coef: Tensor) -> tuple[Tensor, Tensor]:
        """Run the product, then forward and gradient of its rows in one pass."""
        kernel = self.backend.ways["row_gradient_"]
        if not kernel.takes(workspace):
            return super().forward_with_gradient(block, workspace, coef)
        logits, dtype = workspace[: block.num_rows], self.hidden.dtype
        self.backend.gemm_(self.hidden[block.rows], self.weight.t(), logits, False)
        _, logps = kernel.run_(logits, block.targets, block.row_starts, coef, *self.transform, dtype)
        return logps, narrow_view(logits, dtype)


def choose_way(backend: Backend, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> type[LinearHead]:
    """Choose the way that serves a call; product and row kernels, :class:`LinearHead`, where no other does."""
    if any(needs):
        kept = backend.ways.get("linear_kept")
        if kept is not None and kept.takes(hidden, weight):
            return KeptInPlaceOfLogits
        return RowGradientAtOnce if "row_gradient_" in backend.ways else LinearHead
    fused = backend.ways.get("linear_forward")
    return ForwardWithoutLogits if fused is not None and fused.takes(hidden, weight) else LinearHead
