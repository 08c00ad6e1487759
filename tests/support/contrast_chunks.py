"""Groups of candidates for the tests of the contrast in one launch, and what objective.py makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.objective import make_groups, make_problem
from cpo_kernels.options import Objective


@dataclass
class Chunk:
    """Whole groups: for each candidate (tokens, slots), and everything the launcher takes as tensors."""

    groups: list[list[tuple[int, int]]]
    logps: Tensor
    ref_logps: Tensor | None = None
    ranks: Tensor | None = None

    @property
    def segments(self) -> list[tuple[int, int]]:
        return [segment for group in self.groups for segment in group]

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([tokens for tokens, _ in self.segments], dtype=torch.int64)

    @property
    def slots(self) -> Tensor:
        return torch.tensor([slots for _, slots in self.segments], dtype=torch.int64)

    @property
    def cu_groups(self) -> list[int]:
        return [0, *accumulate(len(group) for group in self.groups)]

    @property
    def token_starts(self) -> Tensor:
        return torch.cat([self.slots.new_zeros(1), self.slots.cumsum(0)])


def token_logps(groups: list[list[tuple[int, int]]], low: float = -6.0) -> Tensor:
    """Draw log-probabilities (n,) between ``low`` and 0; slots without a token come first and hold 0."""
    parts = []
    for tokens, slots in (segment for group in groups for segment in group):
        parts += [torch.zeros(slots - tokens), low * torch.rand(tokens)]
    return torch.cat(parts)


def segment_sums(chunk: Chunk, dtype: torch.dtype) -> Tensor:
    logps = chunk.logps.double()
    return torch.segment_reduce(logps, "sum", lengths=chunk.slots, unsafe=True, initial=0).to(dtype)


def expected(chunk: Chunk, objective: Objective, gain: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute (sums, coef) by objective.py."""
    ref = None if chunk.ref_logps is None else chunk.ref_logps.to(dtype)
    problem = make_problem(
        objective, make_groups(chunk.cu_groups, chunk.lengths.device), chunk.lengths, ref, chunk.ranks
    )
    sums = segment_sums(chunk, dtype)
    return sums, (problem.coefficients(sums) * gain).repeat_interleave(chunk.slots)


def arguments(chunk: Chunk, objective: Objective, gain: float = 1.0) -> dict[str, Any]:
    """Return the arguments of a backend's contrast besides ``logps``."""
    ranks = torch.arange(len(chunk.segments)) if chunk.ranks is None else chunk.ranks
    first = torch.tensor(chunk.cu_groups)[:-1].repeat_interleave(torch.tensor(chunk.cu_groups).diff())
    best = (ranks == first if chunk.ranks is None else ranks == 0) * chunk.lengths
    return {
        "token_starts": chunk.token_starts,
        "segment_starts": torch.tensor(chunk.cu_groups),
        "lengths": chunk.lengths,
        "ref_logps": chunk.ref_logps,
        "ranks": chunk.ranks,
        "beta": objective.beta,
        "margin": objective.margin,
        "label_smoothing": objective.label_smoothing,
        "loss_type": objective.loss_type,
        "length_normalized": objective.length_normalized,
        "contrast_weight": objective.contrast_weight,
        "mle_weight": objective.mle_weight,
        "num_groups": objective.num_groups or len(chunk.groups),
        "num_target_tokens": objective.num_target_tokens or best.sum().clamp(min=1).double(),
        "gain": gain,
        "max_candidates": max(len(group) for group in chunk.groups),
    }


def full(*groups: list[int]) -> list[list[tuple[int, int]]]:
    """Make groups without empty slots, from the lengths of their candidates."""
    return [[(tokens, tokens) for tokens in group] for group in groups]


PAIRS = full([5, 3], [1, 9], [2, 2], [23, 7])
GROUPS = {
    "pairs": PAIRS,
    "one_token": full([1, 1], [1, 1], [1, 1]),
    "five": full([4, 1, 8, 2, 3], [6, 6, 6, 6, 6]),
    "ragged": full([3, 1, 4], [1, 5], [9, 2, 6, 5, 3], [2, 7, 1, 8]),
    "empty_slots": [[(3, 7), (2, 2), (7, 7)], [(1, 9), (8, 9), (4, 9)]],
    "absent": [[(3, 3), (0, 4), (2, 5)], [(2, 2), (4, 4), (0, 0)], [(5, 5), (0, 0), (0, 6)], [(0, 3), (2, 2), (4, 4)]],
}
RANKS = {
    "default": lambda c, size: int(c > 0),
    "ranked": lambda c, size: (2 * c) % size if size % 2 else c,
    "several_positives": lambda c, size: int(c >= size // 2),
    "ties": lambda c, size: (0, 2, 2, 5, 5)[c % 5],
    "best_last": lambda c, size: size - 1 - c,
}


def with_ranks(groups: list[list[tuple[int, int]]], name: str) -> Tensor:
    return torch.tensor([RANKS[name](c, len(group)) for group in groups for c in range(len(group))])


OPTIONS: dict[str, dict[str, Any]] = {
    "margin": {"margin": 0.7, "beta": 2.0},
    "length_normalized": {"length_normalized": True, "beta": 2.5, "margin": 0.5},
    "mle": {"mle_weight": 0.4},
    "mle_only": {"contrast_weight": 0.0, "mle_weight": 1.0},
    "length_normalized_mle": {"length_normalized": True, "mle_weight": 0.4, "contrast_weight": 0.6},
    "denominators": {"num_groups": 17, "num_target_tokens": 301, "mle_weight": 0.2},
}

PAIR_LOSSES: dict[str, dict[str, Any]] = {
    "hinge": {"loss_type": "hinge", "beta": 0.2},
    "ipo": {"loss_type": "ipo", "beta": 0.2},
    "smoothed": {"label_smoothing": 0.1, "beta": 0.4},
    "smoothed_by_length": {"label_smoothing": 0.2, "length_normalized": True, "margin": 0.3, "mle_weight": 0.5},
}


# Which candidates of which group use a forbidden word, in groups of five, three, two and two.
IMPOSSIBLE = {
    "a_negative": [1, 6, 9, 11],
    "all_negatives": [1, 2, 3, 4, 6, 7, 9],
    "the_truth": [0, 5, 8],
    "truth_and_a_negative": [0, 2, 5, 7, 8, 9],
    "all": list(range(12)),
    "middle_and_last": [2, 4, 7],
}


def impossible_chunk(name: str, ranks: str | None, *, reference: bool = False) -> Chunk:
    """Make groups some of whose candidates have a token of log-probability -inf, in the reference too."""
    groups = full([4, 1, 8, 2, 3], [3, 1, 4], [5, 3], [1, 9])
    chunk = Chunk(groups, token_logps(groups), ranks=None if ranks is None else with_ranks(groups, ranks))
    if reference:
        chunk.ref_logps = segment_sums(chunk, torch.float32) + torch.randn(len(chunk.segments))
        chunk.ref_logps[IMPOSSIBLE[name][::2]] = -torch.inf
    chunk.logps[chunk.token_starts[1:][IMPOSSIBLE[name]] - 1] = -torch.inf
    return chunk
