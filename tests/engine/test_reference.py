"""The oracle against loops over Python numbers that share nothing with it, and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from problems import PROBLEMS, dense, eager_loss, random_problem

from cpo_kernels.kernels import numerics, plain, reference
from cpo_kernels.kernels.transform import transform_logits


def logp_by_hand(logits: list[float], target: int, bias=None, logit_scale=1.0, softcap=None, temperature=1.0) -> float:
    y = [(x + (bias[j] if bias else 0.0)) * logit_scale for j, x in enumerate(logits)]
    y = [softcap * math.tanh(v / softcap) if softcap else v for v in y]
    y = [v / temperature for v in y]
    top = max(y)
    return y[target] - top - math.log(sum(math.exp(v - top) for v in y))


def loss_by_hand(logits, targets, ref, ranks, *, beta, margin, length_normalized, contrast_weight, mle_weight, **head):
    """Section 1 of the design, one Python number at a time."""
    contrast, nll, best_tokens = 0.0, 0.0, 0
    for g, group in enumerate(targets):
        scores = {}
        for c, tokens in enumerate(group):
            logps = [logp_by_hand(logits[g][c][t], y, **head) for t, y in enumerate(tokens) if y != -100]
            if not logps:
                continue
            if ranks[g][c] == 0:
                nll, best_tokens = nll - sum(logps), best_tokens + len(logps)
            ratio = (sum(logps) - ref[g][c]) / (len(logps) if length_normalized else 1)
            scores[c] = beta * ratio + margin * (ranks[g][c] > 0)
        for i, score in scores.items():
            lower = [scores[j] for j in scores if ranks[g][j] > ranks[g][i]]
            if lower:
                top = max(score, *lower)
                contrast += top + math.log(math.exp(score - top) + sum(math.exp(s - top) for s in lower)) - score
    return contrast_weight * contrast / len(targets) + mle_weight * nll / best_tokens


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("head", [{}, {"logit_scale": 0.7, "softcap": 2.0, "temperature": 1.3}], ids=["plain", "head"])
@pytest.mark.parametrize("ranks", [[[0, 1, 1], [0, 1, 1]], [[2, 0, 1], [0, 0, 3]], [[1, 1, 0], [1, 2, 0]]])
def test_loss_equals_a_loop_over_numbers(ranks, head, length_normalized):
    problem = random_problem(G=2, C=3, V=5, bias=bool(head))
    if not head:
        problem.bias = None
    options = {"beta": 0.6, "margin": 0.3, "length_normalized": length_normalized}
    options |= {"contrast_weight": 1.7, "mle_weight": 0.4}
    logits, targets = dense(problem)
    expected = loss_by_hand(
        logits.tolist(),
        targets.tolist(),
        problem.ref_logps.tolist(),
        ranks,
        bias=None if problem.bias is None else problem.bias.tolist(),
        **options,
        **head,
    )
    given = {"ref_logps": problem.ref_logps, "ranks": torch.tensor(ranks), "bias": problem.bias}
    assert reference.cpo_loss(logits, targets, **given, **options, **head).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [n for n in PROBLEMS if n not in ("huge_logits", "larger_prime_vocab")])
def test_gradcheck(name):
    problem = PROBLEMS[name]().to(torch.float64)
    tensors = [t for t in problem.tensors if t is not None]

    def loss(hidden, weight, bias=None):
        problem.hidden, problem.weight, problem.bias = hidden, weight, bias
        return eager_loss(problem)

    torch.autograd.gradcheck(loss, tensors)


HEAD = {"bias": torch.tensor([0.3, -0.2, 0.1, 0.0, 0.5], dtype=torch.float64), "logit_scale": 0.7}


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("row_starts", [None, [0, 2, 2, 5]], ids=["one_per_row", "shared"])
def test_row_kernels_are_a_log_softmax_and_its_gradient(row_starts, softcap):
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, -100, 4]) if row_starts is None else torch.tensor([1, 3, 4, -100, 4])
    starts = None if row_starts is None else torch.tensor(row_starts)
    rows = plain.token_rows(targets, starts)
    head = (*HEAD.values(), softcap, 1.3)
    expected = reference.token_logps(
        logits[rows], targets, bias=HEAD["bias"], logit_scale=0.7, softcap=softcap, temperature=1.3
    )
    stats, logps = plain.row_forward(logits, targets, starts, *head)
    torch.testing.assert_close(logps, expected, rtol=1e-13, atol=1e-13)
    y = transform_logits(logits, *head)
    predicting = [0, 2]  # row 1 has no token
    torch.testing.assert_close(stats.sum(0)[predicting], y.logsumexp(-1)[predicting], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(stats[0][predicting], y.amax(-1)[predicting], rtol=0, atol=0)
    coef = torch.randn(targets.shape, dtype=torch.float64)
    (wanted,) = torch.autograd.grad((expected * coef).sum(), logits)
    grad = plain.row_backward(logits.detach(), targets, starts, stats.detach(), coef, *head)
    torch.testing.assert_close(grad, wanted, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pair_accumulation_keeps_what_a_half_precision_sum_loses(dtype):
    """A thousand small terms on a large one: the plain sum never moves, the pair loses only the low half's rounding."""
    steps, eps = 1000, torch.finfo(dtype).eps
    high, low = torch.full((64,), 8.0, dtype=dtype), torch.zeros(64, dtype=dtype)
    terms = (torch.rand(steps, 64) * 1e-3).to(dtype)
    for term in terms:
        numerics.accumulate_pair_(high, low, term)
    exact = 8.0 + terms.double().sum(0)
    assert (exact > 8.4).all()
    assert (high.double() - exact).abs().max() <= 8 * eps / 2 * 1.01
    # The low half is at most 8 * eps / 2; its roundings, of eps / 2 of it at most, add up as a random walk.
    assert (high.double() + low.double() - exact).abs().max() < steps**0.5 * (8 * eps / 2) * (eps / 2)
