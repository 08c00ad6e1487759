"""The library asks for every tensor on the device of its inputs, or explicitly on the host.

Under a default device of ``meta``, whatever it makes without saying where has no data, so that the results differ or
an error comes: what would otherwise be noticed on a GPU only.
"""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE
from pairwise import pairwise
from problems import BACKENDS, Problem, fused_loss, loss_and_grads, packed_problem, random_problem

from cpo_kernels import (
    cpo_loss,
    linear_sequence_logps,
    linear_sequence_loss,
    linear_token_logps,
    plan,
    token_logps,
)
from cpo_kernels.kernels import device

PROBLEMS = {
    "padded": lambda: random_problem(bias=True, mle_weight=0.2, softcap=3.0),
    "packed": lambda: packed_problem(bias=True, mle_weight=0.2),
}
BUDGETS = {"one_chunk": None, "several_chunks": 13 * 31 * 4, "recomputed": 3 * 31 * 4}
KINDS = [*((name, torch.float32) for name in BACKENDS), ("torch", torch.float16)]


def squares(logps, groups):
    return (logps.reshape(-1) ** 2).sum()


def results(problem: Problem, backend: str, budget: int | None) -> dict[str, torch.Tensor]:
    """The loss, its gradients, and the scalars of the other functions."""
    linear = problem.hidden, problem.weight, problem.targets
    head = {"backend": backend, "max_logits_bytes": budget, "bias": problem.bias, "layout": problem.layout}
    loss = fused_loss(problem, backend=backend, max_logits_bytes=budget)
    found = loss_and_grads(loss, problem)
    filtered = fused_loss(problem, backend=backend, max_logits_bytes=budget, candidate_eps=0.02, grad_filter_eps=0.02)
    found |= {f"filtered {name}": value for name, value in loss_and_grads(filtered, problem).items()}
    any_loss = linear_sequence_loss(*linear, squares, **head)
    found |= {f"any {name}": value for name, value in loss_and_grads(any_loss, problem).items()}
    logps = linear_sequence_logps(*linear, **head)
    found["logps"] = logps.sum()
    (found["logps_grad"],) = torch.autograd.grad(logps.sum(), problem.hidden)
    with torch.no_grad():
        found["no_grad"] = linear_sequence_logps(*linear, **head).sum()
    return found


@pairwise(
    {
        "backend, dtype": KINDS,
        "name": PROBLEMS.keys(),
        "budget": BUDGETS,
    }
)
def test_linear_functions_say_where_their_tensors_go(backend, dtype, name, budget):
    problem = PROBLEMS[name]().to(dtype)
    expected = results(problem, backend, budget)
    with torch.device("meta"):
        found = results(problem, backend, budget)
        assert plan(**problem.arguments(), max_logits_bytes=budget).gemms >= 3
    for key, value in expected.items():
        assert found[key].device.type == DEVICE.type, key
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_functions_of_logits_say_where_their_tensors_go(backend):
    logits, targets = torch.randn(2, 3, 4, 31, requires_grad=True), torch.randint(0, 31, (2, 3, 4))
    targets[0, 1, 2] = -100

    def found():
        loss = cpo_loss(logits, targets, backend=backend).loss
        logps = linear_token_logps(logits[0, 0], logits[0, 1], targets[0, 0] % 4, backend=backend)
        logps = logps.sum() + token_logps(logits, targets, backend=backend).sum()
        return (loss.detach(), *torch.autograd.grad(loss + logps, logits))

    expected = found()
    with torch.device("meta"):
        again = found()
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("allowed", [False, True])
def test_products_are_summed_in_float32_and_the_settings_put_back(allowed):
    """Also when an error leaves the context, with the part of a setting that is about splits."""
    matmul = torch.backends.cuda.matmul
    of_splits = hasattr(matmul, f"{device.REDUCED_SUMS[0]}_split_k")
    before = {name: getattr(matmul, name) for name in device.REDUCED_SUMS}
    try:
        matmul.allow_bf16_reduced_precision_reduction = (allowed, allowed) if of_splits else allowed
        matmul.allow_fp16_accumulation = True
        with pytest.raises(RuntimeError, match="an error"), device.own_arithmetic(torch.device("cuda")):
            assert not any(getattr(matmul, name) for name in device.REDUCED_SUMS)
            raise RuntimeError("an error")
        assert matmul.allow_bf16_reduced_precision_reduction == allowed
        assert matmul.allow_fp16_accumulation
        assert not of_splits or matmul.allow_bf16_reduced_precision_reduction_split_k == allowed
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


def test_a_cpu_keeps_its_settings(monkeypatch):
    monkeypatch.setattr(device, "float32_accumulation", lambda: pytest.fail("a CPU has no such settings"))
    with torch.autocast("cpu"), device.own_arithmetic(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
