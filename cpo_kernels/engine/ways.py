"""Subclasses of the head that replace the row kernels, or the product as well.

:class:`UnitGradients` serves a backend that has the kernels for it. The others run kernels which a backend offers under
the way's name (:attr:`cpo_kernels.kernels.backend.Backend.ways`), where ``selection.json`` says that they are faster.
The loop calls the head's methods and names no way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels.kernels.backend import Backend, LinearSoftmax, UnitGradient
from cpo_kernels.kernels.device import SideStream, is_gpu
from cpo_kernels.kernels.numerics import narrow_view
from cpo_kernels.kernels.scratch import lasting
from cpo_kernels.options import Head

from .head import Forward, LinearHead, LogitGradients
from .tokens import Block


class ForwardWithoutLogits(LinearHead):
    """Log-probabilities without logits in memory, where no gradient is to follow."""

    holds_logits = False

    @contextmanager
    def workspace(self, rows: int) -> Iterator[None]:
        """Provide nothing: this way needs no workspace."""
        yield None

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

    @contextmanager
    def workspace(self, rows: int) -> Iterator[Any]:
        """Provide memory for what is kept for ``rows`` rows."""
        yield self.lasting_workspace(rows)

    def lasting_workspace(self, rows: int) -> Any:
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

    def unit_gradient_(self, block: Block, done: Forward) -> LogitGradients:
        """Return the gradient that the forward left."""
        return LogitGradients(narrow_view(done.source, self.hidden.dtype))

    @property
    def kernels(self) -> UnitGradient:
        """The backend's kernels for this way."""
        assert self.backend.unit_gradient is not None
        return self.backend.unit_gradient


class Powers(NamedTuple):
    """The workspace of :class:`SoftmaxOfProduct`.

    Attributes:
        powers: (R, V), what is kept in place of logits.
        sums: float32, the partial sums of the rows.
    """

    powers: Tensor
    sums: Tensor


class SoftmaxOfProduct(LinearHead):
    """No logits: the forward leaves powers in the dtype of hidden, which are the gradient up to a number for each row.

    Log-probabilities are those of float32 logits, whatever the dtype. The numbers multiply the rows around GEMMs 2 and
    3; only a row that predicts several different tokens is read and written once more.
    """

    scales_hidden = True

    @classmethod
    def row_bytes(cls, backend: Backend, vocab: int, hidden: Tensor, logits_dtype: torch.dtype) -> int:
        """Count the bytes of a row of powers."""
        return vocab * hidden.dtype.itemsize

    @classmethod
    def sums_row_bytes(cls, backend: Backend, vocab: int) -> int:
        """Count the bytes of a row's partial sums."""
        return kernels_of(backend).floats_per_row(vocab) * torch.float32.itemsize

    @classmethod
    def tile_dtype(cls, logits_dtype: torch.dtype) -> torch.dtype:
        """Return float32, so that tiles give what powers do."""
        return torch.float32

    @contextmanager
    def workspace(self, rows: int) -> Iterator[Powers]:
        """Provide memory for the powers (rows, V) of ``rows`` rows, and for their partial sums."""
        with self.scratch(self.floats_of(rows), torch.float32) as memory:
            yield self.parts(memory, rows)

    def lasting_workspace(self, rows: int) -> Powers:
        """Allocate such memory that lives as long as what refers to it."""
        own_pages = self.head.max_logits_bytes is not None
        memory = lasting(self.floats_of(rows), torch.float32, self.hidden.device, own_pages=own_pages)
        return self.parts(memory, rows)

    def floats_of(self, rows: int) -> int:
        """Count what all that takes, in numbers of float32."""
        powers = rows * self.weight.shape[0] * self.hidden.dtype.itemsize
        return -(-powers // torch.float32.itemsize) + self.sums_of(rows)

    def sums_of(self, rows: int) -> int:
        """Count the partial sums of ``rows`` rows."""
        return rows * kernels_of(self.backend).floats_per_row(self.weight.shape[0])

    def parts(self, memory: Tensor, rows: int) -> Powers:
        """Divide memory into powers and sums."""
        vocab, floats = self.weight.shape[0], self.sums_of(rows)
        powers = memory[floats:].view(self.hidden.dtype)[: rows * vocab].view(rows, vocab)
        return Powers(powers, memory[:floats])

    def forward(self, block: Block, workspace: Powers, *, keep: bool = True) -> Forward:
        """Run the product with its softmax; without ``keep`` nothing is left of it."""
        out = workspace.powers[: block.num_rows] if keep else None
        given = self.hidden[block.rows], self.weight, block.targets, block.row_starts
        stats, logps = kernels_of(self.backend).forward(*given, *self.transform, out=out, memory=workspace.sums)
        return Forward(stats, logps, out)

    def recompute(self, block: Block, workspace: Powers, before: Forward) -> Forward:
        """Run the forward a second time, and keep what the gradient needs."""
        return self.forward(block, workspace)

    def gradient_(self, block: Block, done: Forward, coef: Tensor) -> LogitGradients:
        """Return the powers, and what their rows are to be multiplied by; for filters, which compare, their product."""
        given = done.source, block.targets, block.row_starts, done.stats, done.logps, coef
        filtered = self.head.filtered
        scale = kernels_of(self.backend).scale(*given, *self.head.transform, in_place=filtered)
        return LogitGradients(done.source, None if filtered else scale)


class LogProbabilitiesOfProduct(SoftmaxOfProduct):
    """Log-probabilities without logits in memory, where no gradient is to follow."""

    holds_logits = False

    def floats_of(self, rows: int) -> int:
        """Count the partial sums: there is nothing else."""
        return self.sums_of(rows)

    def parts(self, memory: Tensor, rows: int) -> Powers:
        """Return the memory: all of it is for sums."""
        return Powers(memory[:0], memory)

    def forward(self, block: Block, workspace: Powers, *, keep: bool = True) -> Forward:
        """Run the product with its softmax, of which nothing is left."""
        return super().forward(block, workspace, keep=False)


def kernels_of(backend: Backend) -> LinearSoftmax:
    """Return the backend's softmax of a product."""
    assert backend.linear_softmax is not None
    return backend.linear_softmax


def choose_way(
    backend: Backend, head: Head, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> type[LinearHead]:
    """Choose the way that serves a call; product and row kernels, :class:`LinearHead`, where no other does."""
    softmax = backend.linear_softmax is not None and backend.linear_softmax.takes(hidden, weight)
    if any(needs):
        kept, unit = backend.ways.get("linear_kept"), backend.unit_gradient
        if kept is not None and kept.takes(hidden, weight):
            return KeptInPlaceOfLogits
        if softmax:
            return SoftmaxOfProduct
        # Filters compare gradients with their thresholds, which a gradient without its coefficient cannot be.
        takes = unit is not None and unit.takes(weight.shape[0], head.logits_dtype or hidden.dtype, hidden.device)
        # A hidden state times a coefficient may be infinite in float16 where their gradient is tiny.
        overflows = hidden.dtype == torch.float16 and any(needs[1:])
        return UnitGradients if takes and not head.filtered and not overflows else LinearHead
    fused = backend.ways.get("linear_forward")
    if fused is not None and fused.takes(hidden, weight):
        return ForwardWithoutLogits
    if softmax:
        return LogProbabilitiesOfProduct
    # The processes of a vocabulary-parallel head exchange numbers between product and log-probabilities.
    return BesideTheNextProduct if is_gpu(hidden.device) and head.vocab_shard is None else LinearHead
