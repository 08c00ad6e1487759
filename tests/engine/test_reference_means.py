"""References of a loss of means: they are given as sums, as the functions of log-likelihoods return them."""

from __future__ import annotations

import pytest
import torch
from problems import BACKENDS, packed_problem, random_problem

from cpo_kernels import (
    CPOLoss,
    LinearCPOLoss,
    cpo_loss,
    linear_cpo_loss,
    linear_sequence_logps,
    sequence_logps,
)

OPTIONS = {"length_normalized": True, "beta": 0.7}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("make", [random_problem, packed_problem], ids=["padded", "packed"])
def test_a_model_that_is_its_own_reference_has_no_rewards(make, compiled, backend):
    """Whatever the lengths: the rewards are 0, and the contrast is that of equal scores."""
    problem = make().to(torch.float32)
    tensors, given = (problem.hidden, problem.weight, problem.targets), {"layout": problem.layout, "backend": backend}
    ref_logps = linear_sequence_logps(*tensors, **given).detach()
    loss = torch.compile(linear_cpo_loss, fullgraph=True) if compiled else linear_cpo_loss
    out = loss(*tensors, ref_logps=ref_logps, **given, **OPTIONS)
    assert ref_logps.abs().max() > 1
    torch.testing.assert_close(out.rewards, torch.zeros_like(ref_logps), rtol=0, atol=1e-5)
    equal = linear_cpo_loss(*(torch.zeros_like(t) for t in tensors[:2]), problem.targets, **given, **OPTIONS)
    torch.testing.assert_close(out.contrastive_loss, equal.contrastive_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_are_differences_of_means(backend):
    """By hand in float64, for logits and hidden states, and for both modules."""
    problem = random_problem().to(torch.float32)
    logits = problem.hidden @ problem.weight.T
    present = problem.targets != -100
    tokens = logits.detach().double().log_softmax(-1).gather(-1, problem.targets.clamp(min=0)[..., None])[..., 0]
    ref_logps = problem.ref_logps.float()
    ratios = ((tokens * present).sum(-1) - ref_logps.double()) / present.sum(-1).clamp(min=1)
    scores = torch.where(present.any(-1), 0.7 * ratios, -torch.inf)
    loss = (scores.logsumexp(1) - scores[:, 0]).mean()
    hidden = problem.hidden, problem.weight, problem.targets
    given = {"ref_logps": ref_logps}
    for out in (
        linear_cpo_loss(*hidden, **given, **OPTIONS, backend=backend),
        cpo_loss(logits, problem.targets, **given, **OPTIONS, backend=backend),
        LinearCPOLoss(**OPTIONS, backend=backend)(*hidden, **given),
        CPOLoss(**OPTIONS, backend=backend)(logits, problem.targets, **given),
    ):
        torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
        want = (0.7 * ratios).masked_fill(~present.any(-1), 0.0)
        torch.testing.assert_close(out.rewards.double(), want, rtol=1e-5, atol=1e-5)
        want = (tokens * present).sum(-1) / present.sum(-1).clamp(min=1)
        torch.testing.assert_close(out.logps.double(), want, rtol=1e-5, atol=1e-5)


def test_a_reference_scored_from_logits_is_the_one_from_hidden_states():
    problem = random_problem().to(torch.float32)
    tensors = problem.hidden, problem.weight, problem.targets
    losses = [
        linear_cpo_loss(*tensors, ref_logps=ref, **OPTIONS).loss
        for ref in (linear_sequence_logps(*tensors), sequence_logps(problem.hidden @ problem.weight.T, problem.targets))
    ]
    torch.testing.assert_close(losses[0], losses[1])
