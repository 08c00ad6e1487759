"""The benchmark of prefix sharing: both ways have the same rows, and one that differs is not timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import sharing
from benchmarks.models import GPT2_TINY
from benchmarks.setting import CPU, Setting
from benchmarks.timing import Effort

pytestmark = pytest.mark.cpu

CASE = sharing.Case("gpt2", GPT2_TINY, "sdpa", groups=2, tokens=6)
ONCE = Effort(rounds=1)


def test_both_ways_have_the_same_rows():
    problem = sharing.make_problem(CASE)
    assert problem.shared.input_ids.numel() == 2 * 6 * (1 + sharing.CANDIDATES)
    assert problem.separate_ids.shape == (2 * sharing.CANDIDATES, 12)
    shared = problem.shared.input_ids.flatten()[problem.shared_rows]
    separate = problem.separate_ids.flatten()[problem.separate_rows]
    assert torch.equal(shared, separate) and len(shared) == 2 * sharing.CANDIDATES * 7


def test_wrong_hidden_states_are_not_timed(monkeypatch):
    right = sharing.tree_inputs
    flat = {"position_ids": torch.zeros(2, 36, dtype=torch.int64)}
    monkeypatch.setattr(sharing, "tree_inputs", lambda *args: right(*args) | flat)
    with pytest.raises(RuntimeError, match=r"differ by \d.* of their norm"):
        sharing.measure(CASE, CPU, ONCE)


def test_an_attention_that_fails_has_a_note(monkeypatch):
    failing = replace(CASE, attention="flash_attention_none")
    monkeypatch.setattr(sharing, "cases", lambda setting: [failing, CASE])
    first, *rest = sharing.run(Setting(quick=True))
    assert not first.values and first.note and first.conditions["attention"] == "flash_attention_none"
    assert [record.contestant for record in rest] == [sharing.SEPARATE, sharing.SHARED]


def test_the_quick_run():
    records = list(sharing.run(Setting(quick=True)))
    ran = {(r.conditions["body"], r.conditions["attention"], r.contestant) for r in records}
    attentions = ("sdpa", sharing.DENSE, "eager")
    assert ran == {(b, a, c) for b in ("gpt2", "llama") for a in attentions for c in (sharing.SEPARATE, sharing.SHARED)}
    assert not any(record.note for record in records)
    for separate, shared in zip(records[::2], records[1::2], strict=True):
        assert separate.values["ratio"] == 1
        assert shared.values["ratio"] == separate.values["seconds"] / shared.values["seconds"]
        assert separate.values["positions"] / shared.values["positions"] == pytest.approx(5 / 3)
