"""Which token is predicted by which row and belongs to which candidate of which prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from .reference import IGNORE_INDEX


@dataclass(frozen=True)
class CandidateLayout:
    """The packed form: N tokens in S segments (candidates) of G groups (prompts).

    Args:
        cu_tokens: (S + 1,) host integers; the tokens of segment s are ``cu_tokens[s]:cu_tokens[s + 1]``. A segment
            without tokens is an absent candidate.
        cu_groups: (G + 1,) host integers; the segments of group g are ``cu_groups[g]:cu_groups[g + 1]``.
        rows: (N,) int64; token n is predicted by ``hidden[rows[n]]``, and a row may predict several tokens.
            Default: ``rows[n] = n``.
        ranks: (S,) integers, 0 is best, equal ranks express no preference. Default: the first candidate of every
            group is best and the others are equal.

    Raises:
        ValueError: boundaries that do not start at 0 or that decrease, no group, or a group without segments.
    """

    cu_tokens: Sequence[int]
    cu_groups: Sequence[int]
    rows: Tensor | None = None
    ranks: Sequence[int] | Tensor | None = None

    def __post_init__(self) -> None:
        check_boundaries("cu_tokens", self.cu_tokens)
        check_boundaries("cu_groups", self.cu_groups)
        if self.num_groups == 0:
            raise ValueError(f"cu_groups must bound at least one group, got {list(self.cu_groups)}")
        if self.cu_groups[-1] != len(self.cu_tokens) - 1:
            raise ValueError(
                f"cu_groups must end at the number of segments, {len(self.cu_tokens) - 1}, got {self.cu_groups[-1]}"
            )
        for group, (start, end) in enumerate(pairwise(self.cu_groups)):
            if start == end:
                raise ValueError(f"group {group} is empty: every group needs at least one candidate")
        if self.rows is not None and self.rows.shape != (self.num_tokens,):
            raise ValueError(f"rows must have shape ({self.num_tokens},), got {tuple(self.rows.shape)}")
        if self.rows is not None and self.rows.dtype != torch.int64:
            raise ValueError(f"rows must be int64, got {self.rows.dtype}")

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.cu_tokens[-1]

    @property
    def num_segments(self) -> int:
        """S."""
        return len(self.cu_tokens) - 1

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.cu_groups) - 1


def check_boundaries(name: str, boundaries: Sequence[int]) -> None:
    """Raise ``ValueError`` unless ``boundaries`` starts at 0 and never decreases."""
    if len(boundaries) == 0 or boundaries[0] != 0:
        raise ValueError(f"{name} must start with 0, got {list(boundaries[:3])}")
    for index, (start, end) in enumerate(pairwise(boundaries)):
        if end < start:
            raise ValueError(f"{name} must not decrease, got {start} before {end} at index {index + 1}")


@dataclass
class Tokens:
    """The tokens that count (target not -100), in segment order: n of them, over at most R rows.

    Attributes:
        rows: (n,) row of ``hidden`` that predicts each token.
        targets: (n,) its vocabulary entry.
        positions: (n,) its index among all N tokens.
        lengths: (S,) tokens of each segment.
        group_starts: (G + 1,) host integers, prefix count of the tokens of each group.
        segment_starts: (G + 1,) host integers, prefix count of the segments of each group.
        one_per_row: whether every row predicts at most one token.
        rows_per_group: (G,) host integers, rows that each group needs.
    """

    rows: Tensor
    targets: Tensor
    positions: Tensor
    lengths: Tensor
    group_starts: list[int]
    segment_starts: Sequence[int]
    one_per_row: bool
    rows_per_group: list[int]

    def as_one_group(self) -> Tokens:
        """The same tokens without boundaries between groups, for calls whose chunks need none."""
        rows = self.targets.numel() if self.one_per_row else self.rows.unique().numel()
        return replace(self, rows_per_group=[rows])

    @property
    def num_rows(self) -> int:
        """Rows that enter a GEMM, counted once per group that they serve."""
        return sum(self.rows_per_group)


def find_tokens(
    targets: Tensor, num_rows: int, vocab: int, rows: Tensor | None, cu_tokens: Sequence[int], cu_groups: Sequence[int]
) -> Tokens:
    """The tokens that count, from targets (N,); see :class:`CandidateLayout` for the other arguments.

    Raises:
        ValueError: a target outside [0, V) other than -100, or a row outside [0, R); the message names the first.
    """
    present = targets != IGNORE_INDEX
    check_range("target", targets, present, vocab, f"[0, {vocab}) or {IGNORE_INDEX}")
    positions = present.nonzero().squeeze(1)
    if rows is not None:
        check_range("row", rows, present, num_rows, f"[0, {num_rows})")
    token_rows = positions if rows is None else rows[positions]
    counted = torch.cat([present.new_zeros(1, dtype=torch.int64), present.cumsum(0)])
    starts = torch.tensor([cu_tokens[s] for s in cu_groups], device=targets.device)
    group_starts = counted[starts]
    one_per_row = rows is None or token_rows.unique().numel() == token_rows.numel()
    sizes = group_starts.diff() if one_per_row else distinct_rows(token_rows, group_starts.diff(), num_rows)
    return Tokens(
        rows=token_rows,
        targets=targets[positions],
        positions=positions,
        lengths=counted[torch.tensor(cu_tokens, device=targets.device)].diff(),
        group_starts=group_starts.tolist(),
        segment_starts=cu_groups,
        one_per_row=one_per_row,
        rows_per_group=sizes.tolist(),
    )


def distinct_rows(rows: Tensor, sizes: Tensor, num_rows: int) -> Tensor:
    """How many different rows the tokens of each group have; rows (n,), sizes (G,) tokens of each group."""
    groups = torch.repeat_interleave(torch.arange(sizes.numel(), device=rows.device), sizes)
    pairs = torch.unique(groups * num_rows + rows)
    return torch.bincount(pairs // num_rows, minlength=sizes.numel())


def check_range(name: str, values: Tensor, present: Tensor, end: int, expected: str) -> None:
    """Raise ``ValueError`` naming the first of ``values`` that is present and outside [0, end)."""
    bad = present & ((values < 0) | (values >= end))
    if bad.any():
        token = int(bad.nonzero()[0])
        raise ValueError(f"{name} of token {token} is {int(values[token])}, expected {expected}")


@dataclass
class Block:
    """Rows whose logits are held at once, with their tokens grouped by row.

    Attributes:
        rows: (r,) their indices in ``hidden``, or the slice they fill.
        num_rows: r.
        order: (n,) index, among the chunk's tokens, of each of the block's tokens; None: as they stand.
        row_starts: (r + 1,) prefix count of the tokens of each row; None: one token a row.
        targets: (n,) vocabulary entries, in the block's order.
    """

    rows: Tensor | slice
    num_rows: int
    order: Tensor | slice
    row_starts: Tensor | None
    targets: Tensor


def split_blocks(tokens: Tokens, start: int, end: int, rows_per_block: int) -> list[Block]:
    """Tokens start:end as blocks of at most ``rows_per_block`` rows, each row once."""
    rows, targets = tokens.rows[start:end], tokens.targets[start:end]
    if tokens.one_per_row:
        return [
            Block(as_slice(rows[a:b]), b - a, slice(a, b), None, targets[a:b])
            for a, b in pairwise([*range(0, rows.numel(), rows_per_block), rows.numel()])
        ]
    rows, inverse = torch.unique(rows, return_inverse=True)
    order = torch.argsort(inverse, stable=True)
    row_starts = torch.cat([inverse.new_zeros(1), torch.bincount(inverse, minlength=rows.numel()).cumsum(0)])
    blocks = []
    for a in range(0, rows.numel(), rows_per_block):
        starts = row_starts[a : a + rows_per_block + 1]
        here = order[int(starts[0]) : int(starts[-1])]
        block_rows = rows[a : a + rows_per_block]
        blocks.append(Block(as_slice(block_rows), block_rows.numel(), here, starts - starts[0], targets[here]))
    return blocks


def as_slice(rows: Tensor) -> Tensor | slice:
    """The slice that increasing ``rows`` fill, if they leave no gap: views instead of copies."""
    if rows.numel() == 0:
        return slice(0, 0)
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 != rows.numel() or not bool((rows.diff() == 1).all()):
        return rows
    return slice(first, last + 1)
