"""Losses whose coefficients are known beforehand: no logits wait for their group."""

from __future__ import annotations

import pytest
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

from cpo_kernels import plan

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
