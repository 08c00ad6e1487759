"""Fewer cases than a full grid: any two values of two axes still meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest


def cover(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return rows of indices, greedily few, in which every pair of values of any two axes occurs."""
    if len(sizes) < 2:
        raise ValueError(f"a cover of pairs needs at least two axes, got sizes {tuple(sizes)}")
    axes = range(len(sizes))
    missing = {((i, a), (j, b)) for i, j in combinations(axes, 2) for a in range(sizes[i]) for b in range(sizes[j])}
    rows = []
    while missing:
        row = dict(min(missing))
        for axis in axes:
            if axis not in row:
                row[axis] = max(
                    range(sizes[axis]),
                    key=lambda value, axis=axis: sum(
                        tuple(sorted(((axis, value), other))) in missing for other in row.items()
                    ),
                )
        missing -= set(combinations(sorted(row.items()), 2))
        rows.append(tuple(row[axis] for axis in axes))
    return rows


def label_of(value: Any) -> str:
    """Return a short name of a value, or of a tuple of some, for the id of a test."""
    if isinstance(value, tuple) and value:
        return "-".join(map(label_of, value))
    return str(value).removeprefix("torch.")


def pairwise(axes: Mapping[str, Iterable[Any] | Mapping[str, Any]]) -> pytest.MarkDecorator:
    """Return the mark that parametrizes a test with a pairwise cover of a grid.

    Args:
        axes: by argument name (or names, as in "backend, dtype"), the values, or the values by id.
    """
    labels, values = [], []
    for axis in axes.values():
        named = axis if isinstance(axis, Mapping) else {label_of(value): value for value in axis}
        labels.append(list(named))
        values.append(list(named.values()))
    names = [name.strip() for key in axes for name in key.split(",")]
    spread = [len(key.split(",")) > 1 for key in axes]
    cases = []
    for row in cover([len(axis) for axis in values]):
        case: list[Any] = []
        for several, axis, index in zip(spread, values, row, strict=True):
            case += axis[index] if several else [axis[index]]
        identity = "-".join(axis[index] for axis, index in zip(labels, row, strict=True))
        cases.append(pytest.param(*case, id=identity))
    return pytest.mark.parametrize(names, cases)
