"""Two result files side by side."""

from __future__ import annotations

import pytest

from benchmarks import compare, records
from benchmarks.records import Part, Record

pytestmark = pytest.mark.cpu


def results(device: str = "a device", **cases: dict[str, dict[str, float]]) -> records.Parts:
    """A part of head timings: case -> contestant -> values."""
    found = [Record(case, who, values, {"N": 8}) for case, rows in cases.items() for who, values in rows.items()]
    return {"heads": Part("heads", {"device": device}, found)}


def cells(table: str, word: str) -> list[str]:
    (row,) = [line for line in table.splitlines() if word in line]
    return [cell.strip() for cell in row.strip("| ").split("|")]


def test_multiples_are_compared_and_not_seconds():
    before = results(small={"ours": {"seconds": 3.0, "floor": 1.5}, "floor": {"seconds": 2.0, "floor": 1.0}})
    after = results(small={"ours": {"seconds": 9.0, "floor": 1.2}, "floor": {"seconds": 7.5, "floor": 1.0}})
    table = compare.compare(before, after)
    assert cells(table, "ours") == ["heads", "small; N=8", "ours", "x floor", "1.500", "1.200", "0.800"]
    assert cells(table, "| floor ") == ["heads", "small; N=8", "floor", "s", "2", "7.5", "3.750"]
    assert "different devices" not in table and "only in" not in table


def test_other_conditions_are_another_case():
    before, after = results(x={"ours": {"seconds": 1.0}}), results(x={"ours": {"seconds": 1.0}})
    after["heads"].records[0] = Record("x", "ours", {"seconds": 1.0}, {"N": 16})
    table = compare.compare(before, after)
    assert "nothing in common" in table
    assert "only in before:\n- heads: x; N=8" in table and "only in after:\n- heads: x; N=16" in table


def test_different_devices_are_named():
    table = compare.compare(results("one", x={"ours": {"floor": 2.0}}), results("two", x={"ours": {"floor": 1.0}}))
    assert "different devices: one and two" in table
    assert cells(table, "ours")[-1] == "0.500"


def test_the_command_reads_files(tmp_path, capsys):
    paths = [tmp_path / name for name in ("before.json", "after.json")]
    for path, floor in zip(paths, (1.5, 1.2), strict=True):
        records.save(results(small={"ours": {"floor": floor}}), path)
    compare.main([str(path) for path in paths])
    assert "0.800" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        compare.main([str(paths[0]), str(tmp_path / "missing.json")])
