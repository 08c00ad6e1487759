"""Mean-field negatives: what they replace, what that is drawn from, where they end, and what it depends on."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import combinations, pairwise

import pytest
import tiny_models
import torch
from devices import DEVICE

from cpo_kernels import CandidateLayout, linear_cpo_loss, linear_token_logps, linear_token_statistics
from cpo_kernels.negatives import finish, mean_field_negatives, mean_field_samples, token_seeds
from cpo_kernels.negatives.mean_field import replaced_positions

EOS, TURN_END = 2, 30
ALL = {"mean_field_fraction": 1.0}


def test_draws_and_log_likelihood_come_from_the_same_rows():
    hidden, weight = torch.randn(6, 8), torch.randn(31, 8)
    targets = torch.tensor([3, 4, -100, 5, 6, 2])
    out = mean_field_samples(hidden, weight, targets, seeds=1, count=4, temperature=0.7, **ALL)
    assert out.samples.shape == (4, 6)
    assert (out.samples[:, 2] == -100).all()
    torch.testing.assert_close(out.logps, linear_token_logps(hidden, weight, targets, temperature=0.7))
    sharp = mean_field_samples(hidden, weight, targets, seeds=1, temperature=1e-4, **ALL).samples[0]
    argmax = (hidden @ weight.T).argmax(-1).masked_fill(targets == -100, -100)
    assert torch.equal(sharp, argmax)


def test_every_token_follows_its_own_distribution():
    """4,000 draws of three tokens whose distributions differ, independent of one another."""
    hidden, weight = torch.randn(3, 8), torch.randn(4, 8) * 0.4
    targets = torch.zeros(3, dtype=torch.int64)
    samples = mean_field_samples(hidden, weight, targets, seeds=5, count=4000, **ALL).samples
    p = (hidden.double() @ weight.double().T).softmax(-1)
    for token in range(3):
        error = samples[:, token].bincount(minlength=4) / 4000 - p[token]
        assert (error.abs() < 5 * (p[token] * (1 - p[token]) / 4000).sqrt()).all()
    joint = (4 * samples[:, 0] + samples[:, 1]).bincount(minlength=16) / 4000
    expected = (p[0][:, None] * p[1]).flatten()
    assert ((joint - expected).abs() < 5 * (expected / 4000).sqrt()).all()


@pytest.mark.parametrize("fraction", [0.25, 0.6, 1.0])
def test_an_example_draws_the_same_whatever_shares_its_call(fraction):
    hidden, weight, targets = torch.randn(12, 8), torch.randn(31, 8) * 0.3, torch.randint(3, 30, (12,))
    lengths = [5, 4, 3]
    seeds, own = token_seeds(9, 7, range(3), lengths).to(DEVICE), token_seeds(9, 7, 1, 4).to(DEVICE)
    options = {"mean_field_fraction": fraction, "eos_token_id": EOS}
    together = mean_field_samples(
        hidden, weight, targets, seeds=seeds, count=3, cu_tokens=[0, 5, 9, 12], **options
    ).samples
    alone = mean_field_samples(hidden[5:9], weight, targets[5:9], seeds=own, count=2, **options)
    assert torch.equal(together[:2, 5:9], alone.samples)


def test_negatives_draw_the_tokens_of_a_mask_alone():
    """Each its own, and those that it draws are the same as without a mask."""
    arguments = torch.randn(6, 8), torch.randn(31, 8), torch.tensor([3, 4, -100, 5, 6, 2])
    whole = mean_field_samples(*arguments, seeds=1, count=4, **ALL)
    mask = torch.rand(4, 6) < 0.5
    some = mean_field_samples(*arguments, seeds=1, count=4, mask=mask)
    assert torch.equal(some.samples, whole.samples.where(mask, -100)) and torch.equal(some.logps, whole.logps)
    with pytest.raises(ValueError, match=r"mask must have shape \(4, 6\), got \(6, 4\)"):
        mean_field_samples(*arguments, seeds=1, count=4, mask=mask.T)


# Which positions are replaced

TRUTHS = [
    [4, EOS],
    [4],
    [4, 5, 6, 7, 8, EOS],
    [4, 5, 6, TURN_END, EOS],
    [4, EOS, 5, 6, 7, 8, 9, 10, 11, 12, TURN_END],
    list(range(3, 17)),
    [EOS],
    [4, -100, 5, 6, -100, 7, EOS, -100],
]
FREE = [[0], [0], [0, 1, 2, 3, 4], [0, 1, 2], list(range(10)), list(range(14)), [], [0, 2, 3, 5]]


@pytest.mark.cpu
@pytest.mark.parametrize("fraction", [1e-6, 0.1, 0.25, 0.5, 0.75, 0.999])
def test_a_negative_replaces_exactly_its_share_and_never_the_end(fraction):
    lengths = [len(truth) for truth in TRUTHS]
    for step in range(20):
        seeds = token_seeds(0, step, range(len(TRUTHS)), lengths)
        masks = replaced_positions(seeds, TRUTHS, [EOS, TURN_END], 7, fraction).split(lengths, dim=1)
        for mask, free in zip(masks, FREE, strict=True):
            kept = [place for place in range(mask.shape[1]) if place not in free]
            assert not mask[:, kept].any()
            assert mask.sum(1).tolist() == [max(1, round(fraction * len(free))) if free else 0] * 7


@pytest.mark.cpu
def test_positions_are_chosen_uniformly_and_independently():
    """2 of 5 for 6,000 examples: every pair as often as any other, for every negative whatever the others replace."""
    truth, examples = [4, 5, 6, 7, 8, EOS], 6000
    seeds = token_seeds(3, 0, range(examples), 6)
    masks = replaced_positions(seeds, [truth] * examples, EOS, 2, 0.4).unflatten(1, (examples, 6))
    pairs = list(combinations(range(5), 2))
    chosen = [[pairs.index(tuple(own.nonzero().flatten().tolist())) for own in mask] for mask in masks]
    for own in chosen:
        counts = Counter(own)
        # Mean 600, standard deviation 23
        assert len(counts) == 10 and all(abs(count - 600) < 5 * 23.3 for count in counts.values())
    joint = Counter(zip(*chosen, strict=True))
    # Mean 60, standard deviation 7.7
    assert len(joint) == 100 and all(abs(count - 60) < 5 * 7.8 for count in joint.values())


def test_replaced_tokens_follow_the_model_given_true_tokens():
    """Held against the exact next-token distribution after the true tokens, wherever a position was replaced."""
    model = tiny_models.llama().eval()
    prompt, truth, count = [3, 4, 5], [6, 7, 8, 9, EOS], 4000
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([prompt + truth])).last_hidden_state[0, 2:-1]
    options = {"seeds": token_seeds(1, 0, 0, 5).to(DEVICE), "count": count}
    arguments = hidden, model.lm_head.weight * 3, torch.tensor(truth)
    samples = mean_field_samples(*arguments, mean_field_fraction=0.5, eos_token_id=EOS, **options).samples
    drawn = samples >= 0
    assert torch.equal(drawn.sum(1), torch.full((count,), 2))
    assert not drawn[:, -1].any()
    every = mean_field_samples(*arguments, **ALL, **options).samples
    assert torch.equal(samples[drawn], every[drawn])
    for place in range(4):
        with torch.no_grad():
            states = model.base_model(torch.tensor([prompt + truth[:place]])).last_hidden_state[0, -1]
        p = (states.double() @ arguments[1].double().T).softmax(-1)
        own = samples[drawn[:, place], place]
        assert abs(len(own) - count / 2) < 5 * (count / 4) ** 0.5
        error = own.bincount(minlength=len(p)) / len(own) - p
        assert (error.abs() < 5 * (p * (1 - p) / len(own)).sqrt() + 1 / len(own)).all()


def test_a_fraction_of_one_draws_every_token_as_before():
    hidden, weight, targets = torch.randn(6, 8), torch.randn(31, 8), torch.tensor([3, 4, 7, 5, 6, EOS])
    seeds = token_seeds(2, 1, 0, 6).to(DEVICE)
    before = linear_token_statistics(hidden, weight, targets, seed=seeds, num_samples=9)
    out = mean_field_samples(hidden, weight, targets, seeds=seeds, count=9, mean_field_fraction=1)
    assert torch.equal(out.samples, before.samples.T) and torch.equal(out.logps, before.logps)


def test_one_seed_for_the_call_chooses_positions_of_every_ground_truth():
    hidden, weight = torch.randn(15, 8), torch.randn(31, 8)
    targets = torch.tensor([3, 4, 5, 6, EOS] * 3)
    options = {"count": 50, "mean_field_fraction": 0.5, "eos_token_id": EOS, "cu_tokens": [0, 5, 10, 15]}
    first, again, other = (
        mean_field_samples(hidden, weight, targets, seeds=seed, **options).samples >= 0 for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    own = [first[:, start:end] for start, end in pairwise(options["cu_tokens"])]
    assert all((mask.sum(1) == 2).all() and not mask[:, -1].any() for mask in own)
    assert not torch.equal(own[0], own[1])


def test_a_fraction_that_cannot_be_is_refused():
    arguments = torch.randn(5, 8), torch.randn(31, 8), torch.tensor([3, 4, 5, 6, EOS])
    for fraction in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=rf"mean_field_fraction must be in \(0, 1\], got {fraction}"):
            mean_field_samples(*arguments, seeds=1, mean_field_fraction=fraction)
    with pytest.raises(ValueError, match=r"mean_field_fraction=0.25 .* needs eos_token_id"):
        mean_field_samples(*arguments, seeds=1)
    with pytest.raises(ValueError, match="cu_tokens must end with the number of targets, 5, got 4"):
        mean_field_samples(*arguments, seeds=1, eos_token_id=EOS, cu_tokens=[0, 4])


# Seeds


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


def split_mix(x: int) -> int:
    """The finaliser of SplitMix64 as published, on unsigned integers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.cpu
def test_seeds_of_many_examples_are_those_of_each():
    """Of any number of examples in one call, held against SplitMix64 of a hash of the key in Python's integers."""
    examples, lengths = [3, 0, -7, 2**40, 3], [4, 0, 1, 3, 6]
    want = []
    for example, length in zip(examples, lengths, strict=True):
        key = hashlib.blake2b(f"5/-1/{example}".encode(), digest_size=8).digest()
        start = split_mix(int.from_bytes(key, "little"))
        want += [split_mix((start + (n + 1) * 0x9E3779B97F4A7C15) % 2**64) for n in range(length)]
    got = token_seeds(5, -1, examples, lengths)
    assert [seed % 2**64 for seed in got.tolist()] == want
    assert torch.equal(got, torch.cat([token_seeds(5, -1, *own) for own in zip(examples, lengths, strict=True)]))
    assert torch.equal(token_seeds(5, -1, range(3), 2), token_seeds(5, -1, [0, 1, 2], [2, 2, 2]))
    assert token_seeds(5, -1, [], []).shape == (0,)
    with pytest.raises(ValueError, match="one length for each of 5 examples, got 2"):
        token_seeds(5, -1, examples, [1, 2])


@pytest.mark.cpu
def test_a_negative_ends_behind_its_first_eos():
    samples = torch.tensor([[5, EOS, 7, EOS], [5, 6, 7, 8], [EOS, 6, 7, EOS], [5, 6, 7, EOS]])
    assert finish(samples, [3, 4, 9, EOS], EOS) == [[5, EOS], [5, 6, 7, 8], [EOS], [5, 6, 7, EOS]]


@pytest.mark.cpu
def test_what_is_not_drawn_is_the_true_token_and_cuts_nothing():
    truth = [3, EOS, 4, TURN_END, EOS]
    samples = torch.tensor([[-100, -100, 7, -100, -100], [5, -100, EOS, -100, -100], [-100, EOS, -100, -100, -100]])
    ends = [EOS, TURN_END]
    assert finish(samples, truth, ends) == [[3, EOS, 7, TURN_END, EOS], [5, EOS, EOS], [3, EOS]]
    assert finish(torch.full((1, 5), -100), truth, ends) == [truth]
    with pytest.raises(ValueError, match=r"samples must have shape \(count, 5\), got \(3, 4\)"):
        finish(samples[:, 1:], truth, ends)


def test_negatives_are_the_finished_samples_that_are_wrong():
    """Of several ground truths: one ended twice, one with tokens that are not there, one of its end alone."""
    ends = [EOS, TURN_END]
    truths = [[3, 4, 5, TURN_END, EOS], [6, 7, 8], [9, -100, 4, EOS, -100], [EOS]]
    targets = torch.tensor([token for truth in truths for token in truth])
    # Each row gives the truth a probability of 0.3, so that some draws change nothing.
    hidden, weight = 2.5 * torch.nn.functional.one_hot(targets.clamp(min=0), 31).float(), torch.eye(31)
    bounds = torch.tensor([0, *map(len, truths)]).cumsum(0).tolist()
    options = {"seeds": 3, "count": 40, "mean_field_fraction": 0.5, "eos_token_id": ends, "cu_tokens": bounds}
    negatives = mean_field_negatives(hidden, weight, targets, **options)
    samples = mean_field_samples(hidden, weight, targets, **options).samples

    def content(tokens):
        return content(tokens[:-1]) if tokens and tokens[-1] in ends else tokens

    for own, truth, drawn in zip(negatives, truths, samples.split([*map(len, truths)], dim=1), strict=True):
        texts = []
        for row in drawn.tolist():
            length = next((place + 1 for place, new in enumerate(row) if new in ends), len(row))
            texts.append([old if new < 0 else new for new, old in zip(row, truth, strict=True)][:length])
        texts = [[token for token in text if token >= 0] for text in texts]
        wrong = [text for text in texts if content(text) != content([token for token in truth if token >= 0])]
        assert own == wrong
        assert len(wrong) < 40
        assert bool(wrong) == (truth != [EOS])


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
        (negatives,) = mean_field_negatives(
            predicting, model.lm_head.weight, torch.tensor(completion), seeds=seeds, count=3, eos_token_id=EOS
        )
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
