"""One call of a linear head, resolved once: the tokens that count, the backend and the way that run it, its plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from cpo_kernels.kernels import registry
from cpo_kernels.kernels.backend import Backend
from cpo_kernels.kernels.device import default_logits_bytes, is_capturing
from cpo_kernels.kernels.selection import Sizes
from cpo_kernels.options import Head

from . import filters, products
from .head import LinearHead
from .inputs import Inputs
from .plan import Plan, make_plan
from .tokens import Block, Tokens, dense_tokens, find_tokens, split_blocks
from .ways import choose_way

Needs = tuple[bool, bool, bool]
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Call:
    """All of a call but hidden (R, H), weight (V, H) and bias (V,), which autograd tracks.

    Attributes:
        head: the options of the head.
        backend: the kernels that run the call; its row kernels span the processes of a vocabulary-parallel head.
        way: the class that computes log-probabilities from hidden states, and the gradient of the logits.
        logits_dtype: dtype of the logits.
        needs: whether hidden, weight and bias need gradients.
        targets: (N,) int64.
        rows: (N,) int64 or None.
        tokens: the tokens that count.
        plan: the chunks.
        scales_rows: whether the gradient of hidden, the only one, is built without the coefficients of the tokens, each
            of which has a row to itself, and multiplied by them at the end.
    """

    head: Head
    backend: Backend
    way: type[LinearHead]
    logits_dtype: torch.dtype
    needs: Needs
    targets: Tensor
    rows: Tensor | None
    tokens: Tokens
    plan: Plan
    scales_rows: bool

    def bind(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LinearHead:
        """Join the call with its tensors."""
        leaves = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        return self.way(*leaves, self.head, self.backend, self.logits_dtype)

    @property
    def given(self) -> tuple[Tensor, Tensor | None]:
        """The tensors that users gave and may change: targets and rows."""
        return self.targets, self.rows

    def with_given(self, targets: Tensor, rows: Tensor | None) -> Call:
        """Replace targets and rows by other tensors of the same values."""
        dense = self.tokens.rows is None  # otherwise the tokens hold copies of the targets
        tokens = replace(self.tokens, targets=targets) if dense else self.tokens
        return replace(self, targets=targets, rows=rows, tokens=tokens)

    def blocks(self) -> list[Block]:
        """Cut all tokens into blocks of rows within the budget, whatever the groups."""
        return split_blocks(self.tokens, 0, self.tokens.targets.numel(), self.plan.chunks[0].rows_per_block)

    def summed(self, grads: Grads) -> Grads:
        """Sum the gradient of hidden over the processes of a vocabulary-parallel head; the other two are complete."""
        shard = self.head.vocab_shard
        return grads if shard is None else (shard.sum_grad_hidden(grads[0]), *grads[1:])


def resolve(
    inputs: Inputs,
    needs: Needs,
    *,
    whole_groups: bool = True,
    known_coefficients: bool = False,
    ranks: Tensor | None = None,
    way: type[LinearHead] | None = None,
    scratch_bytes: Callable[[int, int, torch.device], int] | None = None,
) -> Call:
    """Decide which backend, way, tokens and plan a call has.

    ``known_coefficients`` says that no coefficient depends on a log-probability, ``whole_groups`` that those of a group
    depend on all its log-probabilities; ``ranks`` (S,) are read on the host together with the targets.
    ``way`` is the one that a caller needs; None for the fastest. ``scratch_bytes(R, V, device)`` is what a caller takes
    to make something of logits (R, V), R rows at a time: of a small budget, fewer.

    Raises:
        ValueError: targets or rows out of range, or a budget that holds no row.
        RuntimeError: a backend that is not available, or a CUDA graph that captures a packed call.
    """
    head, hidden, weight = inputs.head, inputs.hidden, inputs.weight
    logits_dtype = head.logits_dtype or hidden.dtype
    sizes = Sizes(weight.shape[0], logits_dtype, weight.shape[1], hidden.dtype)
    backend = registry.select(head.backend, hidden.device, logits_dtype, sizes)
    if head.vocab_shard is not None:
        backend = backend.with_rows(head.vocab_shard.rows(backend.rows))
    way = way or choose_way(backend, head, hidden, weight, needs)
    tokens = tokens_of(inputs, ranks)
    only_hidden = needs == (True, False, False) and tokens.one_per_row
    scales_rows = only_hidden and not head.filtered and not known_coefficients
    plan, backend = plan_chunks(
        tokens if whole_groups else tokens.as_one_group(),
        inputs,
        backend,
        way,
        needs,
        whole_groups=whole_groups,
        waits=not known_coefficients and not scales_rows,
        scratch_bytes=scratch_bytes,
    )
    return Call(head, backend, way, logits_dtype, needs, inputs.targets, inputs.rows, tokens, plan, scales_rows)


def tokens_of(inputs: Inputs, ranks: Tensor | None) -> Tokens:
    """Find the tokens that count; raises ``ValueError`` for targets or rows out of range."""
    shard = inputs.head.vocab_shard
    vocab = inputs.weight.shape[0] if shard is None else shard.vocab
    boundaries = inputs.cu_tokens, inputs.cu_groups
    if enters_whole(inputs.rows, inputs.cu_tokens, inputs.head):
        return dense_tokens(inputs.targets, vocab, *boundaries, ranks)
    return find_tokens(inputs.targets, inputs.hidden.shape[0], vocab, inputs.rows, *boundaries, ranks)


def enters_whole(rows: Tensor | None, cu_tokens: Sequence[int], head: Head) -> bool:
    """Tell whether every row enters the products, so that the host reads no value of a tensor."""
    capturing = is_capturing()
    padded = rows is None and len({end - start for start, end in pairwise(cu_tokens)}) == 1
    if capturing and not padded:
        raise RuntimeError("a CUDA graph can capture the padded form only, with a segment at least")
    return padded and (capturing or not head.skip_absent_rows)


def plan_chunks(
    tokens: Tokens,
    inputs: Inputs,
    backend: Backend,
    way: type[LinearHead],
    needs: Needs,
    *,
    whole_groups: bool,
    waits: bool,
    scratch_bytes: Callable[[int, int, torch.device], int] | None = None,
) -> tuple[Plan, Backend]:
    """Plan the chunks of a call, and return the backend whose products keep to the plan.

    The last three arguments are those of :func:`make_plan` and :func:`resolve`.
    """
    head, hidden, weight, shard = inputs.head, inputs.hidden, inputs.weight, inputs.head.vocab_shard
    held = weight.shape[0] if shard is None else shard.largest
    filtered = head.filtered and any(needs)
    copied = tokens.rows_are_copied or filtered or (way.scales_hidden and needs[1])
    # The gradient of a row that serves several groups is added to; hidden states that are gathered may be scaled too.
    copies = 1 + (needs[0] and not tokens.one_per_row) + (way.scales_hidden and needs[1] and tokens.rows_are_copied)
    size = tokens.num_rows, held, weight.shape[1], weight.dtype
    beside = filters.scratch_bytes(tokens.num_rows, held, hidden.device) if filtered else 0

    def workspace_with(threads: int | None, rows: int) -> int:
        of_products = backend.gemm_workspace(*size, threads) + beside
        # What is made of logits is made when their product is done.
        return max(of_products, scratch_bytes(rows, held, hidden.device)) if scratch_bytes else of_products

    workspace = workspace_with(None, tokens.num_rows)
    asked = head.max_logits_bytes is not None and shard is None
    default = default_logits_bytes(hidden.device, of_weight=needs[1] or (any(needs) and waits))
    accumulator_bytes = products.accumulator_bytes(weight[:, head.frozen_columns :]) // weight.shape[0] * held
    plan = make_plan(
        tokens,
        row_bytes=way.row_bytes(backend, held, hidden, head.logits_dtype or hidden.dtype),
        needs=needs,
        max_logits_bytes=head.max_logits_bytes,
        default_bytes=default if shard is None else shard.logits_bytes,
        accumulator_bytes=accumulator_bytes,
        gathered_row_bytes=copies * weight.shape[1] * hidden.dtype.itemsize if copied else 0,
        sums_row_bytes=way.sums_row_bytes(backend, held),
        # The workspace depends on a process's threads, and processes that share a head need the same chunks.
        workspace_bytes=workspace if shard is None else 0,
        least_workspace_bytes=workspace_with(1, 1) if asked else None,
        whole_groups=whole_groups,
        waits=waits,
        buffers=way.buffers,
        block_rows=way.block_rows,
        tiled_vocab=held if shard is None and way.keeps_statistics else 0,
        logit_bytes=way.tile_dtype(head.logits_dtype or hidden.dtype).itemsize,
    )
    left_out = needs[1] * head.frozen_columns / weight.shape[1]
    plan = replace(plan, workspace_bytes=plan.workspace_bytes if asked else workspace, gemms=plan.gemms - left_out)
    if plan.workspace_bytes < workspace:
        backend = backend.within(plan.workspace_bytes - beside)
    if not way.holds_logits:
        plan = replace(plan, logits_bytes=0, note="the fused forward holds no logits")
    return plan, backend
