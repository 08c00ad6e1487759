"""Draws equal to the truth, as the trainer leaves them out: expected gradients (docs/objective.md, section 6)."""

from __future__ import annotations

from contextlib import nullcontext
from math import comb

import pytest
import tiny_models
import torch
from tiny_language import TEXTS, expected_contrast, gradient, groups_of, random_distribution, random_policy, text_logps
from torch import Tensor
from trainer_runs import config
from trainer_steps import NONE

from cpo_kernels.trainer.data import TokenizedExamples
from cpo_kernels.trainer.negatives import Negatives
from cpo_kernels.trainer.reference import Sources

pytestmark = pytest.mark.cpu

BETA = 0.3


def trainer_groups(path, K: int) -> list[list[int]]:
    """Return the candidates, as indices of texts, that the trainer makes of every truth and every K draws."""
    sources = Sources(lambda: torch.nn.Module(), None, {}, nullcontext, torch.device("cpu"))
    negatives = Negatives(
        config(path, num_autoregressive_negatives=K, **NONE), tiny_models.tokenizer(eos_token="<s>"), sources
    )
    examples = TokenizedExamples([[5]] * len(TEXTS), TEXTS)
    truths = range(len(TEXTS))
    made: dict[tuple[int, ...], list[int]] = {}
    for draws in groups_of(K - 1).tolist():
        negatives.store.negatives = {(0, truth): [list(TEXTS[draw]) for draw in draws] for truth in truths}
        for truth, drawn in zip(truths, negatives.draw(examples, truths, 0), strict=True):
            made[(truth, *draws)] = [truth, *(TEXTS.index(tuple(negative.tokens)) for negative in drawn.negatives)]
    return [made[tuple(group)] for group in groups_of(K).tolist()]


def expected_loss(policy: Tensor, data: Tensor, made: list[list[int]], K: int) -> Tensor:
    """Return the contrast at the start, averaged over the truth and over K draws of the reference."""
    logps, drawn = text_logps(policy), groups_of(K)
    chance = data[drawn[:, 0]] * logps.detach().exp()[drawn[:, 1:]].prod(1)
    loss = torch.zeros((), dtype=torch.float64)
    for size in range(2, K + 2):
        here = [i for i, group in enumerate(made) if len(group) == size]
        groups = torch.tensor([made[i] for i in here])
        loss = loss + expected_contrast(logps, groups, chance[here], logps, beta=BETA)
    return loss


def weight_by_number(p: Tensor, K: int) -> Tensor:
    """Return the mean of k / (k + 1) over the number k of wrong draws, divided by the probability of a wrong one."""
    chances = [comb(K, k) * (1 - p) ** k * p ** (K - k) for k in range(K + 1)]
    return sum(chance * k / (k + 1) for k, chance in enumerate(chances)) / (1 - p)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_a_truth_weighs_the_more_the_likelier_it_is(tmp_path, K):
    policy, data = random_policy(), random_distribution()
    made = trainer_groups(tmp_path, K)
    assert {len(group) for group in made} == set(range(2, K + 2))
    p = text_logps(policy).detach().exp()
    weight = sum((K - j) * p**j for j in range(K)) / (K + 1)
    torch.testing.assert_close(weight, weight_by_number(p, K), rtol=1e-12, atol=0)
    got = gradient(expected_loss(policy, data, made, K), policy)
    expected = BETA * gradient(-(data * weight) @ text_logps(policy), policy)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    kept = BETA * K / (K + 1) * gradient(-data @ text_logps(policy), policy)
    assert ((got - kept).norm() < 1e-12) == (K == 1)


def test_of_a_given_number_of_wrong_draws_each_truth_weighs_as_if_divided_by_the_chance_of_one(tmp_path):
    policy, K = random_policy(), 2
    made = trainer_groups(tmp_path, K)
    logps, p = text_logps(policy), text_logps(policy).detach().exp()
    for truth in range(len(TEXTS)):
        drawn = [group for group in made if group[0] == truth and truth not in group[1:] and len(group) == K + 1]
        groups = torch.tensor(drawn)
        chance = p[groups[:, 1:]].prod(1)
        loss = expected_contrast(logps, groups, chance / chance.sum(), logps, beta=BETA)
        expected = BETA * K / (K + 1) / (1 - p[truth]) * gradient(-logps[truth], policy)
        torch.testing.assert_close(gradient(loss, policy), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("K", [1, 2])
def test_a_converged_model_is_sharpened_by_more_than_one_negative(tmp_path, K):
    policy = random_policy()
    texts = text_logps(policy).exp()
    got = gradient(expected_loss(policy, texts.detach(), trainer_groups(tmp_path, K), K), policy)
    sharpness = sum((K - j) / (j + 1) * (texts ** (j + 1)).sum() for j in range(1, K)) / (K + 1)
    expected = -BETA * gradient(sharpness, policy) if K > 1 else torch.zeros_like(policy)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert (got.norm() > 1e-3) == (K > 1)
