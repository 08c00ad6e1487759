"""The engine: whole groups at a time, three GEMMs in one pass over the logits, whatever the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cpo_kernels.kernels.numerics import accumulate_dtype

from . import products
from .filters import GradientFilter, Kept, mean_row
from .head import Forward, LinearHead
from .tokens import Block, Tokens, split_blocks
from .weight_tiles import TiledWeightGrad

if TYPE_CHECKING:
    from .call import Call


class ChunkTokens(NamedTuple):
    """The slots of some whole groups: n of them in s segments.

    Attributes:
        groups: indices of the groups.
        segments: the slice of their segments among all segments of the call.
        starts: (s + 1,) prefix count of the slots of each segment, whose first element need not be 0.
        slots_per_segment: slots of every segment, where all have the same number and the host knows it, or None.
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


class SequenceLoss(Protocol):
    """A loss of the log-likelihoods of sequences, which the loop evaluates chunk by chunk.

    Attributes:
        filters: the filters that leave out small gradients, or None.
    """

    filters: GradientFilter | None

    def check(self) -> None:
        """Raise ``ValueError`` for groups that the loss is not defined for; on a GPU a device assertion may say so."""

    def contrast(self, logps: Tensor, part: ChunkTokens, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Return the sums (s,) of a chunk's segments and, if ``wanted``, dloss / dlogp (n,) of each of its slots.

        ``logps`` (n,) are the log-probabilities of the slots.
        """

    def coefficients(self, part: ChunkTokens) -> Tensor | None:
        """Return dloss / dlogp (n,) of each slot of a chunk, or None where it depends on the log-probabilities."""


class Gradients:
    """Gradients of (hidden, weight, bias), summed over blocks; None where not needed.

    ``rows_once`` says that no row is in two blocks. A row that predicts several tokens may be in several chunks. Where
    the plan has tiles, the gradient of the weight is made of what is kept of all blocks, once their memory is free.
    """

    def __init__(self, linear: LinearHead, call: Call, *, num_blocks: int, rows_once: bool) -> None:
        self.linear, needs, tiles = linear, call.needs, call.plan.tiles
        self.rows_once = rows_once
        self.scaled: Tensor | None = None
        self.hidden = torch.zeros_like(linear.hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.trained = slice(linear.head.frozen_columns, None)
        self.weight = (
            products.WeightGrad(linear.backend, linear.weight[:, self.trained], num_blocks)
            if needs[1] and tiles is None
            else None
        )
        self.tiled = None if tiles is None else TiledWeightGrad(linear, call.tokens, tiles)
        self.bias = None
        if needs[2] and linear.bias is not None:
            self.bias = torch.zeros_like(linear.bias, dtype=accumulate_dtype(linear.bias.dtype))

    def add(self, kept: Kept) -> None:
        """Add what one block gives to the gradients, by GEMMs 2 and 3."""
        if kept.columns is not None:
            self.add_columns(kept, kept.columns)
            return
        linear, dlogits, rows, scale = self.linear, kept.dlogits, kept.rows, kept.scale
        backend, once = linear.backend, self.rows_once
        if self.hidden is not None:
            products.hidden_grad(backend, dlogits, linear.weight, self.hidden, rows, scale, once=once)
        if self.weight is not None:
            hidden = linear.hidden[rows, self.trained]
            if scale is not None and (self.scaled is None or len(self.scaled) < len(hidden)):
                self.scaled = torch.empty_like(hidden)  # for all blocks: of the next ones malloc would keep each
            hidden = products.scaled_hidden(hidden, scale, kept.absent, self.scaled)
            self.weight.add(dlogits, hidden)
        if self.bias is not None:
            products.add_bias_grad(backend, dlogits, scale, self.bias)

    def keep(self, block: Block, forward: Forward, coef: Tensor, first: int) -> None:
        """Keep what tiles need of a block, if there are tiles; ``coef`` (n,) are those of its slots."""
        if self.tiled is not None:
            self.tiled.keep(block, forward, coef, first)

    def add_columns(self, kept: Kept, columns: Tensor) -> None:
        """Add a block of which only ``columns`` (c,) of the vocabulary are kept, and the sum of the other columns."""
        linear, dlogits, rows, shares, spare = self.linear, kept.dlogits, kept.rows, kept.shares, kept.spare
        assert spare is not None and shares is not None
        if self.hidden is not None:
            weight = spare[: dlogits.shape[1] * linear.weight.shape[1]].view(dlogits.shape[1], -1)
            torch.index_select(linear.weight, 0, columns, out=weight[:-1])
            weight[-1] = mean_row(linear.weight, shares)
            products.hidden_grad(linear.backend, dlogits, weight, self.hidden, rows, once=self.rows_once)
        if self.weight is not None:
            self.weight.add_columns(dlogits, linear.hidden[rows, self.trained], columns, shares, spare)
        if self.bias is not None:
            sums = dlogits.sum(0, dtype=self.bias.dtype)
            self.bias.index_add_(0, columns, sums[:-1])
            self.bias += shares.to(self.bias.dtype) * sums[-1]

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (grad_hidden, grad_weight, grad_bias), each in the dtype of its tensor."""
        bias = None if self.bias is None or self.linear.bias is None else self.bias.to(self.linear.bias.dtype)
        return self.hidden, self.weight_result(), bias

    def weight_result(self) -> Tensor | None:
        """Return the gradient (V, H) of the weight, 0 in its frozen columns; None where not needed."""
        if self.tiled is not None:
            grad = self.tiled.result(self.trained)
        elif self.weight is not None:
            grad = self.weight.result()
        else:
            return None
        if not self.trained.start:
            return grad
        whole = torch.zeros_like(self.linear.weight, memory_format=torch.contiguous_format)
        whole[:, self.trained] = grad
        return whole


def run(call: Call, linear: LinearHead, loss: SequenceLoss) -> tuple[Tensor, Gradients]:
    """Pass over all chunks once, and return log-likelihood sums (S,) and the gradients that the call needs.

    The coefficients of a chunk come with its contrast. Gradients that need them wait for it, unless they are known
    before; where only hidden states need a gradient, its rows are built without them, and multiplied at the end.
    """
    num_blocks = sum(-(-c.num_rows // c.rows_per_block) for c in call.plan.chunks)
    grads = Gradients(linear, call, num_blocks=num_blocks, rows_once=call.tokens.one_per_row)
    with linear.workspace(call.plan.rows_held) as workspace:
        sums = add_chunks(call, linear, loss, grads, workspace)
    return sums[0] if len(sums) == 1 else torch.cat(sums), grads


def add_chunks(call: Call, linear: LinearHead, loss: SequenceLoss, grads: Gradients, workspace: Any) -> list[Tensor]:
    """Add all chunks to the gradients, one after the other, and return the sums (s,) of each chunk's segments."""
    tokens, needs_any = call.tokens, any(call.needs)
    dtype = accumulate_dtype(linear.logits_dtype)
    sums, checks = list[Tensor](), [tokens.check, loss.check]  # to be run once the device is busy
    for chunk in call.plan.chunks:
        first, last = tokens.group_starts[chunk.groups.start], tokens.group_starts[chunk.groups.stop]
        blocks, part = split_blocks(tokens, first, last, chunk.rows_per_block), chunk_tokens(tokens, chunk.groups)
        logps, known = linear.hidden.new_empty(last - first, dtype=dtype), None
        waiting = list[tuple[Block, Forward]]()
        if not needs_any:
            linear.log_probabilities(blocks, workspace, logps)
            blocks = []
        for block in blocks:
            forward = linear.forward(block, workspace, keep=not chunk.recomputed)
            run_all(checks)
            logps[block.order] = forward.logps
            known = loss.coefficients(part) if known is None else known
            if call.scales_rows:
                dlogits, scale = linear.unit_gradient_(block, forward)
                grads.add(Kept(dlogits, block.rows, scale=scale))
            elif known is not None:
                grads.keep(block, forward, known[block.order], first)
                grads.add(gradient(linear, block, forward, known[block.order]))
            else:
                waiting.append((block, forward))
        run_all(checks)  # without gradients there was no earlier moment
        of_segments, coef = loss.contrast(logps, part, needs_any and known is None)
        sums.append(of_segments)
        if coef is None:
            continue
        if call.scales_rows and grads.hidden is not None:  # in the one chunk of the call
            linear.backend.scale_rows_(grads.hidden, tokens.device_rows, tokens.targets, coef)
        for block, forward in waiting:
            grads.keep(block, forward, coef[block.order], first)
            done = linear.recompute(block, workspace, forward) if chunk.recomputed else forward
            kept: Kept | None
            kept = whole = gradient(linear, block, done, coef[block.order])
            if loss.filters is not None:
                kept = loss.filters.compact(linear.backend, block, whole.dlogits, coef[block.order])
            if kept is not None:
                grads.add(kept)
    return sums


def run_all(checks: list[Callable[[], None]]) -> None:
    """Run checks, each of which raises ``ValueError`` for what is wrong, and remove them from the list."""
    while checks:
        checks.pop(0)()


def gradient(linear: LinearHead, block: Block, done: Forward, coef: Tensor) -> Kept:
    """Return the gradient of a block for the coefficients (n,) of its slots."""
    dlogits, scale = linear.gradient_(block, done, coef)
    return Kept(dlogits, block.rows, absent=block.absent, scale=scale)


def chunk_tokens(tokens: Tokens, groups: range) -> ChunkTokens:
    """Return the slots of some whole groups."""
    segments = slice(tokens.segment_starts[groups.start], tokens.segment_starts[groups.stop])
    starts = tokens.token_starts[segments.start : segments.stop + 1]
    slots = tokens.group_starts[groups.stop] - tokens.group_starts[groups.start]
    return ChunkTokens(groups, segments, starts, tokens.slots_per_segment, slots)


def segment_sums(logps: Tensor, part: ChunkTokens) -> Tensor:
    """Sum the slots of each segment, (s,), in float64, so that a thousand terms of -10 lose nothing."""
    if part.slots_per_segment is not None:
        return logps.view(-1, part.slots_per_segment).sum(-1, dtype=torch.float64).to(logps.dtype)
    total = torch.segment_reduce(logps.double(), "sum", lengths=part.slots, unsafe=True, initial=0)
    return total.to(logps.dtype)
