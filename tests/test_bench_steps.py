"""The benchmark of TRL's steps runs, on a model that is small enough, and compares losses before it times them."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import bench_trl

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def small(monkeypatch):
    threads = torch.get_num_threads()
    for name, value in {"VOCABULARY": 64, "WIDTH": 16, "HEADS": 2}.items():
        monkeypatch.setattr(bench_trl, name, value)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("trainer", bench_trl.CONTESTANTS)
def test_every_contestant_is_in_the_table(trainer, monkeypatch, tmp_path):
    out = tmp_path / "table.md"
    options = ["--trainer", trainer, "--tokens", "8", "--layers", "1", "--rounds", "1", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_trl", *options, "--no-peaks", "--out", str(out)])
    bench_trl.main()
    rows = [line for line in out.read_text().splitlines() if line.startswith("| ") and line[2:5] != "---"]
    assert [row.split(" | ")[0][2:] for row in rows[1:]] == list(bench_trl.CONTESTANTS[trainer])
    assert float(rows[1].split(" | ")[2]) == 1.0


def test_another_loss_is_noticed():
    steps = {bench_trl.STOCK: lambda: torch.tensor(1.0), "other": lambda: torch.tensor(1.1)}
    with pytest.raises(RuntimeError, match=r"other has a loss of 1.10\d*, expected TRL's, 1.0"):
        bench_trl.compare(steps, "float32")
