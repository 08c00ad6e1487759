"""Scores to loss: special cases written out, coefficients against autograd, and the symmetries of the formula."""

from __future__ import annotations

import ast
import inspect
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_formulas import FORMULAS, SMOOTHED, loss_of_pairs
from torch import Tensor
from torch.nn.functional import logsigmoid

from cpo_kernels import contrastive_loss, loss_table
from cpo_kernels.kernels import reference
from cpo_kernels.loss_table import LOSSES
from cpo_kernels.objective import Groups, contrast, make_groups, make_problem, summarize
from cpo_kernels.options import Objective

F64 = torch.float64


def scores_of(logps: Tensor, ref: Tensor | None, ranks: Tensor, beta: float, margin: float) -> Tensor:
    return beta * (logps if ref is None else logps - ref) + margin * (ranks > 0).to(logps.dtype)


def by_definition(scores: Tensor, ranks: Tensor, present: Tensor) -> Tensor:
    return torch.stack([reference.contrastive_loss(*group) for group in zip(scores, ranks, present, strict=True)])


@st.composite
def contrasts(draw, max_score: float = 30.0):
    """Scores, ranks and presence (G, C) of up to 4 groups of up to 6 candidates, with ties."""
    G, C = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    score = st.floats(-max_score, max_score, allow_nan=False, width=32)
    scores = draw(st.lists(score, min_size=G * C, max_size=G * C))
    ranks = draw(st.lists(st.integers(0, 3), min_size=G * C, max_size=G * C))
    present = draw(st.lists(st.booleans(), min_size=G * C, max_size=G * C))
    return (
        torch.tensor(scores, dtype=F64).view(G, C),
        torch.tensor(ranks).view(G, C),
        torch.tensor(present).view(G, C),
    )


@given(contrasts(max_score=1e4))
@settings(max_examples=200, deadline=None)
def test_loss_is_the_definition(problem):
    scores, ranks, present = problem
    loss = contrast(scores, None, ranks, present, Objective(beta=1.0)).loss
    torch.testing.assert_close(loss, by_definition(scores, ranks, present), rtol=1e-12, atol=1e-11)


@given(contrasts(max_score=60.0), st.floats(0.1, 2.0), st.floats(-1.0, 1.0))
@settings(max_examples=200, deadline=None)
def test_coefficients_are_the_gradient(problem, beta, margin):
    logps, ranks, present = problem
    leaf = logps.clone().requires_grad_()
    result = contrast(leaf, None, ranks, present, Objective(beta=beta, margin=margin))
    (grad,) = torch.autograd.grad(result.loss.sum(), leaf)
    torch.testing.assert_close(result.coef, grad, rtol=1e-11, atol=1e-13)
    expected = by_definition(scores_of(leaf, None, ranks, beta, margin), ranks, present).sum()
    if expected.requires_grad:
        (grad,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(result.coef, grad, rtol=1e-9, atol=1e-12)


@given(contrasts(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_order_of_candidates_and_groups_does_not_matter(problem, random):
    scores, ranks, present = problem
    groups, candidates = list(range(scores.shape[0])), list(range(scores.shape[1]))
    random.shuffle(groups)
    random.shuffle(candidates)
    before = contrast(scores, None, ranks, present, Objective())
    after = contrast(
        *(t[groups][:, candidates] if t is not None else None for t in (scores, None, ranks, present)), Objective()
    )
    torch.testing.assert_close(after.loss, before.loss[groups], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(after.coef, before.coef[groups][:, candidates], rtol=1e-12, atol=1e-13)


@given(contrasts(), st.floats(-1e3, 1e3))
@settings(max_examples=100, deadline=None)
def test_adding_a_constant_to_every_score_changes_nothing(problem, shift):
    scores, ranks, present = problem
    before = contrast(scores, None, ranks, present, Objective())
    after = contrast(scores + shift, None, ranks, present, Objective())
    torch.testing.assert_close(after.loss, before.loss, rtol=1e-9, atol=1e-11)
    # The coefficients of a group sum to 0 for the same reason.
    torch.testing.assert_close(after.coef.sum(-1), torch.zeros(scores.shape[0], dtype=F64), rtol=0, atol=1e-13)


@given(contrasts())
@settings(max_examples=100, deadline=None)
def test_only_the_order_of_ranks_counts_and_absent_candidates_do_not(problem):
    scores, ranks, present = problem
    before = contrast(scores, None, ranks, present, Objective())
    after = contrast(scores.masked_fill(~present, math.nan), None, 7 * ranks + 2, present, Objective())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert (before.coef[~present] == 0).all()


PAIR = {"logps": torch.tensor([[-3.0, -5.5], [-8.0, -2.0]], dtype=F64), "ref_logps": None}
PAIR_WITH_REF = PAIR | {"ref_logps": torch.tensor([[-4.0, -4.5], [-6.0, -7.0]], dtype=F64)}


def difference(pair: dict) -> Tensor:
    """Log-ratio of chosen to rejected, relative to the reference."""
    logps = pair["logps"] if pair["ref_logps"] is None else pair["logps"] - pair["ref_logps"]
    return logps[:, 0] - logps[:, 1]


# One formula a published loss, as its paper writes it for one chosen and one rejected answer.
PUBLISHED = {
    "dpo": (PAIR_WITH_REF, {"beta": 0.3}, lambda d: -logsigmoid(0.3 * d)),
    "cpo_of_xu": (PAIR, {"beta": 0.1}, lambda d: -logsigmoid(0.1 * d)),
    "simpo": (PAIR, {"beta": 2.0, "margin": 1.4}, lambda d: -logsigmoid(2.0 * d - 1.4)),
    "hinge": (PAIR, {"beta": 0.2, "loss_type": "hinge"}, lambda d: torch.relu(1 - 0.2 * d)),
    "ipo": (PAIR_WITH_REF, {"beta": 0.2, "loss_type": "ipo"}, lambda d: (d - 1 / (2 * 0.2)) ** 2),
    "label_smoothing": (
        PAIR_WITH_REF,
        {"beta": 0.3, "label_smoothing": 0.2},
        lambda d: -0.8 * logsigmoid(0.3 * d) - 0.2 * logsigmoid(-0.3 * d),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_pair_losses(name):
    pair, options, formula = PUBLISHED[name]
    loss = contrastive_loss(**pair, **options, reduction="none")
    torch.testing.assert_close(loss, formula(difference(pair)), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", PUBLISHED)
def test_pair_losses_follow_the_ranks(name):
    """The chosen answer may stand second."""
    pair, options, formula = PUBLISHED[name]
    swapped = {k: None if v is None else v.flip(1) for k, v in pair.items()}
    loss = contrastive_loss(**swapped, ranks=torch.tensor([[1, 0], [1, 0]]), **options, reduction="none")
    torch.testing.assert_close(loss, formula(difference(pair)), rtol=1e-13, atol=1e-13)


# Every row of the table against the formula of its paper, so that a row without a formula fails.


def test_the_table_imports_nothing_of_the_package():
    statements = [node for node in ast.walk(ast.parse(inspect.getsource(loss_table)))]
    modules = {name.name for node in statements if isinstance(node, ast.Import) for name in node.names}
    froms = {(node.level, node.module) for node in statements if isinstance(node, ast.ImportFrom)}
    assert not any(level or module.startswith("cpo_kernels") for level, module in froms | {(0, m) for m in modules})


def test_every_loss_has_a_formula_to_be_held_against():
    assert FORMULAS.keys() == LOSSES.keys()
    assert SMOOTHED.keys() == {name for name, loss in LOSSES.items() if loss.smoothing != "none"}


@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_and_its_slopes_are_those_of_its_paper(name, scale):
    """Chosen answers stand first and second; the coefficients are the gradient that autograd has of the formula."""
    logps, ref = (scale * torch.randn(64, 2, dtype=F64)).requires_grad_(), scale * torch.randn(64, 2, dtype=F64)
    ranks = torch.stack([torch.arange(64) % 2, 1 - torch.arange(64) % 2], 1)
    ratios = (logps - ref).gather(1, ranks)
    want = loss_of_pairs(name, ratios[:, 0], ratios[:, 1], beta=0.4)
    objective = Objective(beta=0.4, loss_type=name, label_smoothing=SMOOTHED.get(name, 0.0))
    got = contrast(logps, ref, ranks, torch.ones(64, 2, dtype=torch.bool), objective)
    torch.testing.assert_close(got.loss, want, rtol=1e-10, atol=1e-12)
    grad, own = (torch.autograd.grad(loss.sum(), logps)[0] for loss in (want, got.loss))
    torch.testing.assert_close(own, grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got.coef, grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.of_groups])
def test_pairs_alone_have_these_losses(name):
    objective = Objective(loss_type=name, label_smoothing=SMOOTHED.get(name, 0.0))
    with pytest.raises(ValueError, match=rf"loss_type='{name}' needs one negative per group .* got K = 2"):
        objective.check_candidates(3)


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_losses_that_know_label_smoothing_take_it(name):
    if LOSSES[name].smoothing == "none":
        with pytest.raises(ValueError, match=f"label_smoothing=0.1 needs loss_type=.* got '{name}'"):
            Objective(loss_type=name, label_smoothing=0.1)
    elif LOSSES[name].smoothing == "required":
        with pytest.raises(ValueError, match=rf"loss_type='{name}' needs label_smoothing in \(0, 0.5\)"):
            Objective(loss_type=name)


def test_unranked_negatives_are_info_nce():
    logps = torch.randn(5, 4, dtype=F64)
    expected = torch.nn.functional.cross_entropy(0.7 * logps, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(contrastive_loss(logps, beta=0.7), expected)


def test_all_different_ranks_are_plackett_luce():
    """The likelihood of an ordering: each candidate is chosen among those that are left."""
    scores = torch.randn(1, 4, dtype=F64)
    order = [2, 0, 3, 1]
    ranks = torch.tensor([[order.index(c) for c in range(4)]])
    stages = [scores[0, order[i]] - scores[0, order[i:]].logsumexp(0) for i in range(3)]
    torch.testing.assert_close(contrastive_loss(scores, ranks=ranks, beta=1.0), -sum(stages))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction):
    logps = torch.randn(5, 3, dtype=F64, requires_grad=True)
    per_group = by_definition(0.1 * logps, torch.tensor([[0, 1, 1]] * 5), torch.ones(5, 3, dtype=torch.bool))
    expected = per_group if reduction == "none" else getattr(per_group, reduction)()
    loss = contrastive_loss(logps, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    upstream = torch.randn_like(loss)
    torch.testing.assert_close(*(torch.autograd.grad(x, logps, upstream)[0] for x in (loss, expected)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_dtype_of_the_loss_is_that_of_the_accumulation(dtype):
    loss = contrastive_loss(torch.randn(2, 3).to(dtype), ref_logps=torch.randn(2, 3))
    assert loss.dtype == (F64 if dtype == F64 else torch.float32)


RANKS = {
    "default": None,
    "ranked": torch.tensor([[2, 0, 1], [0, 1, 2]]),
    "ties": torch.tensor([[0, 1, 0], [1, 0, 1]]),
}


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_gradcheck_of_the_contrast(ranks):
    logps = torch.randn(2, 3, dtype=F64, requires_grad=True)
    ref = torch.randn(2, 3, dtype=F64)
    torch.autograd.gradcheck(
        lambda x: contrastive_loss(x, ref_logps=ref, ranks=ranks, beta=0.8, margin=0.2, reduction="none"), logps
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_gradcheck_and_coefficients_of_pair_losses(name):
    pair, options, _ = PUBLISHED[name]
    logps = pair["logps"].clone().requires_grad_()
    ranks, present = torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2, dtype=torch.bool)
    torch.autograd.gradcheck(lambda x: contrast(x, pair["ref_logps"], ranks, present, Objective(**options)).loss, logps)
    result = contrast(logps, pair["ref_logps"], ranks, present, Objective(**options))
    (grad,) = torch.autograd.grad(result.loss.sum(), logps)
    torch.testing.assert_close(result.coef, grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_pair_losses_without_a_preference_are_zero(name):
    """An absent or an equally ranked answer: no loss and no gradient, although ipo of a difference of 0 is not 0."""
    ranks, present = torch.tensor([[0, 1], [0, 0]]), torch.tensor([[True, False], [True, True]])
    objective = Objective(loss_type=name, label_smoothing=SMOOTHED.get(name, 0.0))
    result = contrast(PAIR["logps"], None, ranks, present, objective)
    assert (result.loss == 0).all()
    assert (result.coef == 0).all()


def test_settled_contrast_keeps_its_small_loss_in_float32():
    """logsumexp(s_i, s_j) - s_i would be 0 in float32 from a difference of 17 on."""
    loss = contrastive_loss(torch.tensor([[0.0, -30.0]]), beta=1.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-30)), rel=1e-6, abs=0)


def test_label_smoothing_is_conservative_dpo_and_robust_dpo_is_a_loss_of_its_own():
    """At beta .1, epsilon .1 and a difference of 1.5 of the log-ratios, by the formulas of the papers."""
    logps, smoothed = torch.tensor([[1.5, 0.0]], dtype=F64), {"beta": 0.1, "label_smoothing": 0.1}
    right, wrong = math.log1p(math.exp(-0.15)), math.log1p(math.exp(0.15))
    conservative = contrastive_loss(logps, **smoothed).item()
    assert conservative == pytest.approx(0.9 * right + 0.1 * wrong, rel=1e-12)
    assert conservative == pytest.approx(0.636, abs=5e-4)
    robust = contrastive_loss(logps, loss_type="robust", **smoothed).item()
    assert robust == pytest.approx((0.9 * right - 0.1 * wrong) / 0.8, rel=1e-12)
    assert robust == pytest.approx(0.602, abs=5e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_reach_the_loss(value):
    assert not contrastive_loss(torch.tensor([[0.0, value, 1.0]])).isfinite()
    assert not contrastive_loss(torch.tensor([[-value, 0.0, 1.0]])).isfinite()


@pytest.mark.parametrize("seed", range(8))
def test_summary_equals_a_loop(seed):
    """accuracy, margin, rewards and nll of ragged groups with ties and absent candidates, one number at a time."""
    torch.manual_seed(seed)
    cu_groups, lengths = [0, 3, 5, 9, 11], torch.tensor([4, 3, 5, 2, 3, 1, 0, 3, 2, 4, 0])
    ranks = torch.tensor([0, 1, 1, 1, 0, 0, 0, 2, 1, 0, 1])
    sums = torch.where(lengths > 0, -4.0 * torch.rand(11, dtype=F64), 0.0)
    ref = -2.0 * torch.rand(11, dtype=F64)
    objective = Objective(beta=0.5, contrast_weight=0.7, mle_weight=0.3)
    problem = make_problem(objective, make_groups(cu_groups, lengths.device), lengths, ref, ranks)
    out = summarize(problem, problem.loss(sums), sums, (11,))
    wins, margins, nll, tokens, contrast_sum, rewards = [], [], 0.0, 0, 0.0, []
    for start, end in pairwise(cu_groups):
        members = [s for s in range(start, end) if lengths[s] > 0]
        reward = {s: 0.5 * (sums[s] - ref[s]).item() for s in members}
        best, others = ([s for s in members if (ranks[s] > 0) == worse] for worse in (False, True))
        nll -= sum(sums[s].item() for s in best)
        tokens += sum(int(lengths[s]) for s in best)
        rewards += [reward.get(s, 0.0) for s in range(start, end)]
        for i in members:
            lower = [reward[j] for j in members if ranks[j] > ranks[i]]
            contrast_sum += math.log(sum(math.exp(r) for r in [reward[i], *lower])) - reward[i] if lower else 0.0
        if others:
            wins.append(min(reward[s] for s in best) > max(reward[s] for s in others))
            margins.append(sum(reward[s] for s in best) / len(best) - sum(reward[s] for s in others) / len(others))
    assert out.accuracy.item() == pytest.approx(sum(wins) / len(wins))
    assert out.margin.item() == pytest.approx(sum(margins) / len(margins), rel=1e-12)
    assert out.nll_loss.item() == pytest.approx(nll / tokens, rel=1e-12)
    assert out.contrastive_loss.item() == pytest.approx(contrast_sum / 4, rel=1e-12)
    assert out.rewards.tolist() == pytest.approx(rewards, rel=1e-12)
    assert out.logps.tolist() == sums.tolist()
    assert out.dropped.item() == 0


@pytest.mark.parametrize("length_normalized", [False, True])
@pytest.mark.parametrize("chunk", [range(0, 1), range(1, 3), range(0, 4)], ids=str)
def test_coefficients_of_a_chunk_are_those_of_the_whole(chunk, length_normalized):
    cu_groups, lengths = [0, 3, 5, 9, 11], torch.tensor([4, 3, 5, 2, 3, 1, 0, 3, 2, 4, 1])
    ranks = torch.tensor([0, 1, 1, 1, 0, 0, 0, 2, 1, 0, 1])
    objective = Objective(beta=0.5, margin=0.2, mle_weight=0.3, length_normalized=length_normalized)
    groups = make_groups(cu_groups, lengths.device)
    problem = make_problem(objective, groups, lengths, torch.randn(11, dtype=F64), ranks)
    sums = torch.randn(11, dtype=F64).masked_fill(lengths == 0, 0.0).requires_grad_()
    segments = slice(cu_groups[chunk.start], cu_groups[chunk.stop])
    part = problem.chunk(chunk, segments).coefficients(sums.detach()[segments])
    (grad,) = torch.autograd.grad(problem.loss(sums)[0], sums)
    torch.testing.assert_close(part, grad[segments], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("num_groups", "num_target_tokens"), [(None, None), (12.0, None), (None, 50.0), (12.0, 50.0)])
def test_global_denominators(num_groups, num_target_tokens):
    """Gradient accumulation divides by the groups and tokens of all its micro-batches."""
    lengths, sums = torch.tensor([3, 2, 4, 1]), torch.tensor([-3.0, -2.0, -5.0, -1.0], dtype=F64)
    objective = Objective(mle_weight=0.5, num_groups=num_groups, num_target_tokens=num_target_tokens)
    pairs = Groups(None, (2, 2))
    loss, contrastive, nll = make_problem(objective, pairs, lengths, None, None).loss(sums)
    per_group = by_definition(0.1 * sums.view(2, 2), torch.tensor([[0, 1]] * 2), torch.ones(2, 2, dtype=torch.bool))
    assert contrastive.item() == pytest.approx(per_group.sum().item() / (num_groups or 2), rel=1e-12)
    assert nll.item() == pytest.approx(8.0 / (num_target_tokens or 7), rel=1e-12)
    assert loss.item() == pytest.approx(contrastive.item() + 0.5 * nll.item(), rel=1e-12)
    whole = make_problem(replace(objective, num_groups=4.0, num_target_tokens=14.0), pairs, lengths, None, None)
    twice = make_problem(
        replace(objective, num_groups=None, num_target_tokens=None), Groups(None, (4, 2)), lengths.repeat(2), None, None
    )
    assert (2 * whole.loss(sums)[0]).item() == pytest.approx(twice.loss(sums.repeat(2))[0].item(), rel=1e-12)
