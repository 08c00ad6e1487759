"""The engine: whole groups at a time, three GEMMs in one pass over the logits. Backends differ in the rows only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gemm
from .backends import Backend, KeptLinear
from .filtering import GradientFilter, Kept, mean_row
from .head import Head
from .layout import Block, Tokens, split_blocks
from .planning import Plan
from .reference import accumulate_dtype, narrow_view


class ChunkTokens(NamedTuple):
    """The slots of some whole groups: n of them in s segments.

    Attributes:
        groups: indices of the groups.
        segments: their segments, among all.
        starts: (s + 1,) prefix count of the slots of each segment, from anywhere.
        slots_per_segment: slots of every segment, where they all have as many and the host knows it.
        num_slots: n.
    """

    groups: range
    segments: slice
    starts: Tensor
    slots_per_segment: int | None
    num_slots: int

    @property
    def slots(self) -> Tensor:
        """(s,) slots of each segment."""
        return self.starts.diff()


class Evaluated(NamedTuple):
    """The forward of a block of r rows and n tokens.

    Attributes:
        stats: (2, r), maximum and log-sum-exp minus maximum of each row.
        logps: (n,) in the block's order.
        source: what the gradient is made of, and written over: the logits (r, V), or what the backend kept in their
            place.
    """

    stats: Tensor
    logps: Tensor
    source: Any


# Takes the log-probabilities (n,) of a chunk's slots; returns the sums (s,) of its segments and, if asked for (the last
# argument), dloss / dlogp (n,) of each slot.
Contrast = Callable[[Tensor, ChunkTokens, bool], tuple[Tensor, Tensor | None]]
# The same coefficients of a loss for which they do not depend on the log-probabilities.
Coefficients = Callable[[ChunkTokens], Tensor]


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

    def workspace(self, rows: int) -> Any:
        """Memory for the logits of so many rows, (rows, V), or for what is kept in their place."""
        vocab = self.weight.shape[0]
        if self.kept is not None:
            return self.kept.room(rows, self.hidden, vocab)
        width = gemm.row_width(vocab, self.hidden.device)
        return self.hidden.new_empty((rows, width), dtype=self.logits_dtype)[:, :vocab]

    def evaluate(self, block: Block, workspace: Any, *, keep: bool = True) -> Evaluated:
        """The forward of a block; ``keep`` says that :meth:`gradient_` is to follow before the next one."""
        if self.kept is not None:
            hidden, head = self.hidden[block.rows], (self.bias, *self.head.transform)
            space = workspace if keep else None
            return Evaluated(*self.kept.forward(space, hidden, self.weight, block.targets, block.row_starts, *head))
        logits = self.compute_logits(block, workspace)
        return Evaluated(*self.forward(block, logits), logits)

    def evaluate_again(self, block: Block, workspace: Any, before: Evaluated) -> Evaluated:
        """What the gradient is made of, where the memory of the first forward has been used since."""
        if self.kept is not None:
            return self.evaluate(block, workspace)
        return before._replace(source=self.compute_logits(block, workspace))

    def gradient_(self, block: Block, done: Evaluated, coef: Tensor) -> Tensor:
        """The gradient (r, V) of ``sum_n coef_n * logp_n``, in the dtype of hidden, over its source."""
        if self.kept is None:
            return self.backward_(block, done.source, done.stats, coef)
        tokens = block.targets, block.row_starts
        return self.kept.backward_(done.source, *tokens, done.stats, done.logps, coef, *self.head.transform)

    def evaluate_with_gradient(self, block: Block, workspace: Any, coef: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (n,) and the gradient (r, V) for coefficients that are known beforehand."""
        direct = self.backend.row_gradient_
        if self.kept is None and direct is not None and direct.takes(workspace):
            logits, head = self.compute_logits(block, workspace), (self.bias, *self.head.transform)
            tokens, dtype = (block.targets, block.row_starts), self.hidden.dtype
            _, logps = direct.run_(logits, *tokens, coef, *head, dtype)
            return logps, narrow_view(logits, dtype)
        done = self.evaluate(block, workspace)
        return done.logps, self.gradient_(block, done, coef)

    def compute_logits(self, block: Block, out: Tensor) -> Tensor:
        """GEMM 1 into the first rows of ``out``; returns them, (r, V)."""
        logits = out[: block.num_rows]
        gemm.logits(self.backend, self.hidden[block.rows], self.weight, logits)
        return logits

    def forward(self, block: Block, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The one read of the logits: statistics (2, r) and token log-probabilities in the block's order."""
        return self.backend.rows.forward(logits, block.targets, block.row_starts, self.bias, *self.head.transform)

    def forward_without_logits(self, block: Block) -> Tensor:
        """Token log-probabilities in the block's order, by the backend's fused linear path."""
        assert self.backend.linear_forward is not None
        rows = self.hidden[block.rows]
        head = (self.bias, *self.head.transform)
        return self.backend.linear_forward(rows, self.weight, block.targets, block.row_starts, *head)

    def backward_(self, block: Block, logits: Tensor, stats: Tensor, coef: Tensor) -> Tensor:
        """The gradient (r, V) of ``sum_n coef_n * logp_n``, in the dtype of hidden, over the logits."""
        head, dtype = (self.bias, *self.head.transform), self.hidden.dtype
        self.backend.rows.backward_(logits, block.targets, block.row_starts, stats, coef, *head, dtype)
        return narrow_view(logits, dtype)


class Gradients:
    """Gradients of (hidden, weight, bias), summed over blocks; None where not needed.

    ``rows_once``: no row is in two blocks. A row that predicts several tokens may serve several chunks.
    """

    def __init__(self, linear: LinearHead, needs: tuple[bool, bool, bool], *, num_blocks: int, rows_once: bool) -> None:
        self.linear = linear
        self.rows_once = rows_once
        self.hidden = torch.zeros_like(linear.hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.trained = slice(linear.head.frozen_columns, None)
        self.weight = gemm.WeightGrad(linear.backend, linear.weight[:, self.trained], num_blocks) if needs[1] else None
        self.bias = None
        if needs[2] and linear.bias is not None:
            self.bias = torch.zeros_like(linear.bias, dtype=accumulate_dtype(linear.bias.dtype))

    def add(self, kept: Kept) -> None:
        """GEMMs 2 and 3 of one block."""
        if kept.columns is not None:
            self.add_columns(kept, kept.columns)
            return
        linear, dlogits, rows = self.linear, kept.dlogits, kept.rows
        if self.hidden is not None:
            gemm.hidden_grad(linear.backend, dlogits, linear.weight, self.hidden, rows, once=self.rows_once)
        if self.weight is not None:
            hidden = linear.hidden[rows]
            if kept.absent is not None:
                # 0 * NaN is NaN, and padding may hold it.
                hidden = hidden.masked_fill(kept.absent[:, None], 0.0)
            self.weight.add(dlogits, hidden[:, self.trained])
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)

    def add_columns(self, kept: Kept, columns: Tensor) -> None:
        """The same where only some ``columns`` (c,) of the vocabulary have a gradient, and the others their sum."""
        linear, dlogits, rows, shares, spare = self.linear, kept.dlogits, kept.rows, kept.shares, kept.spare
        assert spare is not None and shares is not None
        if self.hidden is not None:
            weight = spare[: dlogits.shape[1] * linear.weight.shape[1]].view(dlogits.shape[1], -1)
            torch.index_select(linear.weight, 0, columns, out=weight[:-1])
            weight[-1] = mean_row(linear.weight, shares)
            gemm.hidden_grad(linear.backend, dlogits, weight, self.hidden, rows, once=self.rows_once)
        if self.weight is not None:
            self.weight.add_columns(dlogits, linear.hidden[rows, self.trained], columns, shares, spare)
        if self.bias is not None:
            sums = dlogits.sum(0, dtype=self.bias.dtype)
            self.bias.index_add_(0, columns, sums[:-1])
            self.bias += shares.to(self.bias.dtype) * sums[-1]

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(grad_hidden, grad_weight, grad_bias) in the dtypes of what they belong to."""
        bias = None if self.bias is None or self.linear.bias is None else self.bias.to(self.linear.bias.dtype)
        return self.hidden, self.weight_result(), bias

    def weight_result(self) -> Tensor | None:
        """The gradient (V, H) of the weight, 0 in its frozen columns; None where not needed."""
        if self.weight is None or not self.trained.start:
            return None if self.weight is None else self.weight.result()
        whole = torch.zeros_like(self.linear.weight, memory_format=torch.contiguous_format)
        whole[:, self.trained] = self.weight.result()
        return whole


def run(
    linear: LinearHead,
    tokens: Tokens,
    plan: Plan,
    needs: tuple[bool, bool, bool],
    contrast: Contrast,
    filters: GradientFilter | None = None,
    known: Coefficients | None = None,
) -> tuple[Tensor, Gradients]:
    """One pass over all chunks: log-likelihood sums (S,) and the gradients that ``needs`` asks for."""
    sums = linear.hidden.new_zeros(tokens.lengths.shape, dtype=accumulate_dtype(linear.logits_dtype))
    num_blocks = sum(-(-c.num_rows // c.rows_per_block) for c in plan.chunks)
    grads = Gradients(linear, needs, num_blocks=num_blocks, rows_once=tokens.one_per_row)
    workspace = linear.workspace(0 if linear.fused_forward else plan.rows_held)
    for chunk in plan.chunks:
        first, last = tokens.group_starts[chunk.groups.start], tokens.group_starts[chunk.groups.stop]
        blocks, part = split_blocks(tokens, first, last, chunk.rows_per_block), chunk_tokens(tokens, chunk.groups)
        logps, evaluated = sums.new_zeros(last - first), []
        coef = None if known is None else known(part)
        for block in blocks:
            if linear.fused_forward:
                logps[block.order] = linear.forward_without_logits(block)
            elif coef is not None:
                logps[block.order], dlogits = linear.evaluate_with_gradient(block, workspace, coef[block.order])
                grads.add(Kept(dlogits, block.rows, absent=block.absent))
            else:
                done = linear.evaluate(block, workspace, keep=any(needs) and not chunk.recomputed)
                logps[block.order] = done.logps
                evaluated.append(done)
        sums[part.segments], coef = contrast(logps, part, any(needs) and known is None)
        if coef is None:
            continue
        for block, done in zip(blocks, evaluated, strict=True):
            again = linear.evaluate_again(block, workspace, done) if chunk.recomputed else done
            block_coef = coef[block.order]
            dlogits = linear.gradient_(block, again, block_coef)
            kept: Kept | None = Kept(dlogits, block.rows, absent=block.absent)
            if filters is not None:
                kept = filters.compact(linear.backend, block, dlogits, block_coef)
            if kept is not None:
                grads.add(kept)
    return sums, grads


def chunk_tokens(tokens: Tokens, groups: range) -> ChunkTokens:
    """The slots of some whole groups."""
    segments = slice(tokens.segment_starts[groups.start], tokens.segment_starts[groups.stop])
    starts = tokens.token_starts[segments.start : segments.stop + 1]
    slots = tokens.group_starts[groups.stop] - tokens.group_starts[groups.start]
    return ChunkTokens(groups, segments, starts, tokens.slots_per_segment, slots)


def segment_sums(logps: Tensor, part: ChunkTokens) -> Tensor:
    """Sums (s,) of consecutive slots, accumulated in float64: a thousand terms of -10 lose nothing."""
    if part.slots_per_segment is not None:
        return logps.view(-1, part.slots_per_segment).sum(-1, dtype=torch.float64).to(logps.dtype)
    total = torch.segment_reduce(logps.double(), "sum", lengths=part.slots, unsafe=True, initial=0)
    return total.to(logps.dtype)
