"""The covers that stand for full grids."""

from __future__ import annotations

from itertools import combinations, product
from math import prod

import pytest
from pairwise import cover, pairwise

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("sizes", [(2, 5), (3, 4, 2), (8, 15, 3), (2, 2, 7, 3, 1)], ids=str)
def test_any_two_values_of_two_axes_meet(sizes):
    rows = cover(sizes)
    for i, j in combinations(range(len(sizes)), 2):
        assert {(row[i], row[j]) for row in rows} == set(product(range(sizes[i]), range(sizes[j])))
    assert len(rows) == len(set(rows))
    assert len(rows) < prod(sizes) or len(sizes) == 2


def test_one_axis_has_no_pairs():
    with pytest.raises(ValueError, match=r"at least two axes, got sizes \(3,\)"):
        cover((3,))


def test_cases_have_the_names_and_the_ids_of_their_values():
    mark = pairwise({"backend, dtype": [("a", 1), ("b", 2)], "rows": {"all": None, "some": 3}})
    names, cases = mark.args
    assert names == ["backend", "dtype", "rows"]
    assert {case.id: case.values for case in cases} == {
        "a-1-all": ("a", 1, None),
        "a-1-some": ("a", 1, 3),
        "b-2-all": ("b", 2, None),
        "b-2-some": ("b", 2, 3),
    }
