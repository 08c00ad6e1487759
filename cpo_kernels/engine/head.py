"""A head bound to its tensors: the forward and the gradient of one block of rows, by a product and the row kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from cpo_kernels.kernels.backend import Backend
from cpo_kernels.kernels.device import row_width
from cpo_kernels.kernels.numerics import narrow_view
from cpo_kernels.kernels.scratch import lasting, scratch
from cpo_kernels.options import Head

from .tokens import Block


class LogitGradients(NamedTuple):
    """The gradient by the logits of a block of r rows.

    Attributes:
        dlogits: (r, V), in the dtype of hidden.
        scale: (r,) float32, what each row is still to be multiplied by; None: nothing.
    """

    dlogits: Tensor
    scale: Tensor | None = None


class Forward(NamedTuple):
    """The forward of a block of r rows and n tokens.

    Attributes:
        stats: (2, r), maximum and log-sum-exp minus maximum of each row.
        logps: (n,) in the block's order.
        source: what the gradient is made of and written over: the logits (r, V), or what a subclass keeps.
    """

    stats: Tensor
    logps: Tensor
    source: Any


@dataclass(frozen=True)
class LinearHead:
    """The head of a call: hidden (R, H), weight (V, H), bias (V,) or None, and how they become log-probabilities.

    This class runs a matrix product into a workspace, which the row kernels read once. Subclasses do it in other ways,
    see :mod:`cpo_kernels.engine.ways`; the loop passes on what they keep between forward and gradient without reading
    it. ``holds_logits`` says whether there is a workspace at all, ``scales_hidden`` whether GEMM 3 takes a scaled copy,
    ``keeps_statistics`` whether the gradient can be made of statistics and logits that are computed anew;
    ``buffers`` is the number of blocks that the workspace holds, ``block_rows`` the number of rows of a block, at most.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    head: Head
    backend: Backend
    logits_dtype: torch.dtype

    holds_logits: ClassVar[bool] = True
    scales_hidden: ClassVar[bool] = False
    keeps_statistics: ClassVar[bool] = True
    buffers: ClassVar[int] = 1
    block_rows: ClassVar[int | None] = None

    @classmethod
    def row_bytes(cls, backend: Backend, vocab: int, hidden: Tensor, logits_dtype: torch.dtype) -> int:
        """Count the bytes that one row takes in the workspace."""
        return row_width(vocab, hidden.device) * logits_dtype.itemsize

    @classmethod
    def sums_row_bytes(cls, backend: Backend, vocab: int) -> int:
        """Count the bytes of a row's partial sums, where its logits are not kept."""
        return 0

    @classmethod
    def tile_dtype(cls, logits_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of logits that are computed once more, for :mod:`cpo_kernels.engine.weight_tiles`."""
        return logits_dtype

    @property
    def transform(self) -> tuple[Tensor | None, float, float, float]:
        """The bias and the numbers after it, as kernels take them."""
        return self.bias, *self.head.transform

    @contextmanager
    def workspace(self, rows: int) -> Iterator[Any]:
        """Provide memory for the logits (rows, V) of ``rows`` rows within the context."""
        width = row_width(self.weight.shape[0], self.hidden.device)
        with self.scratch(rows * width, self.logits_dtype) as memory:
            yield memory.view(rows, width)[:, : self.weight.shape[0]]

    def lasting_workspace(self, rows: int) -> Any:
        """Allocate memory for ``rows`` rows that lives as long as what refers to it."""
        width, own_pages = row_width(self.weight.shape[0], self.hidden.device), self.head.max_logits_bytes is not None
        memory = lasting(rows * width, self.logits_dtype, self.hidden.device, own_pages=own_pages)
        return memory.view(rows, width)[:, : self.weight.shape[0]]

    def scratch(self, elements: int, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
        """Provide memory for some logits; that of an explicit budget goes back to the system afterwards."""
        return scratch(elements, dtype, self.hidden.device, keep=self.head.max_logits_bytes is None)

    def forward(self, block: Block, workspace: Any, *, keep: bool = True) -> Forward:
        """Run the forward of a block; ``keep`` says that :meth:`gradient_` follows before the next block's forward."""
        logits = workspace[: block.num_rows]
        self.backend.gemm_(self.hidden[block.rows], self.weight.t(), logits, False)
        stats, logps = self.backend.rows.forward(logits, block.targets, block.row_starts, *self.transform)
        return Forward(stats, logps, logits)

    def log_probabilities(self, blocks: list[Block], workspace: Any, out: Tensor) -> None:
        """Write the log-probabilities of all slots of some blocks to ``out`` (n,), where no gradient follows."""
        for block in blocks:
            out[block.order] = self.forward(block, workspace, keep=False).logps

    def recompute(self, block: Block, workspace: Any, before: Forward) -> Forward:
        """Compute the source of the gradient again, after later blocks have overwritten it."""
        logits = workspace[: block.num_rows]
        self.backend.gemm_(self.hidden[block.rows], self.weight.t(), logits, False)
        return before._replace(source=logits)

    def gradient_(self, block: Block, done: Forward, coef: Tensor) -> LogitGradients:
        """Write the gradient of ``sum_n coef_n * logp_n`` over its source."""
        logits, dtype = done.source, self.hidden.dtype
        tokens = block.targets, block.row_starts
        self.backend.rows.backward_(logits, *tokens, done.stats, coef, *self.transform, dtype)
        return LogitGradients(narrow_view(logits, dtype))

    def unit_gradient_(self, block: Block, done: Forward) -> LogitGradients:
        """Write the gradient of the sum of all log-probabilities over its source; each row has one token."""
        return self.gradient_(block, done, torch.ones_like(done.logps))
