"""The benchmark of whole steps: what is fed, who is compared, and that another loss is not timed."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("trl")

from benchmarks import steps
from benchmarks.models import GPT2_TINY, make_model, twin
from benchmarks.setting import CPU, Setting
from benchmarks.steps import FUSED, OURS, OURS_SEPARATE, PATCHED, STOCK, Bench, Case, Result
from benchmarks.timing import Effort

pytestmark = pytest.mark.cpu

CASE = Case("dpo", GPT2_TINY, pairs=2, tokens=8)


def test_twins_share_parameters_and_nothing_else():
    model = make_model(GPT2_TINY, 16)
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not {id(module) for module in model.modules()} & {id(module) for module in other.modules()}
    other.lm_head.weight.grad = torch.ones_like(other.lm_head.weight)
    assert model.transformer.wte.weight.grad is other.lm_head.weight.grad


def test_the_tokens_that_are_counted_are_those_that_trl_feeds(tmp_path):
    bench = Bench(CASE, CPU)
    fed = []
    bench.policy.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    bench.trl_step("stock", str(tmp_path))()  # the hook is copied with the module
    assert [ids.shape for ids in fed] == [(4, 16)]
    assert sum(ids.numel() for ids in fed) == CASE.fed
    assert not (fed[0][:, :-1] == GPT2_TINY.vocabulary - 1).any()  # no padding, and EOS is the last


def test_sharing_takes_fewer_positions(tmp_path):
    bench = Bench(CASE, CPU)
    shared, separate = (bench.our_step(sharing, str(tmp_path)) for sharing in ("required", "off"))
    for step in (shared, separate):
        step()
    assert shared.positions == 2 * (8 + 2 * 7) and separate.positions == 2 * 2 * 15
    assert shared.tokens == separate.tokens == 2 * 2 * 8


def test_another_loss_or_gradient_is_not_timed():
    found = {
        "first": Result(1.0, 2.0),
        "alike": Result(1.0005, 2.001),
        "loss": Result(1.01, 2.0),
        "gradient": Result(1.0, 2.1),
        "nan": Result(float("nan"), 2.0),
        "failed": RuntimeError("no memory"),
    }
    reasons = steps.disagreeing(found, torch.float32)
    assert set(reasons) == {"loss", "gradient", "nan", "failed"}
    assert reasons["failed"] == "RuntimeError: no memory"
    assert set(steps.disagreeing({"a": ValueError("a"), "b": Result(1.0, 1.0)}, torch.float32)) == {"a"}


def test_a_wrong_trainer_has_a_note_and_no_values(monkeypatch):
    right = Bench.arguments

    def arguments(self, folder):
        return right(self, folder) | {"beta": next(betas)}

    betas = iter([0.1, 0.1, 0.1, 0.2, 0.1])
    monkeypatch.setattr(Bench, "arguments", arguments)
    records = {record.contestant: record for record in steps.measure(CASE, CPU, Effort(rounds=1))}
    assert [name for name, record in records.items() if not record.values] == [OURS]
    assert records[OURS].note.startswith("another loss: found Result(loss=")


def test_a_trainer_that_is_not_there_has_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    records = {record.contestant: record for record in steps.measure(CASE, CPU, Effort(rounds=1))}
    assert "ModuleNotFoundError" in records[STOCK].note and not records[STOCK].values
    assert records[OURS].values["loss"] > 0 and "of_trl" not in records[OURS].values


def test_the_quick_run():
    records = list(steps.run(Setting(quick=True)))
    assert not any(record.note for record in records)
    dpo, cpo = ([r for r in records if r.conditions["work"] == work] for work in ("dpo", "xu_cpo"))
    assert [r.contestant for r in dpo] == [STOCK, FUSED["dpo"], PATCHED, OURS, OURS_SEPARATE]
    assert [r.contestant for r in cpo] == [STOCK, FUSED["xu_cpo"], OURS, OURS_SEPARATE]
    for record in records:
        stock = next(r for r in records if r.case == record.case and r.contestant == STOCK)
        assert record.values["loss"] == pytest.approx(stock.values["loss"], rel=1e-4)
        assert record.values["of_trl"] == stock.values["seconds"] / record.values["seconds"]
        assert record.values["tokens_per_second"] == 64 / record.values["seconds"]
