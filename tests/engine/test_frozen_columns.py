"""Leading columns of the weight without a gradient: the others have theirs, and the third product is that much less."""

from __future__ import annotations

import pytest
import torch
from head_logps import eager_logps, fused_logps
from pairwise import pairwise
from problems import (
    BACKEND_DTYPES,
    BUDGETS,
    GemmCounter,
    budget_of,
    eager_loss,
    fused_loss,
    loss_and_grads,
    packed_problem,
    random_problem,
)
from tolerance import assert_accurate

from cpo_kernels import linear_cpo_loss, plan

FROZEN, H = 11, 16
PROBLEMS = {
    "padded": lambda: random_problem(H=H, bias=True, mle_weight=0.3),
    "shared rows": lambda: packed_problem(H=H, softcap=4.0),
}


def assert_columns(got, eager, oracle):
    """Frozen columns are 0; the rest, and all other results, obey the rule."""
    assert got.keys() == oracle.keys()
    assert not got["weight"][:, :FROZEN].any()
    for name, value in got.items():
        part = (slice(None), slice(FROZEN, None)) if name == "weight" else ...
        assert_accurate(value[part], eager[name][part], oracle[name][part], name)


@pairwise(
    {
        "backend, dtype": BACKEND_DTYPES,
        "name": PROBLEMS.keys(),
        "rows": BUDGETS,
    }
)
def test_loss_and_gradients(backend, dtype, name, rows):
    rounded = PROBLEMS[name]().to(dtype)
    exact = rounded.to(torch.float64)
    head = {"backend": backend, "max_logits_bytes": rows and budget_of(rounded, rows), "frozen_columns": FROZEN}
    got = loss_and_grads(fused_loss(rounded, **head), rounded)
    assert_columns(got, loss_and_grads(eager_loss(rounded), rounded), loss_and_grads(eager_loss(exact), exact))


@pytest.mark.parametrize("rows", [None, 3], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_log_likelihoods(name, rows):
    rounded = PROBLEMS[name]().to(torch.float32)
    exact = rounded.to(torch.float64)
    budget = rows and budget_of(rounded, rows)
    logps = fused_logps(rounded, max_logits_bytes=budget, frozen_columns=FROZEN)
    got, eager, oracle = (
        loss_and_grads(values.square().sum(), problem)
        for values, problem in ((logps, rounded), (eager_logps(rounded), rounded), (eager_logps(exact), exact))
    )
    assert_columns(got, eager, oracle)


def test_filters_leave_out_the_same_columns_of_the_vocabulary():
    problem = random_problem(G=6, C=3, T=8, H=H, V=1009).to(torch.float32)
    head = {"grad_filter_eps": 1e-4, "candidate_eps": 1e-4}
    some, whole = (loss_and_grads(fused_loss(problem, **head, frozen_columns=n), problem) for n in (FROZEN, 0))
    torch.testing.assert_close(some["weight"][:, FROZEN:], whole["weight"][:, FROZEN:], rtol=1e-5, atol=1e-7)
    assert torch.equal(some["hidden"], whole["hidden"]) and not some["weight"][:, :FROZEN].any()


def test_the_third_product_is_that_of_the_columns_left():
    problem = random_problem(G=6, C=3, T=8, H=H, V=1009, ref=False).to(torch.float32)
    rows, want = int((problem.targets >= 0).sum()), 2 + (H - FROZEN) / H
    with GemmCounter() as counter:
        fused_loss(problem, frozen_columns=FROZEN).backward()
    assert counter.products(rows, problem.weight) == pytest.approx(want)
    assert plan(**problem.arguments(), frozen_columns=FROZEN).gemms == pytest.approx(want)
    problem.weight.requires_grad_(False)
    assert plan(**problem.arguments(), frozen_columns=FROZEN).gemms == 2


@pytest.mark.parametrize("columns", [-1, H + 1])
def test_more_columns_than_there_are(columns):
    problem = random_problem(H=H).to(torch.float32)
    with pytest.raises(ValueError, match=rf"frozen_columns must be at .*{columns}"):
        linear_cpo_loss(**problem.arguments(), frozen_columns=columns)
