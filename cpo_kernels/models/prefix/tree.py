"""Groups packed into rows in which the candidates of a prompt share its positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cpo_kernels.options import suggests_arguments

CAPACITIES = (4, 5, 6, 7, 8)  # row capacities to try, in quarters of the longest group


@suggests_arguments
@dataclass
class PrefixTree:
    """Which position of a packed row belongs to which branch of which group.

    Along a row a group is one run: its prompt, then its candidates one after the other.

    Attributes:
        groups: (B, L) int32, a number for each group that no other group of the row has; -1 where padded.
        branches: (B, L) int32, 0 for the prompt and c >= 1 for the c-th candidate of the group; 0 where padded.
        positions: (B, L) int64, the position in prompt and candidate: 0 to P - 1 along a prompt of P tokens, from P
            on along each of its candidates; 0 where padded.
        readers: (B, L) int64, how many candidates read the position: all of its group along a prompt, one along a
            candidate, none where padded. Only the load-balancing loss of a mixture of experts reads them; default:
            one, where not padded.
    """

    groups: Tensor
    branches: Tensor
    positions: Tensor
    readers: Tensor | None = None

    def __post_init__(self) -> None:
        if self.readers is None:
            self.readers = (self.groups >= 0).long()

    def to(self, device: torch.device | str) -> PrefixTree:
        """Copy the tree to a device."""
        return PrefixTree(*(getattr(self, part.name).to(device) for part in fields(self)))


@dataclass
class SharedBatch:
    """A batch packed by :func:`pack_groups`.

    Attributes:
        input_ids: (B, L) int64 on the host, padded at the end.
        tree: the tree of these positions.
        rows: ``rows[g][c][t]`` is the position, of the B * L flattened ones, that predicts token t of candidate c of
            group g; for t = 0 it is the last position of the group's prompt, for every candidate.
    """

    input_ids: Tensor
    tree: PrefixTree
    rows: list[list[list[int]]]


@suggests_arguments
def pack_groups(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[Sequence[int]]],
    *,
    max_row_tokens: int | None = None,
    pad_token_id: int = 0,
) -> SharedBatch:
    """Pack groups into rows: each prompt once, followed by its candidates without their last tokens.

    The last token of a candidate predicts nothing, so it takes no position; a candidate of one token takes none at
    all. Groups go into rows first-fit by decreasing length, so that the result depends on nothing but the arguments.

    Args:
        prompts: token ids of the prompt of each group, at least one.
        completions: ``completions[g][c]``, token ids of candidate c of group g, at least one.
        max_row_tokens: most positions of a row; a longer group, which is never split, raises it to its own length.
            None: the limit, between one and two times the longest group, that leaves the fewest padded positions.
        pad_token_id: token id of padded positions.

    Raises:
        ValueError: no groups, different numbers of prompts and groups, an empty prompt, a group without candidates or
            an empty candidate; the message names it.
    """
    _check_groups(prompts, completions)
    lengths = [len(p) + sum(len(c) - 1 for c in cs) for p, cs in zip(prompts, completions, strict=True)]
    bins = _fill_rows(lengths, max_row_tokens)
    shape = len(bins), max(sum(lengths[g] for g in members) for members in bins)
    input_ids = torch.full(shape, pad_token_id, device="cpu")
    groups, branches = (torch.full(shape, fill, dtype=torch.int32, device="cpu") for fill in (-1, 0))
    positions, readers = (torch.zeros(shape, dtype=torch.int64, device="cpu") for _ in range(2))
    rows: list[list[list[int]]] = [[] for _ in prompts]
    for b, members in enumerate(bins):
        start = 0
        for g in members:
            stop = start + lengths[g]
            ids, numbers, depths, rows[g] = _lay_out(prompts[g], completions[g], b * shape[1] + start)
            groups[b, start:stop] = g
            for tensor, values in ((input_ids, ids), (branches, numbers), (positions, depths)):
                tensor[b, start:stop] = torch.tensor(values, device="cpu")
            readers[b, start:stop] = 1
            readers[b, start : start + len(prompts[g])] = len(completions[g])
            start = stop
    return SharedBatch(input_ids, PrefixTree(groups, branches, positions, readers), rows)


def _check_groups(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]]) -> None:
    if len(prompts) != len(completions) or not len(prompts):
        raise ValueError(
            f"expected the candidates of at least one prompt, got {len(prompts)} prompts and the candidates of "
            f"{len(completions)}"
        )
    for g, (prompt, candidates) in enumerate(zip(prompts, completions, strict=True)):
        if not len(prompt):
            raise ValueError(f"group {g} has an empty prompt; expected at least one token")
        if not len(candidates):
            raise ValueError(f"group {g} has no candidates; expected at least one")
        for c, candidate in enumerate(candidates):
            if not len(candidate):
                raise ValueError(f"candidate {c} of group {g} is empty; expected at least one token")


def _fill_rows(lengths: Sequence[int], max_row_tokens: int | None) -> list[list[int]]:
    """Choose the groups of each row."""
    longest = max(lengths)
    if max_row_tokens is not None:
        return _first_fit_decreasing(lengths, max(longest, max_row_tokens))
    tried = [_first_fit_decreasing(lengths, longest * quarters // 4) for quarters in CAPACITIES]
    return min(tried, key=lambda bins: len(bins) * max(sum(lengths[g] for g in members) for members in bins))


def _first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    left: list[int] = []
    for g in sorted(range(len(lengths)), key=lambda g: (-lengths[g], g)):
        b = next((b for b, room in enumerate(left) if room >= lengths[g]), len(bins))
        if b == len(bins):
            bins.append([])
            left.append(capacity)
        bins[b].append(g)
        left[b] -= lengths[g]
    return bins


def _lay_out(
    prompt: Sequence[int], candidates: Sequence[Sequence[int]], start: int
) -> tuple[list[int], list[int], list[int], list[list[int]]]:
    """Return ids, branches and positions of a group, and the rows of its candidates' tokens, from ``start`` on."""
    ids, branches, positions = list(prompt), [0] * len(prompt), list(range(len(prompt)))
    rows = []
    for c, candidate in enumerate(candidates, start=1):
        fed = candidate[:-1]
        rows.append([start + len(prompt) - 1, *range(start + len(ids), start + len(ids) + len(fed))])
        ids.extend(fed)
        branches.extend([c] * len(fed))
        positions.extend(range(len(prompt), len(prompt) + len(fed)))
    return ids, branches, positions, rows
