"""Log-likelihoods by the fused linear path of a backend, where ``selection.json`` prefers it: no product, no logits."""

from __future__ import annotations

import pytest
import torch
from problems import BACKENDS, PROBLEMS, GemmCounter, eager_loss, packed_problem, random_problem
from tolerance import assert_accurate

from cpo_kernels import linear_cpo_loss, linear_sequence_logps, linear_token_logps, plan
from cpo_kernels.kernels import registry
from cpo_kernels.kernels.device import architecture
from cpo_kernels.kernels.selection import Choice, overridden

FUSED = [name for name in BACKENDS if "linear_forward" in registry.BACKENDS[name].optional]


@pytest.fixture
def preferred():
    """The fused path is preferred up to H = 64."""
    arch = architecture(torch.empty(0).device)
    with overridden(*(Choice("linear_forward", arch, name, hidden_at_most=64) for name in FUSED)):
        yield


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("make", [random_problem, packed_problem], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", FUSED)
def test_log_likelihoods(backend, make):
    problem = make(bias=True).to(torch.float32)
    head = {"layout": problem.layout, "bias": problem.bias, "backend": backend, "softcap": 4.0, "temperature": 1.3}
    arguments = (problem.hidden, problem.weight, problem.targets)
    expected = linear_sequence_logps(*arguments, **{**head, "backend": "torch"})
    with torch.no_grad(), GemmCounter() as counter:
        logps = linear_sequence_logps(*arguments, **head)
    assert not counter.shapes
    torch.testing.assert_close(logps, expected.detach())
    with GemmCounter() as counter:
        linear_sequence_logps(*arguments, **head)
    assert counter.shapes, "gradients need logits"


@pytest.mark.usefixtures("preferred")
@pytest.mark.parametrize("name", ["whole_head", "packed_shared_rows"])
@pytest.mark.parametrize("backend", FUSED)
def test_the_loss_without_gradients(backend, name):
    """More exact than logits of bfloat16, and within the budget of none."""
    problem = PROBLEMS[name]().to(torch.bfloat16)
    with torch.no_grad(), GemmCounter() as counter:
        out = linear_cpo_loss(**problem.arguments(), **problem.options, backend=backend)
        exact = problem.to(torch.float64)
        oracle, eager = eager_loss(exact), eager_loss(problem)
        assert plan(**problem.arguments(), backend=backend).logits_bytes == 0
    assert not [shape for shape in counter.shapes if shape[0] == problem.weight.shape[0]]
    assert_accurate(out.loss, eager.float(), oracle, "loss")


@pytest.mark.parametrize("backend", BACKENDS)
def test_nowhere_by_default(backend):
    """It is not measured yet."""
    problem = random_problem().to(torch.float32)
    with torch.no_grad(), GemmCounter() as counter:
        linear_token_logps(problem.hidden, problem.weight, problem.targets, backend=backend)
    assert len(counter.shapes) == 1
