"""Packed layouts, and how their tokens are found, counted and grouped into blocks of rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpo_kernels import CandidateLayout
from cpo_kernels.engine.tokens import as_slice, find_tokens, split_blocks


@st.composite
def packings(draw):
    """Targets with absent tokens, rows (possibly shared, possibly None), and boundaries of segments and groups."""
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=8))
    N, S, V, R = sum(lengths), len(lengths), 7, draw(st.integers(1, 12))
    cu_tokens = [sum(lengths[:s]) for s in range(S + 1)]
    cu_groups = sorted({0, S, *draw(st.lists(st.integers(1, S), max_size=3))})
    targets = draw(st.lists(st.sampled_from([-100, *range(V)]), min_size=N, max_size=N))
    rows = draw(st.none() | st.lists(st.integers(0, R - 1), min_size=N, max_size=N))
    return (
        torch.tensor(targets, dtype=torch.int64),
        None if rows is None else torch.tensor(rows, dtype=torch.int64),
        cu_tokens,
        cu_groups,
        N if rows is None else R,
    )


@given(packings())
@settings(max_examples=200, deadline=None)
def test_tokens_that_count(packing):
    targets, rows, cu_tokens, cu_groups, R = packing
    tokens = find_tokens(targets, R, 7, rows, cu_tokens, cu_groups)
    present = [n for n, target in enumerate(targets.tolist()) if target != -100]
    row_of = list(range(R)) if rows is None else rows.tolist()
    assert tokens.positions.tolist() == present
    assert tokens.targets.tolist() == [int(targets[n]) for n in present]
    assert tokens.rows.tolist() == [row_of[n] for n in present]
    assert tokens.lengths.tolist() == [sum(a <= n < b for n in present) for a, b in pairwise(cu_tokens)]
    spans = [(cu_tokens[a], cu_tokens[b]) for a, b in pairwise(cu_groups)]
    assert tokens.group_starts == [0, *(sum(n < b for n in present) for _, b in spans)]
    assert tokens.rows_per_group == [len({row_of[n] for n in present if a <= n < b}) for a, b in spans]
    assert tokens.one_per_row == (len(set(tokens.rows.tolist())) == len(present))
    assert tokens.as_one_group().rows_per_group == [len({row_of[n] for n in present})]


@given(packings(), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_blocks_hold_every_token_once_and_every_row_once(packing, rows_per_block):
    targets, rows, cu_tokens, cu_groups, R = packing
    tokens = find_tokens(targets, R, 7, rows, cu_tokens, cu_groups)
    for first, last in [(0, len(tokens.targets)), *pairwise(tokens.group_starts)]:
        seen_rows, seen_tokens = [], []
        for block in split_blocks(tokens, first, last, rows_per_block):
            here = torch.arange(R)[block.rows].tolist()
            assert len(here) == block.num_rows <= rows_per_block
            seen_rows += here
            order = torch.arange(last - first)[block.order].tolist()
            seen_tokens += order
            assert block.targets.tolist() == tokens.targets[first:last][block.order].tolist()
            starts = range(block.num_rows + 1) if block.row_starts is None else block.row_starts.tolist()
            assert (starts[0], starts[-1]) == (0, len(order))
            for row, (a, b) in zip(here, pairwise(starts), strict=True):
                assert [int(tokens.rows[first + n]) for n in order[a:b]] == [row] * (b - a)
        assert sorted(seen_tokens) == list(range(last - first))
        assert sorted(seen_rows) == sorted(set(tokens.rows[first:last].tolist()))


@pytest.mark.parametrize("rows", [[], [4], [2, 3, 4], [0, 1, 2, 4], [5, 7], [1, 1]])
def test_slices_stand_for_consecutive_rows_only(rows):
    result = as_slice(np.array(rows, dtype=np.int64))
    consecutive = rows == list(range(rows[0], rows[0] + len(rows))) if rows else True
    assert (result is not None) == consecutive
    if result is not None:
        assert torch.arange(10)[result].tolist() == rows


def test_sizes():
    layout = CandidateLayout([0, 3, 3, 5], [0, 2, 3])
    assert (layout.num_tokens, layout.num_segments, layout.num_groups) == (5, 3, 2)
