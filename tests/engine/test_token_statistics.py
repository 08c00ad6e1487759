"""Entropies and samples of the forward pass, of every backend, against the softmax in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import BACKEND_DTYPE_IDS, BACKEND_DTYPES, BACKENDS, GemmCounter, budget_of, random_problem
from tolerance import assert_accurate

from cpo_kernels import linear_token_logps, linear_token_statistics
from cpo_kernels.kernels import counter_random, registry, sampling
from cpo_kernels.kernels.transform import transform_logits

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


@pytest.mark.parametrize("asked", [{}, {"entropy": True}], ids=["alone", "entropy"])
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES, ids=BACKEND_DTYPE_IDS)
def test_top1(backend, dtype, asked):
    """Half of the targets are the most probable words; a margin keeps what rounding decides out of the comparison."""
    head = {"softcap": 4.0, "logit_scale": -1.4, "temperature": 0.7}
    problem = random_problem(G=8, T=6, H=16, V=101, bias=True, **head).to(dtype)
    exact = distribution(problem, torch.float64).detach()
    targets = torch.where(torch.rand(problem.targets.shape) < 0.5, exact.argmax(-1), problem.targets)
    targets = targets.where(problem.targets != -100, -100)
    best = exact.topk(2, -1).values
    behind = best[..., 0] - exact.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    clear = torch.where(behind > 0, behind, best[..., 0] - best[..., 1]) > 0.1
    budget = {"bias": problem.bias, "backend": backend, "max_logits_bytes": budget_of(problem, 7), **head}
    out = linear_token_statistics(problem.hidden, problem.weight, targets, top1=True, **asked, **budget)
    assert out.top1.dtype == torch.bool and not out.top1[targets == -100].any()
    expected = (behind == 0) & (targets != -100)
    assert torch.equal(out.top1[clear], expected[clear])
    assert expected[clear].any() and not expected[clear].all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_top1_counts_words_that_are_as_probable_as_the_first(backend):
    hidden, weight = torch.randn(6, 8), torch.randn(40, 8)
    weight[30:] = weight[:10]
    first = (hidden @ weight[:10].T).argmax(-1)
    head = {"bias": torch.where(torch.arange(40) % 30 < 10, 100.0, 0.0), "backend": backend}
    for targets in (first, first + 30):
        assert linear_token_statistics(hidden, weight, targets, top1=True, **head).top1.all()
    assert linear_token_statistics(hidden, weight, first, **head).top1 is None


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


def chi_square_ratio(samples: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Chi-square of draws over its bound, for words that are all expected 5 times at least."""
    assert (probabilities * len(samples) >= 5).all()
    counts = samples.bincount(minlength=len(probabilities)).double()
    return chi_square(counts, probabilities) / chi_square_bound(len(counts) - 1)


@pytest.mark.parametrize("per_token", [False, True], ids=["one seed", "a seed per token"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_samples_follow_the_softmax_and_are_independent(backend, per_token):
    """Over both dimensions: the tokens' pairs of samples have the product of the distribution with itself."""
    hidden, weight = torch.randn(1, 8).expand(3000, 8), torch.randn(5, 8) * 0.3
    seed = torch.arange(3000) if per_token else 3  # seeds as alike as can be
    head = {"backend": backend, "max_logits_bytes": 5 * 4 * 700}
    samples = linear_token_statistics(
        hidden, weight, torch.zeros(3000, dtype=torch.int64), seed=seed, num_samples=3, **head
    ).samples
    assert samples.shape == (3000, 3)
    p = (hidden[0].double() @ weight.double().T).softmax(-1)
    joint = (p[:, None] * p[None, :]).flatten()
    for k in range(3):
        assert chi_square_ratio(samples[:, k], p) < 1
        assert chi_square_ratio(5 * samples[:, k] + samples[:, (k + 1) % 3], joint) < 1
    neighbours = 5 * samples[0::2, 0] + samples[1::2, 0]
    assert chi_square_ratio(neighbours, joint) < 1
    assert chi_square_ratio(6 * samples[:, 0], joint) > 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_of_a_token_depend_on_its_seed_alone(backend):
    """Not on the tokens beside it, absent ones among them, nor on the blocks, nor on how many samples there are."""
    hidden, weight, targets = torch.randn(40, 8), torch.randn(211, 8) * 0.2, torch.randint(0, 211, (40,))
    targets[5::7] = -100
    seeds = torch.randint(-(2**62), 2**62, (40,))
    whole = linear_token_statistics(hidden, weight, targets, seed=seeds, num_samples=3, backend=backend).samples
    assert (whole[5::7] == -100).all()
    budget = 211 * 4 * 9
    head = {"backend": backend, "max_logits_bytes": budget}
    assert torch.equal(
        linear_token_statistics(hidden, weight, targets, seed=seeds, num_samples=3, **head).samples, whole
    )
    order = torch.randperm(40)[:17]
    part = linear_token_statistics(
        hidden[order], weight, targets[order], seed=seeds[order], num_samples=2, backend=backend
    )
    assert torch.equal(part.samples, whole[order, :2])
    for token in (0, 8):
        one = slice(token, token + 1)
        alone = linear_token_statistics(hidden[one], weight, targets[one], seed=seeds[one], backend=backend)
        assert torch.equal(alone.samples, whole[one, 0])
    dense = linear_token_statistics(hidden, weight, targets, seed=seeds, backend=backend, skip_absent_rows=False)
    assert torch.equal(dense.samples, whole[:, 0])
    other = linear_token_statistics(hidden, weight, targets, seed=seeds + 1, backend=backend).samples
    assert (other != whole[:, 0]).float().mean() > 0.7


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_of_several_samples_is_the_only_one(backend):
    problem = random_problem(G=2, C=3, T=4, V=101).to(torch.float32)
    arguments = (problem.hidden * 0.1, problem.weight, problem.targets)
    one = linear_token_statistics(*arguments, seed=7, backend=backend).samples
    for seed in (7, torch.full(problem.targets.shape, 3)):
        several = linear_token_statistics(*arguments, seed=seed, num_samples=1, entropy=True, backend=backend)
        assert several.samples.shape == (*problem.targets.shape, 1)
        assert several.logps.shape == several.entropy.shape == problem.targets.shape
        assert torch.equal(several.samples[..., 0], one) == isinstance(seed, int)


@pytest.mark.parametrize("dense", [False, True], ids=["rows that count", "all rows"])
@pytest.mark.parametrize("per_token", [False, True], ids=["one seed", "a seed per token"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_of_a_mask_are_as_without_it(backend, per_token, dense):
    """Over absent tokens and several blocks, in whose rows all, some or no samples are wanted; the rest is the same."""
    hidden, weight, targets = torch.randn(2, 20, 8), torch.randn(101, 8) * 0.3, torch.randint(0, 101, (2, 20))
    targets[:, 5::7] = -100
    seed = torch.randint(-(2**62), 2**62, (2, 20)) if per_token else 3
    head = {"backend": backend, "max_logits_bytes": 101 * 4 * 9, "skip_absent_rows": not dense, "entropy": True}
    whole = linear_token_statistics(hidden, weight, targets, seed=seed, num_samples=3, **head)
    mask = torch.rand(2, 20, 3) < 0.4
    mask[0, :3], mask[0, 3:9] = True, False
    for chosen in (mask, torch.zeros_like(mask), mask.flip(0).transpose(0, 1).contiguous().transpose(0, 1)):
        some = linear_token_statistics(hidden, weight, targets, seed=seed, num_samples=3, sample_mask=chosen, **head)
        assert torch.equal(some.samples, whole.samples.where(chosen, -100))
        assert torch.equal(some.logps, whole.logps) and torch.equal(some.entropy, whole.entropy)
    one = linear_token_statistics(hidden, weight, targets, seed=seed, sample_mask=mask[..., 0], **head)
    assert torch.equal(one.samples.where(mask[..., 0], -100), one.samples)
    if per_token:
        assert torch.equal(one.samples, whole.samples[..., 0].where(mask[..., 0], -100))


@pytest.mark.cpu
def test_rows_that_want_no_sample_are_not_drawn_from(monkeypatch):
    """Their exponentials, most of the work of a sample, are not made."""
    drawn, words_at = [], sampling.words_at
    monkeypatch.setattr(
        sampling, "words_at", lambda masses, shares: drawn.append(len(masses)) or words_at(masses, shares)
    )
    mask = torch.zeros(40, 3, dtype=torch.bool)
    mask[[3, 3, 9, 30], [0, 2, 1, 1]] = True
    arguments = (torch.randn(40, 8), torch.randn(101, 8), torch.zeros(40, dtype=torch.int64))
    linear_token_statistics(*arguments, seed=1, num_samples=3, sample_mask=mask, backend="torch")
    assert sum(drawn) == 3


@pytest.mark.parametrize("backend", [name for name in BACKENDS if registry.BACKENDS[name].linear_statistics])
def test_several_samples_take_one_launch_of_a_fused_kernel(backend, monkeypatch):
    launch, launches = registry.BACKENDS[backend].linear_statistics, []
    counted = replace(
        registry.BACKENDS[backend], linear_statistics=lambda *a, **k: launches.append(1) or launch(*a, **k)
    )
    monkeypatch.setitem(registry.BACKENDS, backend, counted)
    arguments = (torch.randn(5, 8), torch.randn(31, 8), torch.zeros(5, dtype=torch.int64))
    linear_token_statistics(*arguments, seed=1, num_samples=7, backend=backend)
    assert len(launches) == 1


@pytest.mark.cpu
def test_several_samples_take_one_product():
    problem = random_problem(H=16, V=101).to(torch.float32)
    arguments = (problem.hidden, problem.weight, problem.targets)
    with GemmCounter() as counter:
        linear_token_statistics(*arguments, seed=1, num_samples=7, backend="torch")
    assert len(counter.shapes) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0, "seed": 1}, "num_samples must be at least 1 or None, got 0"),
        ({"num_samples": 2}, "num_samples=2 needs a seed"),
        ({"seed": torch.tensor([1, 2])}, r"shape of targets, \(3,\), got torch.int64 \(2,\)"),
        ({"seed": torch.tensor(0.5)}, r"seed must be an integer.* got torch.float32"),
        ({"seed": 1.5}, "seed must be an integer of 64 bits, got 1.5"),
        ({"seed": 2**63}, f"seed must be an integer of 64 bits, got {2**63}"),
        ({"seed": 1, "num_samples": 1.5}, "num_samples must be at least 1 or None, got 1.5"),
        ({"sample_mask": torch.ones(3) > 0}, "sample_mask needs a seed"),
        (
            {"seed": 1, "sample_mask": torch.ones(3)},
            r"must be torch.bool of shape \(3,\) on .* got torch.float32 \(3,\)",
        ),
        (
            {"seed": 1, "num_samples": 2, "sample_mask": torch.ones(3) > 0},
            r"sample_mask must be torch.bool of shape \(3, 2\) on .* got torch.bool \(3,\)",
        ),
    ],
    ids=[
        *("no samples", "no seed", "shape", "dtype", "fraction", "large", "fraction of a sample"),
        *("mask without a seed", "dtype of the mask", "shape of the mask"),
    ],
)
def test_seeds_and_numbers_of_samples_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        linear_token_statistics(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 2, 6]), **options)


@pytest.mark.cpu
def test_random_bits_are_those_of_splitmix64():
    """Against the generator in unbounded integers, at both ends of int64."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    got = counter_random.uniforms(torch.tensor(seeds)[:, None], torch.arange(3))
    for seed, row in zip(seeds, got.tolist(), strict=True):
        states = [(mix(seed % 2**64) + (k + 1) * 0x9E3779B97F4A7C15) % 2**64 for k in range(3)]
        assert row == [(mix(state) >> 11) / 2**53 for state in states]


@pytest.mark.cpu
@pytest.mark.parametrize("V", [1, 2, 3, 16, 31, 101, 1009])
def test_words_are_found_as_in_one_running_sum(V):
    """At random shares and at both ends; words of probability 0, at the ends and in whole chunks, are never found."""
    masses = torch.rand(50, V).square()
    masses[:, V // 3 : V // 2] = 0.0
    if V > 3:
        masses[:, [0, -1]] = 0.0
        masses[7, : V - 2] = 0.0
    shares = torch.rand(50, 6, dtype=torch.float64)
    shares[:, 0], shares[:, 1] = 0.0, 1 - 2.0**-53
    words = sampling.words_at(masses, shares)
    below = masses.double().cumsum(-1)
    assert torch.equal(words[:, 2:], torch.searchsorted(below, shares[:, 2:] * below[:, -1:], right=True))
    assert (masses.gather(1, words) > 0).all()
    assert torch.equal(words[:, 0], (masses > 0).int().argmax(-1))
    assert torch.equal(words[:, 1], V - 1 - (masses > 0).flip(-1).int().argmax(-1))


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


@pytest.mark.parametrize("offset", [1e5, -1e5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_entropies_keep_their_small_part_at_large_logits(backend, offset):
    """Logits that float32 holds exactly: only the formula can lose something."""
    steps = torch.randint(-512, 512, (3, 211)) / 128
    hidden, weight = torch.eye(3), (steps + offset).T.contiguous()
    got = linear_token_statistics(hidden, weight, torch.zeros(3, dtype=torch.int64), entropy=True, backend=backend)
    p = steps.double().softmax(-1)
    torch.testing.assert_close(got.entropy.double(), -(p * p.log()).sum(-1), rtol=2e-6, atol=0)


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
    seeds = torch.tensor([1, 2])
    out = linear_token_statistics(
        torch.randn(2, 4), torch.randn(7, 4), torch.tensor([-100, -100]), seed=seeds, num_samples=2, backend="torch"
    )
    assert out.samples.tolist() == [[-100, -100]] * 2
