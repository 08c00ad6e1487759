"""The plan of a call: which groups share a chunk of logits, and how much memory that takes."""

from __future__ import annotations

from dataclasses import dataclass

from cpo_kernels.kernels.device import DEFAULT_LOGITS_BYTES

from .tokens import Tokens


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
    """The chunks and bytes of a call; returned by :func:`cpo_kernels.plan`.

    Attributes:
        chunks: the chunks, in order.
        num_rows: rows that enter the GEMMs (rows that predict nothing do not).
        num_tokens: tokens that count.
        logits_bytes: size of the one logits buffer.
        accumulator_bytes: memory beyond a half-precision gradient of the weight when it is summed over several chunks:
            for its low halves, or on a GPU for a float32 sum.
        workspace_bytes: memory of the backend's products beyond their operands, and of filters beyond the logits.
        gathered_bytes: a copy of the hidden states, or of their gradient, of one chunk, where rows that predict
            nothing lie between those that do, or a filter may leave rows out.
        budget_bytes: the budget that was asked for. The default is 256 MiB for logits (on a GPU up to 2 GiB, by
            its memory; a row, if that is more) plus the accumulator and the workspace.
        gemms: products of (rows, V, H) over all rows: 3 for a trainable head, 2 for a frozen one, 1 without
            gradients, up to one more for the share of rows whose logits are recomputed.
        note: why logits are recomputed or the budget is exceeded, or "".
        buffers: blocks of rows whose logits are held at once.
    """

    chunks: tuple[Chunk, ...]
    num_rows: int
    num_tokens: int
    logits_bytes: int
    accumulator_bytes: int
    workspace_bytes: int
    gathered_bytes: int
    budget_bytes: int
    gemms: float
    note: str = ""
    buffers: int = 1

    @property
    def rows_held(self) -> int:
        """Rows of logits held at once."""
        return max(min(chunk.num_rows, self.buffers * chunk.rows_per_block) for chunk in self.chunks)

    @property
    def bytes(self) -> int:
        """Bytes held at the peak beyond inputs and gradients, index tensors of the tokens aside."""
        return self.logits_bytes + self.accumulator_bytes + self.workspace_bytes + self.gathered_bytes


def make_plan(
    tokens: Tokens,
    *,
    row_bytes: int,
    needs: tuple[bool, bool, bool],
    max_logits_bytes: int | None,
    default_bytes: int = DEFAULT_LOGITS_BYTES,
    accumulator_bytes: int = 0,
    gathered_row_bytes: int = 0,
    workspace_bytes: int = 0,
    whole_groups: bool = True,
    waits: bool = True,
    buffers: int = 1,
    block_rows: int | None = None,
) -> Plan:
    """Plan whole groups into chunks of at most ``max_logits_bytes`` of logits.

    The accumulator of grad_weight, gathered rows and the workspace of the products count towards an explicit budget if
    they take at most half of it and the largest group fits beside them; otherwise they are added to it.

    Args:
        tokens: the tokens that count.
        row_bytes: what a row takes in the logits buffer.
        needs: whether hidden, weight and bias need gradients.
        max_logits_bytes: the budget; None for the default.
        default_bytes: the default for logits.
        accumulator_bytes: what the gradient of the weight takes besides itself if there are several chunks.
        gathered_row_bytes: bytes of a row of hidden where rows must be gathered for the products, else 0.
        workspace_bytes: memory of the backend's products beyond their operands, and of filters beyond the logits.
        whole_groups: whether the rows of a group must be held together to be computed only once.
        waits: whether gradients wait for the coefficients of a whole chunk, so that logits may be recomputed; if none
            does, all groups are one chunk.
        buffers: blocks of rows whose logits are held at once, if they fit.
        block_rows: the most rows of a block; None for what fits.

    Raises:
        ValueError: a budget that does not hold the logits of one row.
    """
    waits = waits and any(needs)
    total = (tokens if waits else tokens.as_one_group()).num_rows
    accumulator = accumulator_bytes if needs[1] else 0
    default = max(default_bytes, row_bytes)
    overhead = workspace_bytes + default * gathered_row_bytes // row_bytes
    asked = max_logits_bytes or default + accumulator + overhead
    if asked < row_bytes:
        raise ValueError(f"max_logits_bytes={asked} does not hold one row of logits, which takes {row_bytes} bytes")
    largest = max(tokens.rows_per_group, default=0) if whole_groups and waits else 1

    def left_for_logits(overhead: int) -> int:
        fits = asked - overhead >= max(largest * row_bytes, asked // 2)
        return asked - overhead if fits or max_logits_bytes is None else asked

    overhead = workspace_bytes + asked * gathered_row_bytes // (row_bytes + gathered_row_bytes)
    # A single chunk needs no accumulator, so its logits may take the accumulator's memory too.
    if total * row_bytes <= left_for_logits(overhead):
        accumulator = 0
    budget = left_for_logits(overhead + accumulator)
    notes = []
    rows_per_chunk = budget // row_bytes
    buffers = buffers if rows_per_chunk >= buffers else 1
    at_once = min(rows_per_chunk // buffers, block_rows or rows_per_chunk)
    all_groups = [(range(len(tokens.rows_per_group)), total)]
    chunks = tuple(
        Chunk(groups, rows, even_share(rows, at_once), recomputed=waits and rows > rows_per_chunk)
        for groups, rows in (fill_chunks(tokens.rows_per_group, rows_per_chunk) if waits else all_groups)
    )
    recomputed = sum(chunk.num_rows for chunk in chunks if chunk.recomputed)
    if recomputed:
        notes.append(f"a group of {largest} rows does not fit the budget of {rows_per_chunk}: logits are recomputed")
    held = max(min(chunk.num_rows, buffers * chunk.rows_per_block) for chunk in chunks)
    gathered = held * gathered_row_bytes
    on_top = held * row_bytes + accumulator + workspace_bytes + gathered - asked
    if on_top > 0:
        notes.append(
            f"{on_top} bytes come on top of the budget, with {accumulator} for the accumulator of grad_weight, "
            f"{workspace_bytes} for products and filters and {gathered} for rows that are gathered"
        )
    return Plan(
        chunks=chunks,
        num_rows=total,
        num_tokens=tokens.targets.numel(),
        logits_bytes=held * row_bytes,
        accumulator_bytes=accumulator,
        workspace_bytes=workspace_bytes,
        gathered_bytes=gathered,
        budget_bytes=asked,
        gemms=1 + needs[0] + needs[1] + (recomputed / total if recomputed else 0.0),
        note="; ".join(notes),
        buffers=buffers,
    )


def even_share(total: int, limit: int) -> int:
    """Return the size, at least 1, of the fewest equal parts of at most ``limit`` that make up ``total``."""
    parts = max(1, -(-total // limit))
    return max(1, -(-total // parts))


def fill_chunks(rows_per_group: list[int], rows_per_chunk: int) -> list[tuple[range, int]]:
    """Split groups into runs, with their rows, filled evenly: a last run of few rows would waste a pass over V x H."""
    fair_share = even_share(sum(rows_per_group), rows_per_chunk)
    chunks: list[tuple[range, int]] = []
    start, rows = 0, 0
    for group, more in enumerate(rows_per_group):
        if rows and (rows + more > rows_per_chunk or rows >= fair_share):
            chunks.append((range(start, group), rows))
            start, rows = group, 0
        rows += more
    chunks.append((range(start, len(rows_per_group)), rows))
    return chunks
