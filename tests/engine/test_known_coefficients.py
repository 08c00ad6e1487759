"""Losses whose coefficients are known beforehand: no logits wait for their group, and a row is read once."""

from __future__ import annotations

import pytest
import simt_host
import torch
from pairwise import pairwise
from problems import (
    BACKENDS,
    GemmCounter,
    assert_problem_accurate,
    budget_of,
    fused_loss,
    packed_problem,
    random_problem,
)

from cpo_kernels import linear_sequence_logps, plan
from cpo_kernels.kernels.device import architecture
from cpo_kernels.kernels.selection import Choice, overridden

LIKELIHOOD = {"contrast_weight": 0.0, "mle_weight": 0.7}
PROBLEMS = {
    "padded": lambda: random_problem(V=67, bias=True, **LIKELIHOOD),
    "packed, shared rows": lambda: packed_problem(**LIKELIHOOD),
    "means": lambda: random_problem(V=67, length_normalized=True, **LIKELIHOOD),
}


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_likelihood_alone_recomputes_nothing(backend, name):
    """Three products, though a group has more rows than the budget."""
    problem = PROBLEMS[name]().to(torch.float32)
    arguments = problem.arguments() | problem.options | {"backend": backend, "max_logits_bytes": budget_of(problem, 3)}
    with GemmCounter() as counter:
        fused_loss(problem, backend=backend, max_logits_bytes=arguments["max_logits_bytes"])
    made = plan(**arguments)
    assert made.rows_held <= 3 < max(chunk.num_rows for chunk in made.chunks)
    assert not any(chunk.recomputed for chunk in made.chunks)
    assert made.gemms == 3
    assert counter.products(made.num_rows, problem.weight) == pytest.approx(3)
    contrasted = plan(**{**arguments, "contrast_weight": 0.1})
    assert any(chunk.recomputed for chunk in contrasted.chunks)


@pairwise({"backend": BACKENDS, "name": PROBLEMS.keys(), "rows": [None, 3]})
def test_accuracy(backend, name, rows):
    problem = PROBLEMS[name]()
    limit = None if rows is None else budget_of(problem.to(torch.float32), rows)
    assert_problem_accurate(problem, torch.float32, upstream=2.0, backend=backend, max_logits_bytes=limit)


def test_filters_need_the_coefficients_of_the_contrast():
    problem = PROBLEMS["padded"]().to(torch.float32)
    limit = budget_of(problem, 3)
    made = plan(**problem.arguments(), **problem.options, max_logits_bytes=limit, candidate_eps=0.1)
    assert any(chunk.recomputed for chunk in made.chunks)


@pytest.fixture
def launches(emulated_cuda, emulator, monkeypatch):
    """Names of the row launches, in order, where the one-pass gradient is chosen."""
    names = ("row_forward", "row_backward", "row_gradient")
    made = simt_host.record(emulator, monkeypatch, names)
    with overridden(Choice("row_gradient_", architecture(torch.device("cpu")), "cuda")):
        yield made


@pytest.mark.cpu
@pairwise(
    {
        "name": PROBLEMS.keys(),
        "dtype": [torch.float32, torch.bfloat16, torch.float16],
        "logits_dtype": [None, torch.float32],
    }
)
def test_one_launch_a_block(launches, name, dtype, logits_dtype):
    problem = PROBLEMS[name]()
    limit = budget_of(problem.to(logits_dtype or dtype), 5)
    head = {"backend": "cuda", "max_logits_bytes": limit, "logits_dtype": logits_dtype}
    assert_problem_accurate(problem, dtype, upstream=2.0, **head)
    made = plan(**problem.to(dtype).arguments(), **problem.options, **head)
    blocks = sum(-(-chunk.num_rows // chunk.rows_per_block) for chunk in made.chunks)
    assert launches == ["row_gradient"] * blocks
    assert blocks > 1


@pytest.mark.cpu
def test_log_likelihoods_of_a_frozen_head(launches):
    """Their gradient is built for coefficients of 1 and scaled later."""
    problem = random_problem(V=67).to(torch.float32)
    weight = problem.weight.detach()
    results = []
    for backend in ("cuda", "torch"):
        logps = linear_sequence_logps(problem.hidden, weight, problem.targets, backend=backend)
        results.append((logps, torch.autograd.grad(logps.square().sum(), problem.hidden)[0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert launches == ["row_gradient"]


@pytest.mark.cpu
def test_rows_that_no_cluster_holds_are_read_twice(launches, emulator, monkeypatch):
    problem = PROBLEMS["padded"]().to(torch.float32)
    expected = fused_loss(problem, backend="cuda")
    monkeypatch.setattr(emulator, "row_gradient_bytes", lambda *, device: 66 * 4)
    found = fused_loss(problem, backend="cuda")
    assert launches == ["row_gradient", "row_forward", "row_backward"]
    torch.testing.assert_close(found, expected)


@pytest.mark.cpu
def test_a_contrast_reads_twice(launches):
    fused_loss(random_problem(V=67).to(torch.float32), backend="cuda")
    assert launches == ["row_forward", "row_backward"]
