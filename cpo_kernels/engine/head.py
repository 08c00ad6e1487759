"""A head bound to the kernels that run it: the forward and the gradient of one block of rows, in each way there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels.kernels import device
from cpo_kernels.kernels.numerics import narrow_view
from cpo_kernels.kernels.registry import Backend, KeptLinear
from cpo_kernels.options import Head

from . import products
from .tokens import Block


class Evaluated(NamedTuple):
    """The forward of a block of r rows and n tokens.

    Attributes:
        stats: (2, r), maximum and log-sum-exp minus maximum of each row.
        logps: (n,) in the block's order.
        source: what the gradient is made of, and written over: the logits (r, V), or what was kept in their place.
        kept: by whom; None for logits.
    """

    stats: Tensor
    logps: Tensor
    source: Any
    kept: KeptLinear | None


@dataclass(frozen=True)
class LinearHead:
    """The head of a call: hidden (R, H), weight (V, H), bias (V,) or None, and how they become log-probabilities.

    ``fused_forward``: logits are never written. ``kept``: the backend leaves what a gradient needs in their place.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    head: Head
    backend: Backend
    logits_dtype: torch.dtype
    fused_forward: bool = False
    kept: KeptLinear | None = None

    @property
    def transform(self) -> tuple[Tensor | None, float, float, float]:
        """The bias and the numbers after it, as kernels take them."""
        return self.bias, *self.head.transform

    def workspace(self, rows: int) -> Any:
        """Memory for the logits of so many rows, (rows, V), or for what is kept in their place."""
        vocab = self.weight.shape[0]
        if self.kept is not None:
            return self.kept.room(rows, self.hidden, vocab)
        width = device.row_width(vocab, self.hidden.device)
        return self.hidden.new_empty((rows, width), dtype=self.logits_dtype)[:, :vocab]

    def evaluate(self, block: Block, workspace: Any, *, keep: bool = True) -> Evaluated:
        """The forward of a block; ``keep`` says that :meth:`gradient_` is to follow before the next one."""
        if self.kept is not None:
            space = workspace if keep else None
            matrices, tokens = (self.hidden[block.rows], self.weight), (block.targets, block.row_starts)
            return Evaluated(*self.kept.forward(space, *matrices, *tokens, *self.transform), self.kept)
        logits = self.compute_logits(block, workspace)
        return Evaluated(*self.forward(block, logits), logits, None)

    def evaluate_again(self, block: Block, workspace: Any, before: Evaluated) -> Evaluated:
        """What the gradient is made of, where the memory of the first forward has been used since."""
        if self.kept is not None:
            return self.evaluate(block, workspace)
        return before._replace(source=self.compute_logits(block, workspace))

    def gradient_(self, block: Block, done: Evaluated, coef: Tensor) -> Tensor:
        """The gradient (r, V) of ``sum_n coef_n * logp_n``, in the dtype of hidden, over its source."""
        if done.kept is None:
            return self.backward_(block, done.source, done.stats, coef)
        tokens = block.targets, block.row_starts
        return done.kept.backward_(done.source, *tokens, done.stats, done.logps, coef, *self.head.transform)

    def evaluate_with_gradient(self, block: Block, workspace: Any, coef: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n,) and the gradient (r, V) for coefficients that are known beforehand."""
        direct = self.backend.row_gradient_
        if self.kept is None and direct is not None and direct.takes(workspace):
            logits, dtype = self.compute_logits(block, workspace), self.hidden.dtype
            _, logps = direct.run_(logits, block.targets, block.row_starts, coef, *self.transform, dtype)
            return logps, narrow_view(logits, dtype)
        done = self.evaluate(block, workspace)
        return done.logps, self.gradient_(block, done, coef)

    def compute_logits(self, block: Block, out: Tensor) -> Tensor:
        """GEMM 1 into the first rows of ``out``; returns them, (r, V)."""
        logits = out[: block.num_rows]
        products.logits(self.backend, self.hidden[block.rows], self.weight, logits)
        return logits

    def forward(self, block: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The one read of the logits: statistics (2, r) and token log-probabilities in the block's order."""
        return self.backend.rows.forward(logits, block.targets, block.row_starts, *self.transform)

    def forward_without_logits(self, block: Block) -> Tensor:
        """Token log-probabilities in the block's order, by the backend's fused linear path."""
        assert self.backend.linear_forward is not None
        tokens = block.targets, block.row_starts
        return self.backend.linear_forward.run(self.hidden[block.rows], self.weight, *tokens, *self.transform)

    def backward_(self, block: Block, logits: Tensor, stats: Tensor, coef: Tensor) -> Tensor:
        """The gradient (r, V) of ``sum_n coef_n * logp_n``, in the dtype of hidden, over the logits."""
        dtype = self.hidden.dtype
        self.backend.rows.backward_(logits, block.targets, block.row_starts, stats, coef, *self.transform, dtype)
        return narrow_view(logits, dtype)
