"""The benchmark of negatives: what its steps hold, and the records of a quick run."""

from __future__ import annotations

import pytest
import torch

from benchmarks import negatives
from benchmarks.models import make_model
from benchmarks.negatives import BASE, MLE, TRUNCATED
from benchmarks.setting import Setting

pytestmark = pytest.mark.cpu  # tiny models on the host

GROWTH, KINDS = negatives.cases(Setting(quick=True))


def steps_of(case, folder):
    model, reference = (make_model(case.sizes, 2 * case.tokens) for _ in range(2))
    return negatives.make_steps(case, model.train(), reference, str(folder))


@pytest.fixture(scope="module")
def growth(tmp_path_factory):
    return steps_of(GROWTH, tmp_path_factory.mktemp("growth"))


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return steps_of(KINDS, tmp_path_factory.mktemp("kinds"))


def test_truncations_take_no_positions_of_the_body(kinds):
    kinds[BASE]()
    for name in TRUNCATED:
        kinds[name]()
        assert kinds[name].positions == kinds[BASE].positions
        assert kinds[name].tokens > kinds[BASE].tokens


def test_shared_and_separate_rows_have_the_same_loss_and_gradients(growth):
    results = []
    for name in ("K = 4", "K = 4, sharing off"):
        growth[name].trainer.state.global_step = 0
        growth[name].trainer.model.zero_grad()
        loss = growth[name]()
        results.append((loss, [p.grad.clone() for p in growth[name].trainer.model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_positions_and_tokens_are_those_of_the_texts(growth, kinds):
    groups, length = GROWTH.groups, GROWTH.tokens
    for contestant in GROWTH.contestants:
        step, k = growth[negatives.unique(contestant)], contestant.conditions["K"]
        step()
        shared, separate = length + (k + 1) * (length - 1), (k + 1) * (2 * length - 1)
        assert step.positions == groups * (shared if contestant.conditions["sharing"] == "on" else separate)
        assert step.tokens == groups * (k + 1) * length
    kinds["mean-field 1, by the model"]()
    assert kinds["mean-field 1, by the model"].tokens <= KINDS.groups * 2 * KINDS.tokens


def test_every_call_draws_new_negatives_for_the_same_examples(growth):
    step, gradients = growth[BASE], set()
    for _ in range(3):
        step.trainer.model.zero_grad()
        step()  # the loss of a model that is its own reference is the same for all negatives, its gradient is not
        gradients.add(float(next(step.trainer.model.parameters()).grad.norm()))
    assert len(gradients) == 3


def test_the_quick_run():
    records = list(negatives.run(Setting(quick=True)))
    of_growth, of_kinds = ([r for r in records if r.case.startswith(name)] for name in ("K, ", "kinds, "))
    assert [(r.conditions["K"], r.conditions["sharing"]) for r in of_growth] == [
        (0, "off"),
        *((k, "on") for k in (1, 2, 4, 8, 16)),
        *((k, "off") for k in (1, 4)),
    ]
    assert [r.contestant for r in of_kinds] == [contestant.name for contestant in KINDS.contestants]
    for record in records:
        assert record.values["seconds"] <= record.values["median"] and record.values["making"] > 0
        base = next(r for r in records if r.case == record.case and r.contestant == BASE)
        assert record.values["of_base"] == record.values["seconds"] / base.values["seconds"]
    assert [r.values["of_mle"] for r in records if r.contestant == MLE] == [1, 1]
