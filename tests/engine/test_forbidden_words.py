"""Words of probability 0 among the targets: a candidate that uses one is impossible, and never makes NaN."""

from __future__ import annotations

import math

import pytest
import torch
from pair_formulas import SMOOTHED
from problems import BACKENDS
from torch import Tensor

from cpo_kernels import (
    CandidateLayout,
    contrastive_loss,
    cpo_loss,
    linear_cpo_loss,
    linear_sequence_loss,
)
from cpo_kernels.loss_table import LOSSES

NEVER = -math.inf
F64 = torch.float64
# Of a pair whose rejected, and of one whose chosen candidate is impossible: the limit of the formula in objective.md.
BEATEN = dict.fromkeys(("plackett_luce", "hinge", "robust", "discopop"), 0.0) | {
    "ipo": math.inf,
    "exo_pair": -math.log(1 - SMOOTHED["exo_pair"]),
    "nca_pair": math.log1p(math.exp(-0.7)) + math.log1p(math.exp(0.7)) / 2,
    "bco_pair": math.log1p(math.exp(-0.7)),
    "sppo_hard": math.inf,
    "apo_zero": 1 / (1 + math.exp(0.7)),
    "apo_down": 1 / (1 + math.exp(-0.7)),
}
HOPELESS = dict.fromkeys(LOSSES, math.inf) | {
    "exo_pair": -math.log(SMOOTHED["exo_pair"]),
    "apo_zero": 1 + 1 / (1 + math.exp(-0.7)),
    "apo_down": 1.0,
}


def loss_and_slopes(logps: list[float], **options: object) -> tuple[float, list[float]]:
    scores = torch.tensor([logps], dtype=F64, requires_grad=True)
    loss = contrastive_loss(scores, beta=1.0, **options)
    loss.backward()
    return loss.item(), scores.grad[0].tolist()


def test_an_impossible_negative_is_beaten_for_certain():
    assert loss_and_slopes([1.0, NEVER]) == (0.0, [0.0, 0.0])
    loss, slopes = loss_and_slopes([1.0, NEVER, 0.0])
    assert loss == pytest.approx(math.log1p(math.exp(-1)), rel=1e-15)
    share = 1 / (1 + math.e)
    assert slopes == pytest.approx([-share, 0.0, share], rel=1e-15)


def test_an_impossible_truth_is_an_infinite_loss_with_the_steepest_slope():
    assert loss_and_slopes([NEVER, 1.0]) == (math.inf, [-1.0, 1.0])
    assert loss_and_slopes([NEVER, NEVER]) == (math.inf, [-1.0, 0.0])
    loss, slopes = loss_and_slopes([NEVER, 1.0, NEVER, 2.0])
    assert loss == math.inf
    assert slopes == pytest.approx([-1.0, 1 / (1 + math.e), 0.0, math.e / (1 + math.e)], rel=1e-15)


def test_ranked_groups_hold_an_impossible_candidate_against_those_below_it():
    ranked = {"ranks": torch.tensor([[0, 1, 2]])}
    assert loss_and_slopes([1.0, 0.0, NEVER], **ranked)[0] == pytest.approx(math.log1p(math.exp(-1)), rel=1e-15)
    loss, slopes = loss_and_slopes([1.0, NEVER, 0.0], **ranked)
    assert loss == math.inf
    share = 1 / (1 + math.e)
    assert slopes == pytest.approx([-share, -1.0, 1 + share], rel=1e-15)
    assert loss_and_slopes([2.0, 1.0, NEVER], ranks=torch.tensor([[0, 0, 1]])) == (0.0, [0.0, 0.0, 0.0])


@pytest.mark.parametrize("reference", [-3.0, NEVER])
def test_a_reference_that_finds_it_impossible_too_changes_nothing(reference):
    """A mask that both models have: -inf minus -inf is no reward of NaN."""
    ref = torch.tensor([[0.0, reference]], dtype=F64)
    assert loss_and_slopes([1.0, NEVER], ref_logps=ref) == (0.0, [0.0, 0.0])
    ref = torch.tensor([[reference, 0.0]], dtype=F64)
    assert loss_and_slopes([NEVER, 1.0], ref_logps=ref) == (math.inf, [-1.0, 1.0])


@pytest.mark.parametrize("name", LOSSES)
def test_a_reference_that_alone_finds_it_impossible_is_not_a_number(name):
    """Its reward is +inf, which propagates as NaN does, to its group alone."""
    ref = torch.tensor([[0.0, NEVER], [NEVER, 0.0], [0.0, 0.0]])
    logps = torch.tensor([[-1.0, -2.0]] * 3, requires_grad=True)
    smoothing = SMOOTHED.get(name, 0.0)
    losses = contrastive_loss(logps, ref_logps=ref, loss_type=name, label_smoothing=smoothing, reduction="none")
    assert losses.isnan().tolist() == [True, True, False]
    (slopes,) = torch.autograd.grad(losses.sum(), logps)
    assert slopes.isnan().tolist() == [[True, True], [True, True], [False, False]]


@pytest.mark.parametrize("name", LOSSES)
def test_pair_losses_take_their_limit(name):
    options = {"loss_type": name, "label_smoothing": SMOOTHED.get(name, 0.0) if name == "exo_pair" else 0.0}
    loss, slopes = loss_and_slopes([0.7, NEVER], **options)
    assert loss == pytest.approx(BEATEN[name], rel=1e-12)
    assert slopes[1] == 0.0
    assert math.isfinite(slopes[0])
    loss, slopes = loss_and_slopes([NEVER, 0.7], **options)
    assert loss == pytest.approx(HOPELESS[name], rel=1e-12)
    assert all(math.isfinite(slope) for slope in slopes)
    loss, slopes = loss_and_slopes([NEVER, NEVER], **options)
    assert not math.isnan(loss)
    assert slopes[1] == 0.0


def test_label_smoothing_expects_the_impossible_with_its_probability():
    assert loss_and_slopes([1.0, NEVER], label_smoothing=0.1) == (math.inf, [0.1, 0.0])
    assert loss_and_slopes([NEVER, 1.0], label_smoothing=0.1) == (math.inf, [-0.9, 0.9])
    loss, slopes = loss_and_slopes([1.0, NEVER], label_smoothing=0.1, loss_type="robust")
    assert (loss, slopes) == (NEVER, pytest.approx([-0.1 / 0.8, 0.0]))


@pytest.mark.parametrize("difference", [-95.0, -2000.0, 2000.0])
def test_discopop_of_far_apart_scores_is_finite(difference):
    """exp(-d) overflows float32 where its share in the mixture is 0."""
    logps = torch.tensor([[difference, 0.0]], requires_grad=True)
    loss = contrastive_loss(logps, beta=1.0, loss_type="discopop")
    assert loss.item() == pytest.approx(max(-difference, 0.0), rel=1e-6)
    slope = -1.0 if difference < 0 else 0.0
    assert torch.autograd.grad(loss, logps)[0].tolist() == [[slope, -slope]]


V, H = 11, 6
TARGETS = torch.tensor([[[1, 2, 3], [4, 9, 5], [6, 7, -100]], [[0, 1, 2], [3, 4, 5], [9, 9, 9]]])
CALLS = ["cpo_loss", "padded", "packed", "dense_rows", "recomputed"]
OBJECTIVES = {
    "unranked": {"mle_weight": 0.3},
    "ranked": {"ranks": torch.tensor([[0, 2, 1], [0, 1, 2]])},
    "length_normalized": {"length_normalized": True, "beta": 2.0},
    "mle": {"contrast_weight": 0.0, "mle_weight": 0.7},
}


def call(name: str, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, backend: str, **options: object):
    """CPOOutput of (G, C, T) targets by one of the ways to it."""
    if name == "cpo_loss":
        return cpo_loss(hidden @ weight.T, targets, bias=bias, backend=backend, **options)
    if name == "packed":
        groups, candidates, length = targets.shape
        starts = [length * s for s in range(groups * candidates + 1)]
        layout = CandidateLayout(starts, [candidates * g for g in range(groups + 1)])
        options = {key: x.reshape(-1) if isinstance(x, Tensor) else x for key, x in options.items()}
        rows, flat = hidden.reshape(-1, H), targets.reshape(-1)
        return linear_cpo_loss(rows, weight, flat, layout=layout, bias=bias, backend=backend, **options)
    if name == "dense_rows":
        options["skip_absent_rows"] = False
    if name == "recomputed":
        options["max_logits_bytes"] = 2 * 4 * V
    return linear_cpo_loss(hidden, weight, targets, bias=bias, backend=backend, **options)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Word 9 is forbidden: one negative of group 0 uses it, and one of group 1 uses nothing else."""
    hidden, weight, bias = torch.randn(2, 3, 3, H), torch.randn(V, H), torch.randn(V)
    bias[9] = NEVER
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_impossible_negative_is_as_good_as_absent(backend, way, objective):
    """For loss and gradients: the same call with its tokens taken out, which leaves the ranks of the others alone."""
    options = OBJECTIVES[objective]
    leaves = tensors()
    absent = TARGETS.clone()
    absent[0, 1] = absent[1, 2] = -100
    got = call(way, *leaves, TARGETS, backend, **options)
    want = call(way, *leaves, absent, backend, **options)
    torch.testing.assert_close(got.loss, want.loss)
    assert got.loss.isfinite()
    logps, rewards = got.logps.reshape(2, 3), got.rewards.reshape(2, 3)
    assert (logps == NEVER).nonzero().tolist() == (rewards == NEVER).nonzero().tolist() == [[0, 1], [1, 2]]
    assert got.margin == math.inf
    for name, ours, theirs in zip(
        ("hidden", "weight", "bias"), *(torch.autograd.grad(x.loss, leaves) for x in (got, want)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_impossible_truth_is_an_infinite_loss_with_finite_gradients(backend, way):
    targets = TARGETS.clone()
    targets[1, 0, 1] = 9
    leaves = tensors()
    out = call(way, *leaves, targets, backend, mle_weight=0.5)
    assert out.loss == out.contrastive_loss == out.nll_loss == math.inf
    for grad in torch.autograd.grad(out.loss, leaves):
        assert grad.isfinite().all()
        assert grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_contrast_nothing_of_a_negative_arrives(backend):
    """contrast_weight=0 leaves the term out, whatever its negatives and their references hold."""
    leaves = tensors()
    options = {"contrast_weight": 0.0, "mle_weight": 1.0}
    ref = torch.tensor([[0.0, NEVER, math.nan], [0.0, 0.0, 0.0]])
    rows = (leaves[0] @ leaves[1].T + leaves[2]).log_softmax(-1)
    truth = rows[:, 0].gather(-1, TARGETS[:, 0].unsqueeze(-1))
    want = torch.autograd.grad(-truth.mean(), leaves[:2])
    for way in CALLS:
        out = call(way, *leaves, TARGETS, backend, ref_logps=ref, **options)
        torch.testing.assert_close(out.loss, -truth.mean())
        for ours, theirs in zip(torch.autograd.grad(out.loss, leaves[:2]), want, strict=True):
            torch.testing.assert_close(ours, theirs)
    filtered = linear_cpo_loss(
        *leaves[:2], TARGETS, bias=leaves[2], backend=backend, ref_logps=ref, candidate_eps=0.0, **options
    )
    torch.testing.assert_close(torch.autograd.grad(filtered.loss, leaves[:2]), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_softcap_bounds_forbidden_words_too(backend):
    leaves = tensors()
    y = 3.0 * torch.tanh((leaves[0] @ leaves[1].T + leaves[2]) / 3.0)
    sums = y.log_softmax(-1).gather(-1, TARGETS.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(TARGETS < 0, 0)
    want = contrastive_loss(sums.sum(-1))
    grads = torch.autograd.grad(want, leaves[:2])
    for way in CALLS:
        out = call(way, *leaves, TARGETS, backend, softcap=3.0)
        torch.testing.assert_close(out.loss, want)
        for ours, theirs in zip(torch.autograd.grad(out.loss, leaves[:2]), grads, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_of_ones_own_gets_minus_infinity(backend):
    """What it makes of that is its own; the contrast of this library keeps its gradient finite."""
    leaves = tensors()

    def loss_fn(logps, groups):
        return contrastive_loss(logps, reduction="sum")

    loss = linear_sequence_loss(*leaves[:2], TARGETS, loss_fn, bias=leaves[2], backend=backend)
    want = linear_cpo_loss(*leaves[:2], TARGETS, bias=leaves[2], backend=backend, num_groups=1).loss
    torch.testing.assert_close(loss, want)
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves) for x in (loss, want)), strict=True):
        torch.testing.assert_close(ours, theirs)
