"""Loss and metrics by Triton and by the compiled CPU backend against ``objective.summarize`` in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from itertools import pairwise as neighbours

import pytest
import torch
from pairwise import pairwise
from tolerance import assert_accurate

from cpo_kernels.objective import make_groups, make_problem, summarize
from cpo_kernels.options import Objective

MODULES = {"triton": "cpo_kernels.kernels.triton.summary", "cpu": "cpo_kernels.kernels.cpu.groups"}

LOSSES = {
    "plackett_luce": {},
    "smoothed": {"label_smoothing": 0.2},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
}
WEIGHTS = {"contrast": {}, "both": {"mle_weight": 0.3}, "likelihood": {"contrast_weight": 0.0, "mle_weight": 1.0}}
FIELDS = ("loss", "contrastive_loss", "nll_loss", "accuracy", "margin", "dropped")


@pytest.fixture(params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in MODULES])
def summarize_groups(request) -> Callable:
    return import_module(MODULES[request.param]).summarize


def launch(summarize_groups, objective, cu_groups, lengths, sums, ref, ranks, num_target_tokens=None):
    """Run the kernels, and return their results by the names of ``CPOOutput``."""
    sizes = {end - start for start, end in neighbours(cu_groups)}
    *numbers, logps, rewards = summarize_groups(
        sums.float(),
        None if len(sizes) == 1 else torch.tensor(cu_groups),
        lengths,
        None if ref is None else ref.float(),
        ranks,
        beta=objective.beta,
        margin=objective.margin,
        label_smoothing=objective.label_smoothing,
        loss_type=objective.loss_type,
        length_normalized=objective.length_normalized,
        contrast_weight=objective.contrast_weight,
        mle_weight=objective.mle_weight,
        num_groups=objective.num_groups or len(cu_groups) - 1,
        num_target_tokens=objective.num_target_tokens if num_target_tokens is None else num_target_tokens,
        max_candidates=max(sizes),
    )
    return dict(zip(FIELDS, numbers, strict=True)) | {"logps": logps, "rewards": rewards}


def reference(objective, cu_groups, lengths, sums, ref, ranks):
    """Return what the objective gives for numbers of the dtype of ``sums``."""
    ref = None if ref is None else ref.to(sums.dtype)
    problem = make_problem(objective, make_groups(cu_groups, sums.device), lengths, ref, ranks)
    return summarize(problem, problem.loss(sums), sums, tuple(sums.shape))._asdict()


def check(summarize_groups, objective, cu_groups, lengths, sums, ref=None, ranks=None):
    found = launch(summarize_groups, objective, cu_groups, lengths, sums, ref, ranks)
    sums = sums.float()
    eager = reference(objective, cu_groups, lengths, sums, ref, ranks)
    oracle = reference(objective, cu_groups, lengths, sums.double(), ref, ranks)
    for name, value in found.items():
        exact = oracle[name].double()
        odd = ~exact.isfinite()
        assert torch.equal(torch.nan_to_num(value[odd].double(), 7.0), torch.nan_to_num(exact[odd], 7.0)), name
        assert_accurate(value.masked_fill(odd, 0), eager[name].masked_fill(odd, 0), exact.masked_fill(odd, 0), name)


def problem(candidates, groups=5, ranked=False):
    """Random sums, lengths and references of groups of so many candidates; some candidates are absent."""
    cu_groups = [candidates * g for g in range(groups + 1)]
    S = cu_groups[-1]
    lengths = torch.randint(1, 9, (S,))
    if candidates > 2:
        lengths[torch.arange(groups) * candidates + 2] = 0
    sums = torch.where(lengths > 0, -20 * torch.rand(S, dtype=torch.float64) * lengths, 0.0).float()
    ranks = torch.arange(S) % candidates // (1 + (torch.arange(S) % 2)) if ranked else None
    return cu_groups, lengths, sums, -30 * torch.rand(S, dtype=torch.float64), ranks


@pairwise({"loss": LOSSES, "weights": WEIGHTS, "means": [False, True], "reference_given": [False, True]})
def test_pairs(summarize_groups, loss, weights, means, reference_given):
    objective = Objective(beta=0.2, margin=0.3, length_normalized=means, **loss, **weights)
    cu_groups, lengths, sums, ref, _ = problem(2)
    check(summarize_groups, objective, cu_groups, lengths, sums, ref if reference_given else None)


@pairwise({"candidates": [1, 3, 4, 17], "ranked": [False, True], "weights": WEIGHTS, "means": [False, True]})
def test_groups(summarize_groups, candidates, ranked, weights, means):
    cu_groups, lengths, sums, ref, ranks = problem(candidates, ranked=ranked)
    check(summarize_groups, Objective(length_normalized=means, **weights), cu_groups, lengths, sums, ref, ranks)


@pytest.mark.parametrize("ranked", [False, True])
def test_groups_of_unequal_sizes(summarize_groups, ranked):
    _, lengths, sums, ref, _ = problem(4, groups=3)
    cu_groups = [0, 2, 3, 9, 12]
    ranks = torch.tensor([0, 1, 0, 0, 1, 2, 3, 1, 0, 0, 1, 1]) if ranked else None
    check(summarize_groups, Objective(mle_weight=0.5), cu_groups, lengths, sums, ref, ranks)


def test_more_groups_than_are_added_at_a_time(summarize_groups):
    cu_groups, lengths, sums, ref, _ = problem(2, groups=700)
    check(summarize_groups, Objective(mle_weight=0.5), cu_groups, lengths, sums, ref)


ODD = {
    "an impossible negative": [(1, -torch.inf)],
    "an impossible truth": [(0, -torch.inf)],
    "nothing is possible": [(0, -torch.inf), (1, -torch.inf)],
    "a truth that is not a number": [(0, torch.nan)],
    "a negative that is not a number": [(1, torch.nan)],
    "an infinite negative": [(1, torch.inf)],
    "settled": [(0, 0.0), (1, -3000.0)],
    "settled the other way": [(0, -3000.0), (1, 0.0)],
}


@pairwise({"odd": ODD, "loss": LOSSES, "weights": WEIGHTS})
def test_odd_numbers(summarize_groups, odd, loss, weights):
    cu_groups, lengths, sums, ref, _ = problem(2, groups=3)
    for place, value in odd:
        sums[place] = value
    check(summarize_groups, Objective(**loss, **weights), cu_groups, lengths, sums, ref)


@pytest.mark.parametrize("tokens", [37.0, torch.tensor(37.0, dtype=torch.float64)], ids=["number", "tensor"])
def test_denominators_that_are_given(summarize_groups, tokens):
    objective = Objective(mle_weight=0.5, num_groups=11.0, num_target_tokens=37.0)
    cu_groups, lengths, sums, ref, ranks = problem(3)
    found = launch(summarize_groups, objective, cu_groups, lengths, sums, ref, ranks, num_target_tokens=tokens)
    expected = reference(objective, cu_groups, lengths, sums.double(), ref, ranks)
    counted = reference(replace(objective, num_target_tokens=None), cu_groups, lengths, sums.double(), ref, ranks)
    torch.testing.assert_close(found["loss"].double(), expected["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["nll_loss"].double(), expected["nll_loss"], rtol=1e-6, atol=0)
    assert expected["nll_loss"] != counted["nll_loss"]
