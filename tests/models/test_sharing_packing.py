"""Groups packed into rows."""

from __future__ import annotations

import pytest
import torch
from sharing_models import (
    groups,
)

from cpo_kernels.models.prefix.probe import pack_groups

pytestmark = pytest.mark.cpu


def test_packed_rows_hold_prompts_once_and_candidates_without_their_last_tokens():
    prompts, completions = groups()
    batch = pack_groups(prompts, completions, pad_token_id=9)
    length = batch.input_ids.shape[1]
    ids, positions = batch.input_ids.flatten().tolist(), batch.tree.positions.flatten().tolist()
    branches, numbers = batch.tree.branches.flatten().tolist(), batch.tree.groups.flatten().tolist()
    used = set()
    for g, (prompt, own) in enumerate(zip(prompts, completions, strict=True)):
        for c, candidate in enumerate(own):
            rows = batch.rows[g][c]
            start = rows[0] - len(prompt) + 1
            path = [*range(start, rows[0]), *rows]
            assert [ids[row] for row in path] == [*prompt, *candidate[:-1]]
            assert [positions[row] for row in path] == list(range(len(path)))
            assert [branches[row] for row in path] == [0] * len(prompt) + [c + 1] * (len(candidate) - 1)
            assert {numbers[row] for row in path} == {g}
            assert len({row // length for row in path}) == 1
            used.update(path)
    padded = set(range(len(ids))) - used
    assert {(ids[i], numbers[i], branches[i], positions[i]) for i in padded} <= {(9, -1, 0, 0)}
    assert len(used) == sum(len(p) + sum(len(c) - 1 for c in own) for p, own in zip(prompts, completions, strict=True))
    assert (batch.tree.groups.dtype, batch.tree.branches.dtype) == (torch.int32, torch.int32)
    assert (batch.tree.positions.dtype, batch.input_ids.dtype) == (torch.int64, torch.int64)


@pytest.mark.parametrize(
    ("limit", "shape"),
    [(1, (3, 10)), (12, (3, 11)), (15, (2, 14)), (100, (1, 27)), (None, (2, 14))],
)
def test_groups_fill_rows_up_to_the_limit(limit, shape):
    # Groups of 10, 7, 6 and 4 positions.
    prompts, completions = groups(lengths=((4, 4, 4), (7, 1), (3, 4), (2, 3)))
    assert pack_groups(prompts, completions, max_row_tokens=limit).input_ids.shape == shape


def test_packing_depends_on_nothing_but_its_arguments():
    first, second = (pack_groups(*groups()) for _ in range(2))
    assert torch.equal(first.input_ids, second.input_ids) and first.rows == second.rows


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([], [], "at least one prompt, got 0 prompts"),
        ([[1]], [[[1]], [[2]]], "got 1 prompts and the candidates of 2"),
        ([[1], []], [[[1]], [[2]]], "group 1 has an empty prompt"),
        ([[1], [2]], [[[1]], []], "group 1 has no candidates"),
        ([[1], [2]], [[[1], [2]], [[3], []]], "candidate 1 of group 1 is empty"),
    ],
)
def test_what_cannot_be_packed_is_named(prompts, completions, message):
    with pytest.raises(ValueError, match=message):
        pack_groups(prompts, completions)
