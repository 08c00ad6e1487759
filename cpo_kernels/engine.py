"""The engine: whole groups at a time, three GEMMs in one pass over the logits. Backends differ in the rows only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import gemm
from .backends import Backend
from .head import Head
from .layout import Block, Tokens, split_blocks
from .planning import Plan
from .reference import accumulate_dtype

# Takes the log-likelihoods of some whole groups and their indices, returns dloss / dlogp of each of their segments.
Coefficients = Callable[[Tensor, range], Tensor]


@dataclass(frozen=True)
class LinearHead:
    """The head of a call: hidden (R, H), weight (V, H), bias (V,) or None, and how they become log-probabilities."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    head: Head
    backend: Backend
    logits_dtype: torch.dtype

    def workspace(self, rows: int) -> Tensor:
        """The logits buffer, (rows, V)."""
        return self.hidden.new_empty((rows, self.weight.shape[0]), dtype=self.logits_dtype)

    def compute_logits(self, block: Block, out: Tensor) -> Tensor:
        """GEMM 1 into the first rows of ``out``; returns them, (r, V)."""
        logits = out[: block.num_rows]
        gemm.logits(self.backend, self.hidden[block.rows], self.weight, logits)
        return logits

    def forward(self, block: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The one read of the logits: statistics (2, r) and token log-probabilities in the block's order."""
        return self.backend.row_forward(logits, block.targets, block.row_starts, self.bias, *self.head.transform)

    def backward_(self, block: Block, logits: Tensor, stats: Tensor, coef: Tensor) -> None:
        """The gradient of ``sum_n coef_n * logp_n`` over the logits, in place."""
        self.backend.row_backward_(
            logits, block.targets, block.row_starts, stats, coef, self.bias, *self.head.transform
        )


class Gradients:
    """Gradients of (hidden, weight, bias), summed over blocks; None where not needed.

    ``rows_once``: no row is in two blocks. A row that predicts several tokens may serve several chunks.
    """

    def __init__(self, linear: LinearHead, needs: tuple[bool, bool, bool], *, num_blocks: int, rows_once: bool) -> None:
        self.linear = linear
        self.rows_once = rows_once
        self.hidden = torch.zeros_like(linear.hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.weight = gemm.WeightGrad(linear.backend, linear.weight, num_blocks) if needs[1] else None
        self.bias = None
        if needs[2] and linear.bias is not None:
            self.bias = torch.zeros_like(linear.bias, dtype=accumulate_dtype(linear.bias.dtype))

    def add(self, block: Block, dlogits: Tensor) -> None:
        """GEMMs 2 and 3 of one block."""
        if self.hidden is not None:
            linear = self.linear
            gemm.hidden_grad(linear.backend, dlogits, linear.weight, self.hidden, block.rows, once=self.rows_once)
        if self.weight is not None:
            self.weight.add(dlogits, self.linear.hidden[block.rows])
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(grad_hidden, grad_weight, grad_bias) in the dtypes of what they belong to."""
        bias = None if self.bias is None or self.linear.bias is None else self.bias.to(self.linear.bias.dtype)
        return self.hidden, None if self.weight is None else self.weight.result(), bias


def run(
    linear: LinearHead, tokens: Tokens, plan: Plan, needs: tuple[bool, bool, bool], coefficients: Coefficients
) -> tuple[Tensor, Gradients]:
    """One pass over all chunks: log-likelihood sums (S,) and the gradients that ``needs`` asks for."""
    sums = linear.hidden.new_zeros(tokens.lengths.shape, dtype=accumulate_dtype(linear.logits_dtype))
    num_blocks = sum(-(-c.num_rows // c.rows_per_block) for c in plan.chunks)
    grads = Gradients(linear, needs, num_blocks=num_blocks, rows_once=tokens.one_per_row)
    buffer = linear.workspace(max(min(c.num_rows, c.rows_per_block) for c in plan.chunks))
    for chunk in plan.chunks:
        first, last = tokens.group_starts[chunk.groups.start], tokens.group_starts[chunk.groups.stop]
        blocks = split_blocks(tokens, first, last, chunk.rows_per_block)
        logps, stats = sums.new_zeros(last - first), []
        for block in blocks:
            logits = linear.compute_logits(block, buffer)
            block_stats, logps[block.order] = linear.forward(block, logits)
            stats.append(block_stats)
        segments = slice(tokens.segment_starts[chunk.groups.start], tokens.segment_starts[chunk.groups.stop])
        sums[segments] = segment_sums(logps, tokens.lengths[segments])
        if not any(needs):
            continue
        coef = coefficients(sums[segments], chunk.groups).repeat_interleave(tokens.lengths[segments])
        for block, block_stats in zip(blocks, stats, strict=True):
            if chunk.recomputed:
                logits = linear.compute_logits(block, buffer)
            linear.backward_(block, logits, block_stats, coef[block.order])
            grads.add(block, logits)
    return sums, grads


def segment_sums(logps: Tensor, lengths: Tensor) -> Tensor:
    """Sums (S,) of consecutive tokens, accumulated in float64: a thousand terms of -10 lose nothing."""
    return torch.segment_reduce(logps.double(), "sum", lengths=lengths, unsafe=True, initial=0).to(logps.dtype)
