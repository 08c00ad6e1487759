"""``linear_cpo_loss`` in half precision: gradients under a loss scale, sums over chunks, float32 logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pairwise import pairwise
from problems import (
    BACKENDS,
    BUDGETS,
    COMPILED_BACKENDS,
    assert_problem_accurate,
    budget_of,
    fused_loss,
    loss_and_grads,
    packed_problem,
    random_problem,
)
from tolerance import relative_error

from cpo_kernels import linear_cpo_loss, linear_sequence_logps, linear_sequence_loss, plan
from cpo_kernels.kernels.cpu import linear as cpu_linear


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradients_survive_until_the_loss_scale_arrives(backend, length_normalized):
    """1 / num_groups pushes every gradient under float16's smallest number; the loss scale brings them back."""
    problem = random_problem(mle_weight=0.3).with_options(
        num_groups=2.0**16, num_target_tokens=2.0**20, length_normalized=length_normalized
    )
    rounded = problem.to(torch.float16)
    result = loss_and_grads(fused_loss(rounded, backend=backend), rounded, upstream=2.0**16)
    options = dict(problem.options, num_groups=None, num_target_tokens=None)
    exact = replace(problem.to(torch.float16).to(torch.float64), options=options)
    plain = loss_and_grads(fused_loss(exact.with_options(mle_weight=0.0)), exact)
    nll = loss_and_grads(fused_loss(exact.with_options(mle_weight=1.0, contrast_weight=0.0)), exact)
    tokens = int((problem.targets[:, 0] != -100).sum())
    for name in ("hidden", "weight"):
        wanted = 2.0**16 * (plain[name] * 3 / 2.0**16 + 0.3 * nll[name] * tokens / 2.0**20)
        assert relative_error(result[name], wanted) < 8 * torch.finfo(torch.float16).eps


def test_float16_gradient_of_a_plain_sum_over_many_groups_does_not_overflow():
    """A loss_fn whose coefficients are 1, and not the 1 / groups that a mean would have."""
    G, T = 1024, 8
    hidden = torch.ones(G, 1, T, 4, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(3, 4, dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(G, 1, T, dtype=torch.int64)
    linear_sequence_loss(hidden, weight, targets, lambda logps, groups: -logps.sum()).backward()
    expected = torch.tensor([-2 / 3, 1 / 3, 1 / 3]).unsqueeze(1).expand(3, 4) * (G * T)
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("needs_bias", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_coefficients_and_hidden_states_whose_product_overflows(backend, needs_bias):
    """Every word is nearly certain, so that a large coefficient times a large hidden state has a small gradient."""
    targets = torch.arange(4).view(1, 1, 4)
    hidden = (torch.eye(4, 8) * 32).view(1, 1, 4, 8).half().requires_grad_()
    weight = (torch.eye(5, 8) / 4).half().requires_grad_()
    bias = torch.zeros(5).half().requires_grad_() if needs_bias else None
    leaves = [t for t in (hidden, weight, bias) if t is not None]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    logits = exact[0] @ exact[1].T + (exact[2] if needs_bias else 0.0)
    logps = logits.log_softmax(-1).gather(-1, targets[..., None]).sum()
    expected = torch.autograd.grad(logps * 8192, exact)
    head = {"bias": bias, "backend": backend}
    own = linear_sequence_loss(hidden, weight, targets, lambda logps, groups: logps.sum() * 8192, **head)
    fused = linear_sequence_logps(hidden, weight, targets, **head).sum()
    for loss in (fused * 8192, own):
        for grad, wanted in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
            assert relative_error(grad, wanted) < 8 * torch.finfo(torch.float16).eps


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_float16_gain_survives_coefficients_that_are_not_finite(bad):
    problem = random_problem().to(torch.float16)
    loss = linear_sequence_loss(
        problem.hidden, problem.weight, problem.targets, lambda logps, groups: (logps * bad).sum()
    )
    loss.backward()
    assert not loss.isfinite()
    assert not problem.weight.grad.isfinite().all()


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
def test_log_likelihoods_of_long_sequences_in_float32(backend):
    """T = 1024 from bfloat16 inputs: at most 2e-3 nats off with logits_dtype=float32, and on a CPU without."""
    T, H, V = 1024, 64, 2003
    hidden = torch.randn(1, 2, T, H).bfloat16()
    weight = (torch.randn(V, H) * 2 / H**0.5).bfloat16()
    targets = torch.randint(0, V, (1, 2, T))
    exact = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(-1, targets.unsqueeze(-1)).sum((-1, -2))
    out = linear_cpo_loss(hidden, weight, targets, backend=backend, logits_dtype=torch.float32)
    assert (out.logps.double() - exact).abs().max() <= 2e-3
    rounded = linear_cpo_loss(hidden, weight, targets, backend=backend)
    if backend == "cpu" and cpu_linear.takes(hidden, weight):
        assert (rounded.logps.double() - exact).abs().max() <= 2e-3
    else:
        assert (rounded.logps.double() - exact).abs().max() > 2e-3, "the case must be one where float32 logits matter"


@pairwise({"dtype": [torch.bfloat16, torch.float16], "backend": BACKENDS, "rows": BUDGETS})
def test_gradients_with_float32_logits(dtype, backend, rows):
    problem = packed_problem(bias=True, mle_weight=0.2)
    budget = rows and rows * 31 * 4
    assert_problem_accurate(problem, dtype, backend=backend, logits_dtype=torch.float32, max_logits_bytes=budget)


@pytest.mark.parametrize("backend", COMPILED_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_chunks_sum_half_precision_gradients_like_one(dtype, backend):
    """600 chunks of terms of one sign: a plain bfloat16 sum stops growing at 256 of them."""
    problem = random_problem(G=600, C=1, T=1, H=8, V=11, ref=False, contrast_weight=0.0, mle_weight=1.0)
    problem = replace(problem, hidden=problem.hidden.abs(), targets=torch.zeros_like(problem.targets))
    budget = budget_of(problem.to(dtype), 1)
    assert len(plan(**problem.to(dtype).arguments(), max_logits_bytes=budget).chunks) == 600
    assert_problem_accurate(problem, dtype, backend=backend, max_logits_bytes=budget)
