"""The tokens of a call that count, and the blocks of rows whose logits are held at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cpo_kernels.kernels import ops
from cpo_kernels.kernels.device import is_host, to_host, upload
from cpo_kernels.kernels.numerics import IGNORE_INDEX


def nothing_left() -> None:
    """Check nothing, where all has been checked."""


@dataclass
class Tokens:
    """The tokens of a call in segment order: n slots, over at most R rows.

    Slots are the tokens that count (target not -100). In a dense call, where the host reads no value, all N tokens are
    slots, those that do not count among them.

    Attributes:
        rows: (n,) int64 on the host, row of ``hidden`` that predicts each slot; None in a dense call: slot n is row n.
        device_rows: ``rows`` on the device of ``hidden``.
        targets: (n,) vocabulary entry of each slot, -100 for those of a dense call that do not count.
        positions: (n,) index of each slot among all N tokens; None in a dense call.
        lengths: (S,) tokens of each segment that count.
        host_lengths: ``lengths`` on the host; None in a dense call on a GPU.
        host_ranks: (S,) the ranks of the call on the host; None without any, and in a dense call on a GPU.
        token_starts: (S + 1,) prefix count of the slots of each segment.
        slots_per_segment: slots of every segment, if all have the same number and the host knows it, or None.
        group_starts: (G + 1,) host integers, prefix count of the slots of each group.
        segment_starts: (G + 1,) host integers, prefix count of the segments of each group.
        one_per_row: whether every row predicts at most one token.
        rows_per_group: (G,) host integers, rows that each group needs.
        check: raises for a target out of range, where the host has not done so; to be called once the device is busy.
    """

    rows: np.ndarray | None
    device_rows: Tensor | None
    targets: Tensor
    positions: Tensor | None
    lengths: Tensor
    host_lengths: Tensor | None
    host_ranks: Tensor | None
    token_starts: Tensor
    slots_per_segment: int | None
    group_starts: list[int]
    segment_starts: Sequence[int]
    one_per_row: bool
    rows_per_group: list[int]
    check: Callable[[], None] = nothing_left

    def as_one_group(self) -> Tokens:
        """Remove the boundaries between groups, for calls that may cut chunks anywhere."""
        shared = not self.one_per_row and self.rows is not None
        rows = np.unique(self.rows).size if shared and self.rows is not None else self.targets.numel()
        return replace(self, rows_per_group=[rows])

    @property
    def rows_are_copied(self) -> bool:
        """Whether hidden states are copied for a product: gathered, or in a dense call without what padding holds."""
        return self.rows is None or not self.one_per_row or as_slice(self.rows) is None

    def among_all(self, values: Tensor, num_tokens: int) -> Tensor:
        """Return values (n, ...) of the slots as values (N, ...) of all tokens, 0 for tokens that do not count."""
        if self.positions is None or self.targets.numel() == num_tokens:
            return values
        return values.new_zeros((num_tokens, *values.shape[1:])).index_copy_(0, self.positions, values)

    def of_slots(self, values: Tensor) -> Tensor:
        """Return the values (n, ...) of the slots from values (N, ...) of all tokens."""
        everything = self.positions is None or self.targets.numel() == values.shape[0]
        return values if everything else values[self.positions]

    @property
    def num_rows(self) -> int:
        """Rows that enter a GEMM, counted once per group that they serve."""
        return sum(self.rows_per_group)


def find_tokens(
    targets: Tensor,
    num_rows: int,
    vocab: int,
    rows: Tensor | None,
    cu_tokens: Sequence[int],
    cu_groups: Sequence[int],
    ranks: Tensor | None = None,
) -> Tokens:
    """Find the tokens that count from targets (N,); :class:`CandidateLayout` describes the other arguments.

    Everything is computed on the host: a GPU makes one copy to the host, which waits for the device, and one back.
    ``ranks`` (S,) only share that copy.

    Raises:
        ValueError: a target outside [0, V) other than -100, or a row outside [0, R); the message names the first.
    """
    device = targets.device
    host_targets, host_rows, host_ranks = to_host(targets, rows, ranks)
    assert host_targets is not None
    present = host_targets != IGNORE_INDEX
    check_range("target", host_targets, present, vocab, f"expected [0, {vocab}) or {IGNORE_INDEX}")
    if host_rows is not None:
        check_range("row", host_rows, present, num_rows, f"expected [0, {num_rows})")
    positions = np.flatnonzero(present)
    token_rows = positions if host_rows is None else host_rows[positions]
    token_starts = prefix_counts(present)[np.asarray(cu_tokens)]
    group_starts = token_starts[np.asarray(cu_groups)]
    one_per_row = host_rows is None or token_rows.size == 0 or np.bincount(token_rows).max() == 1
    sizes = np.diff(group_starts)
    sizes = sizes if one_per_row else distinct_rows(token_rows, sizes, num_rows)
    lengths = np.diff(token_starts)
    arrays = [host_targets[positions], positions, lengths, token_starts]
    if host_rows is not None:
        arrays.append(token_rows)
    on_device = upload(arrays, device)
    return Tokens(
        rows=token_rows,
        device_rows=on_device[1] if host_rows is None else on_device[4],
        targets=on_device[0],
        positions=on_device[1],
        lengths=on_device[2],
        host_lengths=torch.from_numpy(lengths),
        host_ranks=None if host_ranks is None else torch.from_numpy(host_ranks),
        token_starts=on_device[3],
        slots_per_segment=None,
        group_starts=group_starts.tolist(),
        segment_starts=cu_groups,
        one_per_row=one_per_row,
        rows_per_group=sizes.tolist(),
    )


def dense_tokens(
    targets: Tensor, vocab: int, cu_tokens: Sequence[int], cu_groups: Sequence[int], ranks: Tensor | None = None
) -> Tokens:
    """Make the tokens of a dense call, where row n predicts token n, without reading any value on the host.

    Every segment must have the same number of slots.
    """
    slots, segments, host = cu_tokens[1] - cu_tokens[0], len(cu_tokens) - 1, is_host(targets.device)
    group_starts = [cu_tokens[s] for s in cu_groups]
    check = partial(check_targets_in, targets, vocab)
    if host:
        check()
    lengths = (targets != IGNORE_INDEX).view(segments, slots).sum(-1)
    return Tokens(
        rows=None,
        device_rows=None,
        targets=targets,
        positions=None,
        lengths=lengths,
        host_lengths=lengths if host else None,
        host_ranks=ranks if host else None,
        token_starts=torch.arange(0, segments * slots + 1, slots, device=targets.device),
        slots_per_segment=slots,
        group_starts=group_starts,
        segment_starts=cu_groups,
        one_per_row=True,
        rows_per_group=[end - start for start, end in pairwise(group_starts)],
        check=nothing_left if host else check,
    )


def prefix_counts(flags: np.ndarray) -> np.ndarray:
    """Return how many of flags (n,) are set before each place and in all, (n + 1,)."""
    return np.concatenate([[0], np.cumsum(flags)])


def distinct_rows(rows: np.ndarray, sizes: np.ndarray, num_rows: int) -> np.ndarray:
    """Count the different rows of the tokens of each group; rows (n,), sizes (G,) tokens of each group."""
    groups = np.repeat(np.arange(sizes.size), sizes)
    return np.bincount(np.unique(groups * num_rows + rows) // num_rows, minlength=sizes.size)


def check_targets_in(targets: Tensor, vocab: int) -> None:
    """Raise ``ValueError`` naming the first target (N,) outside [0, V) other than -100.

    A check on a GPU is not waited for: it is a device assertion, which stops the kernels that follow. The compiled CUDA
    kernels also print the target to standard output.
    """
    named, expected = ops.TARGET_CHECKS.get(targets.device.type), f"expected [0, {vocab}) or {IGNORE_INDEX}"
    if named is not None and named(targets, vocab):
        return
    bad = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab))
    if not is_host(targets.device):
        torch._assert_async(~bad.any(), f"a target is out of range, {expected}")
    elif bad.any():
        token = int(bad.nonzero()[0])
        raise ValueError(f"target of token {token} is {int(targets[token])}, {expected}")


def check_range(name: str, values: np.ndarray, present: np.ndarray, end: int, expected: str) -> None:
    """Raise ``ValueError`` naming the first of ``values`` (N,) that is present and outside [0, end)."""
    wrong = np.flatnonzero(present & ((values < 0) | (values >= end)))
    if wrong.size:
        raise ValueError(f"{name} of token {wrong[0]} is {values[wrong[0]]}, {expected}")


@dataclass
class Block:
    """Rows whose logits are held at once, with their tokens grouped by row.

    Attributes:
        rows: (r,) indices in ``hidden``, or the slice that they fill.
        num_rows: r.
        order: (n,) index, among the chunk's slots, of each of the block's slots, or the slice that they fill.
        row_starts: (r + 1,) prefix count of the slots of each row; None: one a row.
        host_row_starts: ``row_starts`` on the host, or None.
        targets: (n,) vocabulary entries of the block's slots.
        absent: (r,) bool, rows of a dense call that predict nothing; None: there are none.
    """

    rows: Tensor | slice
    num_rows: int
    order: Tensor | slice
    row_starts: Tensor | None
    host_row_starts: np.ndarray | None
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
    rows, inverse, counts = np.unique(tokens.rows[start:end], return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    row_starts = np.concatenate([[0], np.cumsum(counts)])
    blocks = []
    for a in range(0, rows.size, rows_per_block):
        starts = row_starts[a : a + rows_per_block + 1]
        block_rows, filled = rows[a : a + rows_per_block], as_slice(rows[a : a + rows_per_block])
        arrays = [order[starts[0] : starts[-1]], starts - starts[0]]
        here, on_device, *indices = upload(arrays if filled is not None else [*arrays, block_rows], device)
        place = indices[0] if filled is None else filled
        blocks.append(Block(place, block_rows.size, here, on_device, starts - starts[0], targets[here]))
    return blocks


def row_slots(tokens: Tokens, start: int, end: int) -> Tensor | slice:
    """Return the rows of slots start:end where each has its own: a slice, and so views, if they leave no gap."""
    if tokens.rows is None or tokens.device_rows is None:
        return slice(start, end)
    filled = as_slice(tokens.rows[start:end])
    return tokens.device_rows[start:end] if filled is None else filled


def as_slice(rows: np.ndarray) -> slice | None:
    """Return the slice that increasing ``rows`` (n,) fill; None if they leave a gap."""
    if rows.size == 0:
        return slice(0, 0)
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 != rows.size or not (np.diff(rows) == 1).all():
        return None
    return slice(first, last + 1)
