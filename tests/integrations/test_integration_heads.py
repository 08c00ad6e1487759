"""The example of a vocabulary-parallel head and the bench of heads, as their users run them."""

from __future__ import annotations

import pytest
from processes import run_script
from project import ROOT

from benchmarks import adapters
from benchmarks.measure import ContestantError
from benchmarks.setting import Setting

pytestmark = pytest.mark.cpu


def test_the_example_trains_as_one_process_does():
    out = run_script(ROOT / "examples" / "plugging_in" / "vocab_parallel.py", processes=2)
    assert "holds entries 0 to 504 of 1009" in out and "holds entries 505 to 1008 of 1009" in out
    first, last = (float(out.split("loss ")[1].split()[i]) for i in (0, 2))
    assert last < 0.8 * first
    assert float(out.split("whole head: ")[1].split()[0]) < 1e-5


def test_the_benchmark_of_heads(monkeypatch):
    found = list(adapters.run(Setting(quick=True)))
    heads = [record for record in found if record.contestant in adapters.KINDS]
    products = {(record.contestant, f"{record.values['products']:.2f}") for record in heads}
    assert products == {("trained", "3.00"), ("frozen", "2.00"), ("LoRA, rank 16", "2.33"), ("tied", "3.00")}
    assert all(r.values["error_worst"] < 1e-5 for r in heads if r.conditions["dtype"] == "float32")
    monkeypatch.setattr(adapters.Head, "fused", lambda head: (0 * head.hidden().sum(), [0 * x for x in head.leaves]))
    with pytest.raises(ContestantError, match="trained: AnotherLossError"):
        list(adapters.run(Setting(quick=True)))
