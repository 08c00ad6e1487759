"""Two result files side by side."""

from __future__ import annotations

import json

import pytest

from benchmarks import compare
from benchmarks.contestants import FLOOR

pytestmark = pytest.mark.cpu


def results(device: str = "cpu", **shapes: dict[str, list[float]]) -> dict:
    """As benchmarks.report writes them, as far as times go."""
    cases = [
        {
            "shape": {"name": name},
            "rows": [{"contestant": who, "timing": {"seconds": seconds}} for who, seconds in rows.items()],
        }
        for name, rows in shapes.items()
    ]
    return {"environment": {"device": device}, "cases": cases}


def test_ratios_are_of_multiples_of_the_floor():
    before = results(small={FLOOR: [2.0, 2.5], "ours": [4.0, 3.0]}, large={FLOOR: [1.0], "ours": [1.0]})
    after = results(small={FLOOR: [1.0], "ours": [1.2, 9.0], "new": [5.0]})
    table = compare.compare(before, after)
    (row,) = [line for line in table.splitlines() if "ours" in line]
    assert [cell.strip() for cell in row.strip("| ").split("|")] == ["small", "ours", "1.50", "1.20", "0.800"]
    assert "only in before: large" in table and "only in after" not in table
    assert "different devices" not in table


def test_different_devices_are_named_and_nothing_in_common_is_said():
    table = compare.compare(results("a", x={FLOOR: [1.0]}), results("b", y={FLOOR: [1.0], "ours": [1.0]}))
    assert "nothing in common" in table and "different devices: a and b" in table
    assert "only in before" not in table and "only in after: y" in table


def test_the_command_reads_files(tmp_path, capsys):
    paths = [tmp_path / name for name in ("before.json", "after.json")]
    for path, seconds in zip(paths, (1.5, 1.2), strict=True):
        path.write_text(json.dumps(results(small={FLOOR: [1.0], "ours": [seconds]})))
    compare.main([str(path) for path in paths])
    assert "0.800" in capsys.readouterr().out
