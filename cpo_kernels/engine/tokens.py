"""The tokens of a call that count, and the blocks of rows whose logits are held at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from cpo_kernels.kernels import ops
from cpo_kernels.kernels.device import is_host, to_device
from cpo_kernels.kernels.numerics import IGNORE_INDEX


@dataclass
class Tokens:
    """The tokens of a call in segment order: n slots, over at most R rows.

    Slots are the tokens that count (target not -100). In a dense call, where the host reads no value, all N tokens are
    slots, those that do not count among them.

    Attributes:
        rows: (n,) host integers, row of ``hidden`` that predicts each slot; None in a dense call: slot n is row n.
        device_rows: ``rows`` on the device of ``hidden``.
        targets: (n,) vocabulary entry of each slot, -100 for those of a dense call that do not count.
        positions: (n,) index of each slot among all N tokens; None in a dense call.
        lengths: (S,) tokens of each segment that count.
        host_lengths: ``lengths`` on the host; None in a dense call.
        token_starts: (S + 1,) prefix count of the slots of each segment.
        slots_per_segment: slots of every segment, if all have the same number and the host knows it, or None.
        group_starts: (G + 1,) host integers, prefix count of the slots of each group.
        segment_starts: (G + 1,) host integers, prefix count of the segments of each group.
        one_per_row: whether every row predicts at most one token.
        rows_per_group: (G,) host integers, rows that each group needs.
    """

    rows: Tensor | None
    device_rows: Tensor | None
    targets: Tensor
    positions: Tensor | None
    lengths: Tensor
    host_lengths: Tensor | None
    token_starts: Tensor
    slots_per_segment: int | None
    group_starts: list[int]
    segment_starts: Sequence[int]
    one_per_row: bool
    rows_per_group: list[int]

    def as_one_group(self) -> Tokens:
        """Remove the boundaries between groups, for calls that may cut chunks anywhere."""
        shared = not self.one_per_row and self.rows is not None
        rows = self.rows.unique().numel() if shared and self.rows is not None else self.targets.numel()
        return replace(self, rows_per_group=[rows])

    @property
    def rows_are_copied(self) -> bool:
        """Whether hidden states are copied for a product: gathered, or in a dense call without what padding holds."""
        return self.rows is None or not self.one_per_row or as_slice(self.rows) is None

    def among_all(self, values: Tensor, num_tokens: int) -> Tensor:
        """Return values (n, ...) of the slots as values (N, ...) of all tokens, 0 for tokens that do not count."""
        if self.positions is None:
            return values
        return values.new_zeros((num_tokens, *values.shape[1:])).index_copy_(0, self.positions, values)

    def of_slots(self, values: Tensor) -> Tensor:
        """Return the values (n, ...) of the slots from values (N, ...) of all tokens."""
        return values if self.positions is None else values[self.positions]

    @property
    def num_rows(self) -> int:
        """Rows that enter a GEMM, counted once per group that they serve."""
        return sum(self.rows_per_group)


def find_tokens(
    targets: Tensor, num_rows: int, vocab: int, rows: Tensor | None, cu_tokens: Sequence[int], cu_groups: Sequence[int]
) -> Tokens:
    """Find the tokens that count from targets (N,); :class:`CandidateLayout` describes the other arguments.

    Indices are computed on the host: a GPU makes one copy to the host, which waits for the device, and a few back.

    Raises:
        ValueError: a target outside [0, V) other than -100, or a row outside [0, R); the message names the first.
    """
    device = targets.device
    if rows is None:
        targets = targets.cpu()
    else:
        targets, rows = torch.stack([targets, rows]).cpu()
    present = targets != IGNORE_INDEX
    check_targets_in(targets, vocab)
    positions = present.nonzero().squeeze(1)
    if rows is not None:
        check_range("row", rows, present, num_rows, f"[0, {num_rows})")
    token_rows = positions if rows is None else rows[positions]
    counted = torch.cat([present.new_zeros(1, dtype=torch.int64), present.cumsum(0)])
    token_starts = counted[torch.tensor(cu_tokens, device="cpu")]
    group_starts = token_starts[torch.tensor(cu_groups, device="cpu")]
    one_per_row = rows is None or token_rows.unique().numel() == token_rows.numel()
    sizes = group_starts.diff() if one_per_row else distinct_rows(token_rows, group_starts.diff(), num_rows)
    lengths = token_starts.diff()
    device_positions = to_device(positions, device)
    return Tokens(
        rows=token_rows,
        device_rows=device_positions if rows is None else to_device(token_rows, device),
        targets=to_device(targets[positions], device),
        positions=device_positions,
        lengths=to_device(lengths, device),
        host_lengths=lengths,
        token_starts=to_device(token_starts, device),
        slots_per_segment=None,
        group_starts=group_starts.tolist(),
        segment_starts=cu_groups,
        one_per_row=one_per_row,
        rows_per_group=sizes.tolist(),
    )


def dense_tokens(targets: Tensor, vocab: int, cu_tokens: Sequence[int], cu_groups: Sequence[int]) -> Tokens:
    """Make the tokens of a dense call, where row n predicts token n, without reading any value on the host.

    Every segment must have the same number of slots. Raises for a target out of range as :func:`check_targets_in` does.
    """
    slots, segments = cu_tokens[1] - cu_tokens[0], len(cu_tokens) - 1
    present = targets != IGNORE_INDEX
    check_targets_in(targets, vocab)
    group_starts = [cu_tokens[s] for s in cu_groups]
    return Tokens(
        rows=None,
        device_rows=None,
        targets=targets,
        positions=None,
        lengths=present.view(segments, slots).sum(-1),
        host_lengths=None,
        token_starts=torch.arange(segments + 1, device=targets.device) * slots,
        slots_per_segment=slots,
        group_starts=group_starts,
        segment_starts=cu_groups,
        one_per_row=True,
        rows_per_group=[end - start for start, end in pairwise(group_starts)],
    )


def distinct_rows(rows: Tensor, sizes: Tensor, num_rows: int) -> Tensor:
    """Count the different rows of the tokens of each group; rows (n,), sizes (G,) tokens of each group."""
    groups = torch.repeat_interleave(torch.arange(sizes.numel(), device="cpu"), sizes)
    pairs = torch.unique(groups * num_rows + rows)
    return torch.bincount(pairs // num_rows, minlength=sizes.numel())


def check_targets_in(targets: Tensor, vocab: int) -> None:
    """Raise ``ValueError`` naming the first target (N,) outside [0, V) other than -100.

    A GPU is checked as by :func:`check_range`; the compiled CUDA kernels also print the target to standard output.
    """
    named = ops.TARGET_CHECKS.get(targets.device.type)
    if named is None or not named(targets, vocab):
        check_range("target", targets, targets != IGNORE_INDEX, vocab, f"[0, {vocab}) or {IGNORE_INDEX}")


def check_range(name: str, values: Tensor, present: Tensor, end: int, expected: str) -> None:
    """Raise ``ValueError`` naming the first of ``values`` that is present and outside [0, end).

    A check on a GPU is not waited for: it is a device assertion, which stops the kernels that follow.
    """
    bad = present & ((values < 0) | (values >= end))
    if not is_host(values.device):
        torch._assert_async(~bad.any(), f"a {name} is out of range, expected {expected}")
    elif bad.any():
        token = int(bad.nonzero()[0])
        raise ValueError(f"{name} of token {token} is {int(values[token])}, expected {expected}")


@dataclass
class Block:
    """Rows whose logits are held at once, with their tokens grouped by row.

    Attributes:
        rows: (r,) indices in ``hidden``, or the slice that they fill.
        num_rows: r.
        order: (n,) index, among the chunk's slots, of each of the block's slots, or the slice that they fill.
        row_starts: (r + 1,) prefix count of the slots of each row; None: one a row.
        host_row_starts: ``row_starts`` on the host.
        targets: (n,) vocabulary entries of the block's slots.
        absent: (r,) bool, rows of a dense call that predict nothing; None: there are none.
    """

    rows: Tensor | slice
    num_rows: int
    order: Tensor | slice
    row_starts: Tensor | None
    host_row_starts: Tensor | None
    targets: Tensor
    absent: Tensor | None = None

    def row_indices(self, device: torch.device) -> Tensor:
        """Return ``rows`` as a tensor of indices."""
        return (
            self.rows if isinstance(self.rows, Tensor) else torch.arange(self.rows.start, self.rows.stop, device=device)
        )


def split_blocks(tokens: Tokens, start: int, end: int, rows_per_block: int) -> list[Block]:
    """Split the slots start:end into blocks of at most ``rows_per_block`` rows, each row in one block."""
    targets = tokens.targets[start:end]
    if tokens.one_per_row:
        bounds = [*range(start, end, rows_per_block), end]
        absent = targets == IGNORE_INDEX if tokens.rows is None else None
        return [
            Block(
                rows=row_slots(tokens, a, b),
                num_rows=b - a,
                order=slice(a - start, b - start),
                row_starts=None,
                host_row_starts=None,
                targets=tokens.targets[a:b],
                absent=None if absent is None else absent[a - start : b - start],
            )
            for a, b in pairwise(bounds)
        ]
    assert tokens.rows is not None  # a dense call has one token a row
    device = targets.device
    rows, inverse = torch.unique(tokens.rows[start:end], return_inverse=True)
    order = torch.argsort(inverse, stable=True)
    row_starts = torch.cat([inverse.new_zeros(1), torch.bincount(inverse, minlength=rows.numel()).cumsum(0)])
    blocks = []
    for a in range(0, rows.numel(), rows_per_block):
        starts = row_starts[a : a + rows_per_block + 1]
        here = to_device(order[int(starts[0]) : int(starts[-1])], device)
        block_rows = rows[a : a + rows_per_block]
        filled = as_slice(block_rows)
        indices = to_device(block_rows, device) if filled is None else filled
        starts = starts - starts[0]
        blocks.append(Block(indices, block_rows.numel(), here, to_device(starts, device), starts, targets[here]))
    return blocks


def row_slots(tokens: Tokens, start: int, end: int) -> Tensor | slice:
    """Return the rows of slots start:end where each has its own: a slice, and so views, if they leave no gap."""
    if tokens.rows is None or tokens.device_rows is None:
        return slice(start, end)
    filled = as_slice(tokens.rows[start:end])
    return tokens.device_rows[start:end] if filled is None else filled


def as_slice(rows: Tensor) -> slice | None:
    """Return the slice that increasing ``rows``, host integers, fill; None if they leave a gap."""
    if rows.numel() == 0:
        return slice(0, 0)
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 != rows.numel() or not bool((rows.diff() == 1).all()):
        return None
    return slice(first, last + 1)
