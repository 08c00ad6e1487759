"""The plan: which groups share a chunk of logits, what that takes, and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .layout import Tokens

# Large enough that GEMM 3 amortises its pass over grad_weight (about 1,000 rows of GPT-2's vocabulary in float32).
DEFAULT_LOGITS_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Chunk:
    """Whole groups processed together.

    Attributes:
        groups: their indices.
        num_rows: rows of ``hidden`` that enter the GEMMs.
        rows_per_block: rows of logits held at once.
        recomputed: whether the logits are computed a second time for the gradient.
    """

    groups: range
    num_rows: int
    rows_per_block: int
    recomputed: bool


@dataclass(frozen=True)
class Plan:
    """What a call will do; returned by :func:`cpo_kernels.plan`.

    Attributes:
        chunks: the chunks, in order.
        num_rows: rows that enter the GEMMs (rows that predict nothing do not).
        num_tokens: tokens that count.
        logits_bytes: size of the one logits buffer.
        accumulator_bytes: size of the low halves of grad_weight, kept when a half-precision gradient is summed over
            several chunks.
        budget_bytes: the budget that was asked for, or the default.
        gemms: products of (rows, V, H) over all rows: 3 for a trainable head, 2 for a frozen one, 1 without
            gradients, up to one more for the share of rows whose logits are recomputed.
        note: why logits are recomputed or the budget is passed, or "".
    """

    chunks: tuple[Chunk, ...]
    num_rows: int
    num_tokens: int
    logits_bytes: int
    accumulator_bytes: int
    budget_bytes: int
    gemms: float
    note: str = ""

    @property
    def bytes(self) -> int:
        """Bytes held at the peak beyond inputs and gradients, index tensors of the tokens aside."""
        return self.logits_bytes + self.accumulator_bytes


def make_plan(
    tokens: Tokens,
    vocab: int,
    hidden_size: int,
    *,
    logits_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    needs: tuple[bool, bool, bool],
    max_logits_bytes: int | None,
) -> Plan:
    """Plan whole groups into chunks of at most ``max_logits_bytes`` of logits.

    Args:
        tokens: the tokens that count.
        vocab: V.
        hidden_size: H.
        logits_dtype: dtype of the logits buffer.
        weight_dtype: dtype of the head's weight and of its gradient.
        needs: whether hidden, weight and bias need gradients.
        max_logits_bytes: the budget; None for the default.

    Raises:
        ValueError: a budget that does not hold the logits of one row.
    """
    row_bytes = vocab * logits_dtype.itemsize
    total, needs_grad = tokens.num_rows, any(needs)
    budget = max_logits_bytes or max(DEFAULT_LOGITS_BYTES, row_bytes)
    if budget < row_bytes:
        raise ValueError(f"max_logits_bytes={budget} does not hold one row of logits: V={vocab} takes {row_bytes}")
    largest = max(tokens.rows_per_group, default=0)
    accumulator = vocab * hidden_size * weight_dtype.itemsize if needs[1] and weight_dtype.itemsize < 4 else 0
    notes = []
    if total * row_bytes <= budget:
        accumulator = 0
    elif accumulator and max_logits_bytes is not None:
        # The budget holds both where it can; a budget too small for that is spent on logits.
        if budget - accumulator >= max(largest * row_bytes, budget // 4):
            budget -= accumulator
        else:
            notes.append(f"the low halves of grad_weight ({accumulator} bytes) come on top of the budget")
    rows_per_chunk = budget // row_bytes
    chunks = tuple(
        Chunk(groups, rows, max(1, min(rows, rows_per_chunk)), recomputed=needs_grad and rows > rows_per_chunk)
        for groups, rows in fill_chunks(tokens.rows_per_group, rows_per_chunk)
    )
    recomputed = sum(chunk.num_rows for chunk in chunks if chunk.recomputed)
    if recomputed:
        notes.append(f"a group of {largest} rows does not fit the budget of {rows_per_chunk}: logits are recomputed")
    held = max(min(chunk.num_rows, chunk.rows_per_block) for chunk in chunks)
    return Plan(
        chunks=chunks,
        num_rows=total,
        num_tokens=tokens.targets.numel(),
        logits_bytes=held * row_bytes,
        accumulator_bytes=accumulator,
        budget_bytes=max_logits_bytes or DEFAULT_LOGITS_BYTES,
        gemms=1 + needs[0] + needs[1] + (recomputed / total if recomputed else 0.0),
        note="; ".join(notes),
    )


def fill_chunks(rows_per_group: list[int], rows_per_chunk: int) -> list[tuple[range, int]]:
    """Consecutive groups with their rows, filled evenly: a last chunk of few rows would waste its pass over V x H."""
    num_chunks = max(1, -(-sum(rows_per_group) // rows_per_chunk))
    fair_share = -(-sum(rows_per_group) // num_chunks)
    chunks: list[tuple[range, int]] = []
    start, rows = 0, 0
    for group, more in enumerate(rows_per_group):
        if rows and (rows + more > rows_per_chunk or rows >= fair_share):
            chunks.append((range(start, group), rows))
            start, rows = group, 0
        rows += more
    chunks.append((range(start, len(rows_per_group)), rows))
    return chunks
