"""Where the contrast is least (docs/objective.md, section 6): a tabular policy trained to convergence in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_language import (
    CONTEXTS,
    END,
    LENGTHS,
    LONGEST,
    TEXTS,
    chances,
    expected_contrast,
    gradient,
    groups_of,
    minimised,
    policy_of,
    random_distribution,
    random_policy,
    text_logps,
    tilted,
)
from torch import Tensor

pytestmark = pytest.mark.cpu


def optimum(groups: Tensor, probability: Tensor, ref: Tensor | None, **objective) -> Tensor:
    """Return the probabilities of texts at the least expected contrast; groups that cannot occur are left out."""
    groups, probability = groups[probability > 0], probability[probability > 0]
    ref_logps = None if ref is None else ref.log()
    policy = minimised(
        lambda policy: expected_contrast(text_logps(policy), groups, probability, ref_logps, **objective),
        random_policy(),
        steps=1000,
    )
    return text_logps(policy).exp()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("K", "beta"), [(1, 0.5), (1, 1.0), (1, 2.0), (2, 0.5), (2, 1.0)])
def test_the_optimum_is_the_reference_times_a_power_of_data_over_negatives(K, beta):
    data, negatives, ref, groups = random_distribution(), random_distribution(), random_distribution(), groups_of(K)
    found = optimum(groups, chances(groups, data, negatives), ref, beta=beta)
    close(found, tilted((ref, 1.0), (data, 1 / beta), (negatives, -1 / beta)))


def test_with_negatives_of_the_reference_beta_1_ends_at_the_data_and_less_beyond_it():
    data, ref, groups = random_distribution(), random_distribution(), groups_of(1)
    chance = chances(groups, data, ref)
    close(optimum(groups, chance, ref, beta=1.0), data)
    beyond = optimum(groups, chance, ref, beta=0.5)
    close(beyond, tilted((data, 2.0), (ref, -1.0)))
    short = optimum(groups, chance, ref, beta=2.0)
    ratios = [(texts / ref).log() for texts in (short, data, beyond)]
    spreads = [float(ratio.max() - ratio.min()) for ratio in ratios]
    assert spreads[0] < 0.6 * spreads[1] < 0.6 * 0.6 * spreads[2]


def test_without_a_reference_the_optimum_has_none_and_own_negatives_make_it_flat():
    data, negatives, groups = random_distribution(), random_distribution(), groups_of(1)
    found = optimum(groups, chances(groups, data, negatives), None, beta=0.5)
    close(found, tilted((data, 2.0), (negatives, -2.0)))
    found = optimum(groups, chances(groups, data, data), None, beta=0.5)
    close(found, torch.full_like(data, 1 / len(TEXTS)))


@pytest.mark.parametrize(("K", "with_reference"), [(1, True), (1, False), (2, True)])
def test_with_negatives_of_the_policy_training_stops_between_reference_and_data(K, with_reference):
    """Negatives drawn anew at every step: no loss is minimised, but gradients vanish at one place and lead there."""
    data, ref, beta, groups = random_distribution(), random_distribution(), 0.5, groups_of(K)
    ref_logps = ref.log() if with_reference else None
    expected = tilted((ref, beta / (1 + beta) * with_reference), (data, 1 / (1 + beta)))

    def step(policy: Tensor) -> Tensor:
        logps = text_logps(policy)
        chance = chances(groups, data, logps.detach().exp())
        return gradient(expected_contrast(logps, groups, chance, ref_logps, beta=beta), policy)

    there = policy_of(expected).requires_grad_()
    close(text_logps(there).exp(), expected)
    assert step(there).abs().max() < 1e-14
    policy = policy_of(ref)
    assert (text_logps(policy).exp() - expected).norm() > 0.1
    for _ in range(100):
        policy = (policy - 10.0 * step(policy.requires_grad_())).detach()
    torch.testing.assert_close(text_logps(policy).exp(), expected, rtol=0, atol=1e-3)


def test_draws_equal_to_the_truth_leave_the_optimum_of_one_negative():
    """The truth as its own negative has no gradient; of several negatives the rest is contrasted, and it moves."""
    data, negatives, ref, beta = random_distribution(), random_distribution(), random_distribution(), 1.0
    expected = tilted((ref, 1.0), (data, 1.0), (negatives, -1.0))
    groups = groups_of(1)
    wrong = groups[:, 1] != groups[:, 0]
    close(optimum(groups, chances(groups, data, negatives) * wrong, ref, beta=beta), expected)
    groups = groups_of(2)
    chance = chances(groups, data, negatives)
    wrong = groups[:, 1:] != groups[:, :1]
    there = policy_of(expected).requires_grad_()
    logps = text_logps(there)
    both = expected_contrast(logps, groups, chance * wrong.all(1), ref.log(), beta=beta)
    singles = [
        expected_contrast(logps, groups[:, [0, k]], chance * wrong[:, k - 1] * ~wrong[:, 2 - k], ref.log(), beta=beta)
        for k in (1, 2)
    ]
    assert gradient(both + sum(singles), there).abs().max() > 1e-3
    kept = expected_contrast(logps, groups, chance, ref.log(), beta=beta)
    assert gradient(kept, there).abs().max() < 1e-14


def test_batch_negatives_of_one_pool_compare_the_data_under_the_prompt_alone():
    """A pool of different texts, drawn without replacement and never the truth: what is as frequent cancels."""
    data, ref, beta = random_distribution(), random_distribution(), 0.5
    groups = groups_of(2)
    different = (groups[:, 0] != groups[:, 1]) & (groups[:, 0] != groups[:, 2]) & (groups[:, 1] != groups[:, 2])
    chance = data[groups[:, 0]] * different / ((len(TEXTS) - 1) * (len(TEXTS) - 2))
    close(optimum(groups, chance, ref, beta=beta), tilted((ref, 1.0), (data, 1 / beta)))


# For what the formula does not hold: it has a gradient where the formula says that it has none


@pytest.mark.parametrize(
    "what", ["ranks", "margin", "label smoothing", "two kinds", "length", "hinge", "ipo", "made of the truth"]
)
def test_what_has_another_optimum(what):
    data, negatives, ref = random_distribution(), random_distribution(), random_distribution()
    K = 2 if what in ("ranks", "two kinds") else 1
    groups, beta = groups_of(K), 0.5
    options = {
        "ranks": {"ranks": torch.arange(K + 1).expand(len(TEXTS) ** (K + 1), -1)},
        "margin": {"margin": 1.0},
        "label smoothing": {"label_smoothing": 0.1},
        "hinge": {"loss_type": "hinge"},
        "ipo": {"loss_type": "ipo"},
    }.get(what, {})
    chance = chances(groups, data, negatives)
    if what == "two kinds":
        chance = data[groups[:, 0]] * negatives[groups[:, 1]] * ref[groups[:, 2]]
        negatives = (negatives + ref) / 2
    if what == "made of the truth":
        given = torch.randn(len(TEXTS), len(TEXTS), dtype=torch.float64).softmax(1)
        chance, negatives = data[groups[:, 0]] * given[groups[:, 0], groups[:, 1]], data @ given
    there = policy_of(tilted((ref, 1.0), (data, 1 / beta), (negatives, -1 / beta))).requires_grad_()
    lengths = LENGTHS if what == "length" else 1.0
    logps, ref_logps = text_logps(there) / lengths, ref.log() / lengths
    assert gradient(expected_contrast(logps, groups, chance, ref_logps, beta=beta, **options), there).norm() > 1e-4


def test_truncations_alone_have_no_optimum():
    """Every truth is longer than its truncations, so a model that never ends is the better, the surer it is of it."""
    data, ref, beta = random_distribution(), random_policy().detach(), 0.5
    groups, chance = [], []
    for probability, truth in zip(data, TEXTS, strict=True):
        content = len([token for token in truth if token != END])
        for cut in range(1, content):
            groups.append([TEXTS.index(truth), TEXTS.index((*truth[:cut], END))])
            chance.append(probability / (content - 1))
    losses = []
    for push in (0.0, 10.0, 30.0, 100.0):
        policy = ref.clone()
        policy[:, END] -= push * (LONGEST - torch.tensor([len(context) for context in CONTEXTS]))
        logps = [text_logps(table) for table in (policy, ref)]
        loss = expected_contrast(logps[0], torch.tensor(groups), torch.stack(chance), logps[1], beta=beta)
        losses.append(float(loss / torch.stack(chance).sum()))
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 1e-9 < 0.69 < losses[0]
