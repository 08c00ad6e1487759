"""Entropies and samples of the forward pass, of every backend, against the softmax in float64."""

from __future__ import annotations

import math

import pytest
import torch
from problems import BACKEND_DTYPE_IDS, BACKEND_DTYPES, BACKENDS, budget_of, random_problem
from tolerance import assert_accurate

from cpo_kernels import linear_token_logps, linear_token_statistics
from cpo_kernels.reference import transform_logits

# A correct sampler fails a chi-square test as rarely as this.
SIGNIFICANCE_QUANTILE = 4.75  # of the standard normal: one in a million


def chi_square_bound(degrees: int) -> float:
    """Quantile of the chi-square distribution at SIGNIFICANCE_QUANTILE, by Wilson and Hilferty (1931)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + SIGNIFICANCE_QUANTILE * math.sqrt(spread)) ** 3


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected).square() / expected).sum())


def distribution(problem, dtype: torch.dtype) -> torch.Tensor:
    """Softmax (..., V) in ``dtype`` of a problem with the head's options."""
    logits = problem.hidden.to(dtype) @ problem.weight.to(dtype).T
    bias = None if problem.bias is None else problem.bias.to(dtype)
    return transform_logits(logits, bias, **problem.options).log_softmax(-1)


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 4.0, "logit_scale": 1.4, "temperature": 0.7}], ids=["plain", "head"]
)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=BACKEND_DTYPE_IDS)
def test_logps_and_entropy(backend, dtype, options):
    problem = random_problem(H=16, V=101, bias=bool(options), **options).to(dtype)
    arguments = (problem.hidden, problem.weight, problem.targets)
    head = {"bias": problem.bias, "backend": backend, "max_logits_bytes": budget_of(problem, 7), **options}
    out = linear_token_statistics(*arguments, entropy=True, **head)
    assert out.samples is None
    torch.testing.assert_close(out.logps, linear_token_logps(*arguments, **head).detach(), rtol=2e-2, atol=1e-3)
    absent = problem.targets == -100
    assert (out.entropy[absent] == 0).all()
    assert (out.logps[absent] == 0).all()
    entropies = []
    for to in (dtype, torch.float64):
        log_p = distribution(problem, to).detach()
        entropies.append(-(log_p.exp() * log_p).sum(-1).masked_fill(absent, 0.0))
    assert_accurate(out.entropy, *entropies, "entropy")


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_follow_the_softmax(backend):
    """3,000 draws of each of two rows, over chunks that must not repeat each other's random numbers."""
    hidden, weight = torch.randn(2, 8).repeat_interleave(3000, 0), torch.randn(23, 8)
    targets = torch.zeros(6000, dtype=torch.int64)
    head = {"backend": backend, "temperature": 1.7, "max_logits_bytes": 23 * 4 * 500}
    samples = linear_token_statistics(hidden, weight, targets, seed=3, **head).samples.view(2, 3000)
    probabilities = (hidden[::3000].double() @ weight.double().T / 1.7).softmax(-1)
    for row in range(2):
        counts = samples[row].bincount(minlength=23).double()
        keep = probabilities[row] * 3000 >= 5
        rest = torch.stack([counts[~keep].sum(), probabilities[row][~keep].sum()])
        pooled = torch.cat([counts[keep], rest[:1]]), torch.cat([probabilities[row][keep], rest[1:]])
        assert chi_square(*pooled) < chi_square_bound(len(pooled[0]) - 1)
        assert chi_square(counts, torch.full((23,), 1 / 23, dtype=torch.float64)) > chi_square_bound(22)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_repeat_for_a_seed_only(backend):
    problem = random_problem(G=4, C=3, T=10, V=211).to(torch.float32)
    arguments = (problem.hidden * 0.1, problem.weight, problem.targets)
    first, again, other = (
        linear_token_statistics(*arguments, seed=seed, backend=backend).samples for seed in (7, torch.tensor(7), 8)
    )
    assert torch.equal(first, again)
    present = problem.targets != -100
    assert (first != other)[present].float().mean() > 0.9
    assert (first[~present] == -100).all()
    assert ((first >= 0) & (first < 211))[present].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_words_and_rows_without_a_distribution(backend):
    bias = torch.full((31,), -torch.inf)
    bias[[4, 30]] = 0.0
    hidden, targets = torch.randn(500, 5), torch.full((500,), 4)
    hidden[10] = torch.nan
    out = linear_token_statistics(hidden, torch.randn(31, 5), targets, bias=bias, seed=0, entropy=True, backend=backend)
    assert set(out.samples.tolist()) == {-100, 4, 30}
    assert (out.samples == -100).nonzero().tolist() == [[10]]
    assert out.entropy[10].isnan()
    assert (out.entropy[:10] <= math.log(2) + 1e-6).all()


def test_nothing_is_computed_that_was_not_asked_for():
    out = linear_token_statistics(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, -100, 6]))
    assert out.entropy is None
    assert out.samples is None
    assert not out.logps.requires_grad


def test_autocast_leaves_the_products_alone():
    problem = random_problem(H=64, V=101).to(torch.float32)
    arguments = (problem.hidden.bfloat16(), problem.weight.bfloat16(), problem.targets)
    head = {"logits_dtype": torch.float32, "backend": "torch"}
    expected = linear_token_statistics(*arguments, **head).logps
    with torch.autocast(arguments[0].device.type, dtype=torch.bfloat16):
        assert torch.equal(linear_token_statistics(*arguments, **head).logps, expected)


def test_no_tokens():
    out = linear_token_statistics(
        torch.randn(2, 4), torch.randn(7, 4), torch.tensor([-100, -100]), seed=1, entropy=True, backend="torch"
    )
    assert out.logps.tolist() == out.entropy.tolist() == [0.0, 0.0]
    assert out.samples.tolist() == [-100, -100]
