"""Mean-field negatives: what they are drawn from, where they end, and that an example's are its own affair."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from devices import DEVICE

from cpo_kernels import CandidateLayout, linear_cpo_loss, linear_token_logps
from cpo_kernels.negatives import finish, is_wrong, mean_field_negatives, token_seeds

EOS = 2


def test_draws_and_log_likelihood_come_from_the_same_rows():
    hidden, weight = torch.randn(6, 8), torch.randn(31, 8)
    targets = torch.tensor([3, 4, -100, 5, 6, 2])
    out = mean_field_negatives(hidden, weight, targets, seeds=1, count=4, temperature=0.7)
    assert out.samples.shape == (4, 6)
    assert (out.samples[:, 2] == -100).all()
    torch.testing.assert_close(out.logps, linear_token_logps(hidden, weight, targets, temperature=0.7))
    sharp = mean_field_negatives(hidden, weight, targets, seeds=1, temperature=1e-4).samples[0]
    argmax = (hidden @ weight.T).argmax(-1).masked_fill(targets == -100, -100)
    assert torch.equal(sharp, argmax)


def test_every_token_follows_its_own_distribution():
    """4,000 draws of three tokens whose distributions differ, independent of one another."""
    hidden, weight = torch.randn(3, 8), torch.randn(4, 8) * 0.4
    samples = mean_field_negatives(hidden, weight, torch.zeros(3, dtype=torch.int64), seeds=5, count=4000).samples
    p = (hidden.double() @ weight.double().T).softmax(-1)
    for token in range(3):
        error = samples[:, token].bincount(minlength=4) / 4000 - p[token]
        assert (error.abs() < 5 * (p[token] * (1 - p[token]) / 4000).sqrt()).all()
    joint = (4 * samples[:, 0] + samples[:, 1]).bincount(minlength=16) / 4000
    expected = (p[0][:, None] * p[1]).flatten()
    assert ((joint - expected).abs() < 5 * (expected / 4000).sqrt()).all()


def test_an_example_draws_the_same_whatever_shares_its_call():
    hidden, weight, targets = torch.randn(12, 8), torch.randn(31, 8) * 0.3, torch.randint(0, 31, (12,))
    lengths = [5, 4, 3]
    seeds = torch.cat([token_seeds(9, 7, example, n) for example, n in enumerate(lengths)]).to(DEVICE)
    together = mean_field_negatives(hidden, weight, targets, seeds=seeds, count=3).samples
    alone = mean_field_negatives(hidden[5:9], weight, targets[5:9], seeds=token_seeds(9, 7, 1, 4).to(DEVICE), count=2)
    assert torch.equal(together[:2, 5:9], alone.samples)


def test_negatives_draw_the_tokens_of_a_mask_alone():
    """Each its own, and those that it draws are the same as without a mask."""
    arguments = torch.randn(6, 8), torch.randn(31, 8), torch.tensor([3, 4, -100, 5, 6, 2])
    whole = mean_field_negatives(*arguments, seeds=1, count=4)
    mask = torch.rand(4, 6) < 0.5
    some = mean_field_negatives(*arguments, seeds=1, count=4, mask=mask)
    assert torch.equal(some.samples, whole.samples.where(mask, -100)) and torch.equal(some.logps, whole.logps)
    with pytest.raises(ValueError, match=r"mask must have shape \(4, 6\), got \(6, 4\)"):
        mean_field_negatives(*arguments, seeds=1, count=4, mask=mask.T)


@pytest.mark.cpu
def test_seeds_of_tokens():
    """A function of all that is given, prefixes of one another, and as many different ones as there can be."""
    assert torch.equal(token_seeds(1, 2, 3, 4), token_seeds(1, 2, 3, 9)[:4])
    keys = [(seed, step, example) for seed in (0, 1, 2**40) for step in (-1, 0, 1, 11) for example in (0, 1, 11)]
    seeds = torch.cat([token_seeds(*key, 50) for key in keys])
    assert seeds.dtype == torch.int64
    assert seeds.unique().numel() == len(keys) * 50
    assert token_seeds(2**70, -(2**70), 0, 0).shape == (0,)
    ones = torch.stack([(seeds >> bit) & 1 for bit in range(64)]).double().mean(-1)
    assert ((ones - 0.5).abs() < 5 * 0.5 / len(seeds) ** 0.5).all()


@pytest.mark.cpu
def test_a_negative_ends_behind_its_first_eos():
    samples = torch.tensor([[5, EOS, 7, EOS], [5, 6, 7, 8], [EOS, 6, 7, EOS], [5, 6, 7, EOS], [5, -100, 7, EOS]])
    assert finish(samples, EOS) == [[5, EOS], [5, 6, 7, 8], [EOS], [5, 6, 7, EOS], [5]]


@pytest.mark.cpu
def test_the_ground_truth_is_no_negative():
    assert not is_wrong([4, 5, EOS], (4, 5, EOS))
    assert not is_wrong([], [4, EOS])
    assert is_wrong([4, 5], [4, 5, EOS])


@pytest.mark.cpu
def test_plain_loop():
    """The documentation's loop: one pass draws, one pass over truth and negative gives the loss, a step is taken."""
    model = tiny_models.llama()
    prompt, completion = [3, 4, 5], [6, 7, 8, 9, EOS]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        with torch.no_grad():
            hidden = model.base_model(torch.tensor([prompt + completion])).last_hidden_state[0]
        predicting = hidden[len(prompt) - 1 : -1]
        seeds = token_seeds(0, 0, 0, len(completion))
        out = mean_field_negatives(predicting, model.lm_head.weight, torch.tensor(completion), seeds=seeds, count=3)
        negatives = [negative for negative in finish(out.samples, EOS) if is_wrong(negative, completion)]
        candidates = [completion, *negatives]

        width = max(map(len, candidates))
        ids = torch.tensor([prompt + candidate + [0] * (width - len(candidate)) for candidate in candidates])
        rows = [s * ids.shape[1] + len(prompt) - 1 + t for s, c in enumerate(candidates) for t in range(len(c))]
        cu_tokens = torch.tensor([0, *map(len, candidates)]).cumsum(0).tolist()
        layout = CandidateLayout(cu_tokens, [0, len(candidates)], rows=torch.tensor(rows))
        targets = torch.tensor([token for candidate in candidates for token in candidate])
        states = model.base_model(ids).last_hidden_state.flatten(0, 1)
        loss = linear_cpo_loss(states, model.lm_head.weight, targets, layout=layout, mle_weight=0.5).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert len(negatives) > 0
    assert losses[-1] < losses[0]
