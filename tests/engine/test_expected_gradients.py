"""Expected gradients of the contrast where it starts (docs/objective.md, section 6): sums over every text, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_language import (
    CONTEXTS,
    END,
    LENGTHS,
    LONGEST,
    TEXTS,
    VOCAB,
    chances,
    expected_contrast,
    gradient,
    groups_of,
    minimised,
    random_distribution,
    random_policy,
    scores_of_texts,
    text_logps,
    tilted,
    token_logp,
)
from torch import Tensor

from cpo_kernels import contrastive_loss, cpo_loss

pytestmark = pytest.mark.cpu

BETA = 0.3


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def apart(got: Tensor, expected: Tensor) -> bool:
    """Tell whether two gradients differ by more than a twentieth, in direction or size."""
    return bool((got - expected).norm() > 0.05 * expected.norm())


def nll(policy: Tensor, data: Tensor) -> Tensor:
    """Return the negative log-likelihood of a text, summed over its tokens."""
    return -(data @ text_logps(policy))


def start(policy: Tensor, data: Tensor, negatives: Tensor, K: int, **objective) -> Tensor:
    """Return the expected gradient of the contrast where the policy is the reference."""
    logps, groups = text_logps(policy), groups_of(K)
    loss = expected_contrast(logps, groups, chances(groups, data, negatives), logps, beta=BETA, **objective)
    return gradient(loss, policy)


def own(policy: Tensor) -> Tensor:
    return text_logps(policy).detach().exp()


# Negatives of the reference's own


def test_log_likelihoods_of_own_texts_have_no_expected_gradient():
    """Texts that were cut off among them."""
    policy = random_policy()
    assert (own(policy).sum() - 1).abs() < 1e-14 and min(map(len, TEXTS)) == 1 and TEXTS[-1][-1] != END
    scores = scores_of_texts(policy)
    assert (scores.abs().amax(0) > 0.01).all()
    close(own(policy) @ scores, torch.zeros(scores.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("K", [1, 2, 3])
def test_own_negatives_begin_as_likelihood(K):
    policy, data = random_policy(), random_distribution()
    close(start(policy, data, own(policy), K), BETA * K / (K + 1) * gradient(nll(policy, data), policy))


@pytest.mark.parametrize("K", [1, 2])
def test_noise_of_negatives(K):
    """Their covariance is beta^2 K / (K+1)^2 times the Fisher information, beside that of the truth."""
    policy, data = random_policy(), random_distribution()
    logps, groups = text_logps(policy).detach(), groups_of(K)
    candidates = logps[groups].requires_grad_()
    contrastive_loss(candidates, ref_logps=logps[groups], beta=BETA, reduction="sum").backward()
    scores = scores_of_texts(policy)
    gradients = torch.einsum("gc,gcp->gp", candidates.grad, scores[groups])

    def covariance(values: Tensor, probability: Tensor) -> Tensor:
        centred = values - probability @ values
        return centred.T @ (probability[:, None] * centred)

    fisher = covariance(scores, own(policy))
    noise = BETA**2 * ((K / (K + 1)) ** 2 * covariance(scores, data) + K / (K + 1) ** 2 * fisher)
    close(covariance(gradients, chances(groups, data, own(policy))), noise)
    # Of a model that is the data's distribution: 1 + 1/K times the noise of likelihood at the same mean.
    of_mle = (BETA * K / (K + 1)) ** 2 * fisher
    close(covariance(gradients, chances(groups, own(policy), own(policy))), (1 + 1 / K) * of_mle)


def padded(text: tuple[int, ...]) -> list[int]:
    return [*text, *[-100] * (LONGEST - len(text))]


def text_logits(policy: Tensor, text: tuple[int, ...]) -> Tensor:
    """Return the logits (T, V) that predict a text's tokens."""
    rows = [policy[CONTEXTS.index(text[:t])] if t < len(text) else policy[0] for t in range(LONGEST)]
    return torch.stack(rows)


def test_a_step_begins_as_likelihood_times_alpha_beta_and_length():
    """The whole loss of a step, of two truths; the mean over its draws does not ask how they depend on each other."""
    policy, alpha, truths = random_policy(), 0.4, [TEXTS[0], TEXTS[-1]]
    length = sum(map(len, truths)) / len(truths)
    loss = torch.zeros((), dtype=torch.float64)
    for probability, negative in zip(own(policy), TEXTS, strict=True):
        candidates = [[truth, negative] for truth in truths]
        logits = torch.stack([torch.stack([text_logits(policy, text) for text in group]) for group in candidates])
        targets = torch.tensor([[padded(text) for text in group] for group in candidates])
        ref = torch.stack([text_logps(policy).detach()[[TEXTS.index(t) for t in group]] for group in candidates])
        loss += (
            probability
            * cpo_loss(logits, targets, ref_logps=ref, beta=BETA, contrast_weight=alpha, mle_weight=1 - alpha).loss
        )
    by_token = -sum(text_logps(policy)[TEXTS.index(t)] for t in truths) / sum(map(len, truths))
    factor = alpha * BETA * 0.5 * length + 1 - alpha
    torch.testing.assert_close(gradient(loss, policy), factor * gradient(by_token, policy), rtol=1e-9, atol=1e-12)


def bigram_policy(table: Tensor) -> Tensor:
    """Return the policy of a model that sees the last token alone, and so cannot be the data."""
    return table[[context[-1] if context else END for context in CONTEXTS]]


@pytest.mark.parametrize("K", [1, 2])
def test_a_converged_model_is_stationary_even_if_it_cannot_be_the_data(K):
    data, table = random_distribution(), torch.randn(VOCAB, VOCAB, dtype=torch.float64)
    table = minimised(lambda t: nll(bigram_policy(t), data), table).requires_grad_()
    policy = bigram_policy(table)
    logps, groups = text_logps(policy), groups_of(K)
    assert (own(policy) - data).abs().max() > 0.01
    loss = expected_contrast(logps, groups, chances(groups, data, own(policy)), logps, beta=BETA)
    assert gradient(loss, table).abs().max() < 1e-9
    colder = tilted((own(policy), 2.0))
    loss = expected_contrast(logps, groups, chances(groups, data, colder), logps, beta=BETA)
    assert gradient(loss, table).abs().max() > 1e-3


# Other negatives, drawn independently of the truth


@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("normalized", [False, True])
def test_any_independent_negatives_take_their_likelihood_from_that_of_the_truth(K, normalized):
    """Texts of other prompts, of another temperature or of another model; also means over tokens."""
    policy, data, negatives = random_policy(), random_distribution(), random_distribution()
    logps = text_logps(policy) / LENGTHS if normalized else text_logps(policy)
    groups = groups_of(K)
    loss = expected_contrast(logps, groups, chances(groups, data, negatives), logps, beta=BETA)
    close(gradient(loss, policy), BETA * K / (K + 1) * gradient((negatives - data) @ logps, policy))
    assert apart(gradient(loss, policy), BETA * K / (K + 1) * gradient(-data @ logps, policy))


def test_means_over_tokens_add_a_push_to_longer_texts():
    policy, data = random_policy(), random_distribution()
    logps, groups = text_logps(policy) / LENGTHS, groups_of(1)
    loss = expected_contrast(logps, groups, chances(groups, data, own(policy)), logps, beta=BETA)
    by_text = gradient(-data @ logps, policy)
    shortness = gradient(text_logps(policy).exp() @ (1 / LENGTHS), policy)
    close(gradient(loss, policy), BETA / 2 * (by_text + shortness))
    assert shortness.norm() > 0.05 * by_text.norm()
    loss = expected_contrast(logps, groups, chances(groups, own(policy), own(policy)), logps, beta=BETA)
    close(gradient(loss, policy), torch.zeros_like(policy))


def test_without_a_reference_a_converged_model_is_flattened():
    policy, K = random_policy(), 2
    logps, groups = text_logps(policy), groups_of(K)
    chance = chances(groups, own(policy), own(policy))
    got = gradient(expected_contrast(logps, groups, chance, beta=BETA), policy)
    share = (BETA * logps.detach()[groups]).softmax(1)[:, 0]
    close(got, BETA * (K + 1) * gradient((chance * share) @ logps[groups[:, 0]], policy))
    entropy = gradient(-(logps.exp() @ logps), policy)
    assert (got * entropy).sum() < -0.01 * got.norm() * entropy.norm()
    # With data of another distribution and more than a little beta, not even the direction is that of likelihood.
    data = random_distribution()
    got = gradient(expected_contrast(logps, groups, chances(groups, data, own(policy)), beta=1.0), policy)
    assert torch.cosine_similarity(got.flatten(), gradient(nll(policy, data), policy).flatten(), dim=0) < 0.999
    got = gradient(expected_contrast(logps, groups, chances(groups, data, own(policy)), beta=1e-7), policy)
    torch.testing.assert_close(got / 1e-7, K / (K + 1) * gradient(nll(policy, data), policy), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"margin": 0.7}, lambda K: BETA * K * math.exp(0.7) / (K * math.exp(0.7) + 1)),
        ({"loss_type": "hinge"}, lambda _: BETA),
        ({"loss_type": "ipo"}, lambda _: 1 / BETA),
        ({"label_smoothing": 0.1}, lambda _: BETA * (1 / 2 - 0.1)),
    ],
)
def test_other_options_have_another_factor(options, factor):
    """A weight w of the negatives is a margin of log w (docs/negatives.md)."""
    policy, data = random_policy(), random_distribution()
    for K in (1, 2) if "margin" in options else (1,):
        close(start(policy, data, own(policy), K, **options), factor(K) * gradient(nll(policy, data), policy))


# Ranks


def test_ranks_that_do_not_depend_on_the_texts_change_nothing_at_the_start():
    policy, data, K = random_policy(), random_distribution(), 3
    got = start(policy, data, own(policy), K, ranks=torch.arange(K + 1).expand(len(TEXTS) ** (K + 1), -1))
    close(got, BETA * K / (K + 1) * gradient(nll(policy, data), policy))


def test_ranks_by_likeness_add_a_policy_gradient_for_likeness():
    """The reward of a negative is minus its coefficient, which is larger the farther behind it ranks."""
    policy, data, K = random_policy(), random_distribution(), 2
    groups, likeness = groups_of(K), torch.rand(len(TEXTS), len(TEXTS), dtype=torch.float64)
    first, second = (likeness[groups[:, 0], groups[:, k]] for k in (1, 2))
    behind = torch.stack([first < second, second < first], 1)
    tied = first == second
    ranks = torch.stack([torch.zeros_like(tied), 1 + (first < second), 1 + (second < first)], 1).long()
    got = start(policy, data, own(policy), K, ranks=ranks)
    # Section 3 with equal scores: sigmoid(log m) = m / (m + 1), where m candidates rank lower.
    coefficients = (1 / 3 - 1 / 2 + behind.double()).masked_fill(tied[:, None], 1 / 3)
    chance = chances(groups, data, own(policy))
    reward = sum((chance * -coefficients[:, k - 1]) @ text_logps(policy)[groups[:, k]] for k in (1, 2))
    close(got, BETA * (2 / 3 * gradient(nll(policy, data), policy) - gradient(reward, policy)))
    assert apart(got, BETA * 2 / 3 * gradient(nll(policy, data), policy))


# Negatives made of the truth


def pairs(policy: Tensor, draws: list[tuple[float, tuple[int, ...], tuple[int, ...]]]) -> Tensor:
    """Return the gradient of the contrast of (probability, truth, negative), the policy being the reference."""
    texts = sorted({text for _, *pair in draws for text in pair})
    groups = torch.tensor([[texts.index(truth), texts.index(negative)] for _, truth, negative in draws])
    probability = torch.tensor([float(p) for p, _, _ in draws], dtype=torch.float64)
    logps = torch.stack([sum(token_logp(policy, text[:t], text[t]) for t in range(len(text))) for text in texts])
    return gradient(expected_contrast(logps, groups, probability, logps, beta=BETA), policy)


def until_end(text: tuple[int, ...]) -> tuple[int, ...]:
    return text[: text.index(END) + 1] if END in text else text


def mean_field_draws(policy: Tensor, truth: tuple[int, ...], replaced: tuple[int, ...]):
    """Yield probability and tokens of each draw in place of some positions of a truth, not yet cut at its end."""
    choices = [range(VOCAB) if t in replaced else [truth[t]] for t in range(len(truth))]
    for tokens in torch.cartesian_prod(*[torch.tensor(own) for own in choices]).view(-1, len(truth)).tolist():
        logp = sum(token_logp(policy, truth[:t], tokens[t]) for t in replaced) if replaced else torch.zeros(())
        yield logp.detach().exp(), tuple(tokens)


@pytest.mark.parametrize("share", ["all positions", "one position"])
def test_mean_field_negatives_push_predictions_after_wrong_tokens_from_those_after_the_truth(share):
    policy, data = random_policy(), random_distribution()
    draws, expected = [], torch.zeros((), dtype=torch.float64)
    for p_truth, truth in zip(data, TEXTS, strict=True):
        content = [t for t in range(len(truth)) if truth[t] != END]
        sets = [tuple(range(len(truth)))] if share == "all positions" or not content else [(t,) for t in content]
        for replaced in sets:
            for p_draw, tokens in mean_field_draws(policy, truth, replaced):
                chance = p_truth / len(sets) * p_draw
                draws.append((chance, truth, until_end(tokens)))
                for t in range(len(until_end(tokens))):
                    if t in replaced:  # the mean over the token drawn here is a divergence's gradient
                        rows = [policy[CONTEXTS.index(text[:t])].log_softmax(0) for text in (truth, tokens)]
                        expected = expected + chance * (rows[0].detach().exp() * (rows[0].detach() - rows[1])).sum()
                    else:
                        expected = expected - chance * token_logp(policy, tokens[:t], truth[t])
    likelihood = gradient(nll(policy, data), policy)
    close(pairs(policy, draws), BETA / 2 * (likelihood - gradient(expected, policy)))
    assert apart(pairs(policy, draws), BETA / 2 * likelihood), "it is not that of negatives of the model's own"


def test_mean_field_negatives_move_a_converged_model():
    policy = random_policy()
    draws = [
        (p_truth * p_draw, truth, until_end(tokens))
        for p_truth, truth in zip(own(policy), TEXTS, strict=True)
        for p_draw, tokens in mean_field_draws(policy, truth, tuple(range(len(truth))))
    ]
    assert gradient(nll(policy, own(policy)), policy).norm() < 1e-12 < 1e-3 < pairs(policy, draws).norm()


def cuts_of(truth: tuple[int, ...]) -> list[int]:
    content = len([token for token in truth if token != END])
    return list(range(1, content)) if content > 1 else list(range(content))


def test_truncations_teach_what_follows_the_cut_and_against_the_end_there():
    policy, data = random_policy(), random_distribution()
    draws, expected = [], torch.zeros((), dtype=torch.float64)
    for p_truth, truth in zip(data, TEXTS, strict=True):
        for cut in cuts_of(truth):
            chance = p_truth / len(cuts_of(truth))
            draws.append((chance, truth, (*truth[:cut], END)))
            tail = sum(token_logp(policy, truth[:t], truth[t]) for t in range(cut, len(truth)))
            expected = expected - chance * (tail - token_logp(policy, truth[:cut], END))
    close(pairs(policy, draws), BETA / 2 * gradient(expected, policy))
    # What the candidates share cancels wherever the policy is; the end never follows a cut in the truth.
    whole = next(text for text in TEXTS if len(cuts_of(text)) == 1 and len(text) == LONGEST and END in text)
    alone = pairs(policy, [(1.0, whole, (*whole[:1], END))])
    assert alone[CONTEXTS.index(())].abs().max() < 1e-15 < 1e-2 < alone[CONTEXTS.index(whole[:1]), END]
    converged = [
        (p / len(cuts_of(t)), t, (*t[:c], END)) for p, t in zip(own(policy), TEXTS, strict=True) for c in cuts_of(t)
    ]
    assert pairs(policy, converged).norm() > 1e-2, "a converged model is not stationary"
