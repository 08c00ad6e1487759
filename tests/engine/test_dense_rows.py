"""``skip_absent_rows=False``: every row enters the products, with the same result, and nothing waits for the device."""

from __future__ import annotations

import pytest
import torch
from pairwise import pairwise
from problems import (
    BACKEND_DTYPES,
    BACKENDS,
    PROBLEMS,
    GemmCounter,
    budget_of,
    eager_loss,
    fused_loss,
    loss_and_grads,
    random_problem,
)
from tolerance import assert_accurate

from cpo_kernels import linear_cpo_loss, linear_token_logps, plan
from cpo_kernels.engine.call import resolve
from cpo_kernels.engine.compiled import run_cpo
from cpo_kernels.engine.inputs import Inputs
from cpo_kernels.engine.logps import run_token_logps, token_logps_grads
from cpo_kernels.options import Head, Objective

PADDED = [name for name in PROBLEMS if not name.startswith("packed")]


@pairwise(
    {
        "backend, dtype": BACKEND_DTYPES,
        "name": PADDED,
        "rows": {"one_chunk": None, "chunks": 13, "recomputed": 2},
    }
)
def test_loss_and_gradients(backend, dtype, name, rows):
    problem = PROBLEMS[name]().to(dtype)
    budget = None if rows is None else budget_of(problem, rows)
    loss = fused_loss(problem, backend=backend, skip_absent_rows=False, max_logits_bytes=budget)
    out, eager = loss_and_grads(loss, problem), loss_and_grads(eager_loss(problem), problem)
    exact = problem.to(torch.float64)
    oracle = loss_and_grads(eager_loss(exact), exact)
    for what in oracle:
        assert_accurate(out[what], eager[what], oracle[what], what)
    absent = problem.targets == -100
    assert not out["hidden"][absent].any()


def test_outputs_and_plan():
    problem = random_problem(bias=True, mle_weight=0.4).to(torch.float32)
    skipping = linear_cpo_loss(**problem.arguments(), **problem.options)
    dense = linear_cpo_loss(**problem.arguments(), **problem.options, skip_absent_rows=False)
    for ours, theirs in zip(dense, skipping, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert plan(**problem.arguments(), skip_absent_rows=False).num_rows == problem.targets.numel()
    with GemmCounter() as counter:
        fused_loss(problem, skip_absent_rows=False)
    assert counter.products(problem.targets.numel(), problem.weight) == 3


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_token_logps(frozen):
    problem = random_problem().to(torch.float32)
    problem.weight.requires_grad_(not frozen)
    leaves = [t for t in (problem.hidden, problem.weight) if t.requires_grad]
    upstream, results = torch.randn(problem.targets.shape), []
    for skip in (True, False):
        logps = linear_token_logps(problem.hidden, problem.weight, problem.targets, skip_absent_rows=skip)
        results.append([logps, *torch.autograd.grad(logps, leaves, upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "max_logits_bytes": 31 * 12 * 8}], ids=["plain", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_waits_for_the_device(dtype, options):
    """A meta tensor has no values: whatever reads one on the host, as a copy from a GPU would, raises."""
    hidden, weight = (torch.empty(size, device="meta", dtype=dtype) for size in ((24, 8), (31, 8)))
    bias, targets = weight[:, 0], torch.empty(24, device="meta", dtype=torch.int64)
    ref_logps = torch.empty(6, device="meta")
    objective = Objective(mle_weight=0.5, label_smoothing=0.1, length_normalized=True)

    def inputs(skip: bool) -> Inputs:
        head = Head(backend="torch", skip_absent_rows=skip, **options)
        return Inputs(hidden, weight, bias, targets, None, range(0, 25, 4), range(0, 7, 2), head, (6,))

    needs = (True, True, True)
    out, result = run_cpo(inputs(False), ref_logps, None, objective, needs)
    assert out.rewards.shape == (6,)
    assert [grad.shape for grad in result.grads] == [hidden.shape, weight.shape, bias.shape]
    call = resolve(inputs(False), needs, whole_groups=False)
    logps = run_token_logps(call, call.bind(hidden, weight, bias)).logps
    token_logps_grads(call, call.bind(hidden, weight, bias), None, logps)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run_cpo(inputs(True), ref_logps, None, objective, needs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("skip", [True, False])
def test_padding_may_hold_nan(backend, skip):
    """As fully masked attention rows do: rows that predict nothing add exactly nothing."""
    problem = random_problem().to(torch.float32)
    clean = loss_and_grads(fused_loss(problem, backend=backend, skip_absent_rows=skip), problem)
    with torch.no_grad():
        problem.hidden[problem.targets == -100] = torch.nan
    result = loss_and_grads(fused_loss(problem, backend=backend, skip_absent_rows=skip), problem)
    for name, value in clean.items():
        assert torch.equal(result[name], value), name
    absent = problem.targets == -100
    logps = linear_token_logps(problem.hidden, problem.weight, problem.targets, backend=backend, skip_absent_rows=skip)
    grads = torch.autograd.grad(logps.sum(), (problem.hidden, problem.weight))
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][absent].any()
