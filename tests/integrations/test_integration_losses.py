"""Losses of other papers through ``linear_sequence_loss``: as dense computations, and as TRL where it has them."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from devices import DEVICE
from pairs import FixedHead, chosen_first, gradients, make_pairs, trl_dpo_loss, unaligned
from tolerance import assert_accurate
from torch import Tensor
from torch.testing import assert_close

from cpo_kernels import (
    CandidateLayout,
    attach_linear_loss,
    linear_cpo_loss,
    linear_sequence_logps,
    linear_sequence_loss,
)
from cpo_kernels.integrations.losses import gspo, info_nca, kto, kto_baseline, nca, orpo
from cpo_kernels.models import SequenceLossRequest

G, C, T, V, H = 5, 4, 7, 23, 6
BETA = 0.3


def make_groups(candidates: int = C) -> SimpleNamespace:
    """Hidden states in float64, targets of different lengths, and what the losses need besides."""
    lengths = torch.randint(1, T + 1, (G, candidates))
    targets = torch.randint(V, (G, candidates, T)).masked_fill(torch.arange(T) >= lengths.unsqueeze(-1), -100)
    hidden, weight = torch.randn(G, candidates, T, H).double(), torch.randn(V, H).double()
    logps = linear_sequence_logps(hidden, weight, targets)
    return SimpleNamespace(
        hidden=hidden,
        weight=weight,
        targets=targets,
        lengths=lengths,
        ref_logps=logps + torch.randn(G, candidates).double(),
        old_logps=logps + 0.2 * torch.randn(G, candidates).double(),
        rewards=torch.randn(G, candidates).double(),
        advantages=torch.randn(G, candidates).double(),
        desirable=torch.rand(G, candidates) < 0.5,
    )


def dense_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    logps = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return (logps.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (targets != -100)).sum(-1)


def dense_kto(p: SimpleNamespace, logps: Tensor) -> Tensor:
    total = 0.0
    for logp, ref, good in zip(logps.flatten(), p.ref_logps.flatten(), p.desirable.flatten(), strict=True):
        reward = logp - ref
        total = total + (
            1.3 * (1 - (BETA * (reward - 0.4)).sigmoid()) if good else 1 - (BETA * (0.4 - reward)).sigmoid()
        )
    return total / logps.numel()


def dense_orpo(p: SimpleNamespace, logps: Tensor) -> Tensor:
    probabilities = (logps / p.lengths).exp()
    odds = probabilities / (1 - probabilities)
    contrast = -torch.log(torch.sigmoid(torch.log(odds[:, 0] / odds[:, 1]))).mean()
    return BETA * contrast - logps[:, 0].sum() / p.lengths[:, 0].sum()


def dense_info_nca(p: SimpleNamespace, logps: Tensor) -> Tensor:
    scores = BETA * (logps - p.ref_logps)
    wanted = (p.rewards / 0.5).exp() / (p.rewards / 0.5).exp().sum(-1, keepdim=True)
    return -(wanted * (scores - scores.exp().sum(-1, keepdim=True).log())).sum(-1).mean()


def dense_nca(p: SimpleNamespace, logps: Tensor) -> Tensor:
    scores = BETA * (logps - p.ref_logps)
    wanted = (p.rewards / 0.5).exp() / (p.rewards / 0.5).exp().sum(-1, keepdim=True)
    return -(wanted * scores.sigmoid().log() + (1 - scores.sigmoid()).log() / logps.shape[1]).sum(-1).mean()


def dense_gspo(p: SimpleNamespace, logps: Tensor) -> Tensor:
    total = 0.0
    ratios = ((logps - p.old_logps) / p.lengths).exp()
    for ratio, advantage in zip(ratios.flatten(), p.advantages.flatten(), strict=True):
        clipped = min(max(ratio, ratio.new_tensor(0.98)), ratio.new_tensor(1.03))
        total = total - min(ratio * advantage, clipped * advantage)
    return total / logps.numel()


# By name: candidates, the loss of ours, and the same from log-likelihoods of the whole batch.
LOSSES = {
    "kto": (1, lambda p: kto(p.ref_logps, p.desirable, kl=0.4, beta=BETA, desirable_weight=1.3), dense_kto),
    "kto, grouped": (C, lambda p: kto(p.ref_logps, p.desirable, kl=0.4, beta=BETA, desirable_weight=1.3), dense_kto),
    "orpo": (2, lambda p: orpo(p.lengths, beta=BETA), dense_orpo),
    "info_nca": (C, lambda p: info_nca(p.ref_logps, p.rewards, beta=BETA, reward_temperature=0.5), dense_info_nca),
    "nca": (C, lambda p: nca(p.ref_logps, p.rewards, beta=BETA, reward_temperature=0.5), dense_nca),
    "gspo": (C, lambda p: gspo(p.old_logps, p.advantages, p.lengths, clip_low=0.02, clip_high=0.03), dense_gspo),
}


def in_dtype(p: SimpleNamespace, dtype: torch.dtype) -> SimpleNamespace:
    """Leaves of a dtype; numbers beside the head in float32, or float64 for float64."""
    beside = torch.float64 if dtype == torch.float64 else torch.float32
    values = {n: x.to(beside) if x.is_floating_point() else x for n, x in vars(p).items()}
    leaves = {n: getattr(p, n).to(dtype).requires_grad_() for n in ("hidden", "weight")}
    return SimpleNamespace(**(values | leaves))


@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_equal_the_dense_ones(name, dtype, chunked):
    candidates, make, dense = LOSSES[name]
    rounded = in_dtype(make_groups(candidates), dtype)
    results = {}
    exact = in_dtype(SimpleNamespace(**{n: x.detach() for n, x in vars(rounded).items()}), torch.float64)
    for kind, problem in (("oracle", exact), ("eager", rounded)):
        loss = dense(problem, dense_logps(problem.hidden, problem.weight, problem.targets))
        results[kind] = (loss.detach(), *torch.autograd.grad(loss, (problem.hidden, problem.weight)))
    leaves = rounded.hidden, rounded.weight
    budget = {"max_logits_bytes": 2 * candidates * T * V * dtype.itemsize} if chunked else {}
    loss = linear_sequence_loss(*leaves, rounded.targets, make(rounded), **budget)
    results["ours"] = (loss.detach(), *torch.autograd.grad(loss, leaves))
    for field, *values in zip(
        ("loss", "hidden", "weight"), *(results[k] for k in ("ours", "eager", "oracle")), strict=True
    ):
        assert_accurate(*values, field)


def packed(p: SimpleNamespace) -> tuple[Tensor, CandidateLayout]:
    """The tokens that count, as segments of their own lengths over the padded rows."""
    present = (p.targets != -100).flatten()
    ends = p.lengths.flatten().cumsum(0).tolist()
    groups = list(range(0, p.lengths.numel() + 1, p.lengths.shape[1]))
    return p.targets.flatten()[present], CandidateLayout([0, *ends], groups, rows=present.nonzero().squeeze(1))


@pytest.mark.parametrize("name", LOSSES)
def test_packed_groups_give_the_same(name):
    candidates, make, _ = LOSSES[name]
    p = in_dtype(make_groups(candidates), torch.float64)
    targets, layout = packed(p)
    expected = linear_sequence_loss(p.hidden, p.weight, p.targets, make(p))
    loss = linear_sequence_loss(p.hidden.flatten(0, 2), p.weight, targets, make(p), layout=layout)
    assert_close(loss, expected)
    assert_close(gradients(loss, p.hidden, p.weight), gradients(expected, p.hidden, p.weight))


@pytest.mark.parametrize("loss", [info_nca, nca])
def test_an_absent_candidate_counts_for_nothing(loss):
    p = in_dtype(make_groups(), torch.float64)
    p.targets[:, 2], p.rewards[:, 2] = -100, -torch.inf
    kept = [0, 1, 3]
    with_absent = linear_sequence_loss(p.hidden, p.weight, p.targets, loss(p.ref_logps, p.rewards))
    without = linear_sequence_loss(
        p.hidden[:, kept], p.weight, p.targets[:, kept], loss(p.ref_logps[:, kept], p.rewards[:, kept])
    )
    assert_close(with_absent, without)
    assert_close(gradients(with_absent, p.hidden, p.weight), gradients(without, p.hidden, p.weight))


def test_info_nca_of_one_good_candidate_is_cpo():
    p = in_dtype(make_groups(), torch.float64)
    rewards = torch.zeros(G, C).double()
    rewards[:, 0] = 1000.0
    loss = linear_sequence_loss(p.hidden, p.weight, p.targets, info_nca(p.ref_logps, rewards, beta=BETA))
    expected = linear_cpo_loss(p.hidden, p.weight, p.targets, ref_logps=p.ref_logps, beta=BETA).loss
    assert_close(loss, expected)
    assert_close(gradients(loss, p.hidden, p.weight), gradients(expected, p.hidden, p.weight))


# TRL's own code, on hidden states that are given. A missing private name is an AttributeError that says which.


def accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        device=DEVICE, gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x
    )


def trl_metrics() -> defaultdict:
    return defaultdict(lambda: defaultdict(list))


def test_kto_is_trls():
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    p = in_dtype(make_groups(candidates=1), torch.float64)
    p.desirable[:2, 0] = torch.tensor([True, False])
    mismatched = p.ref_logps[:, 0] + 0.5 * torch.rand(G).double()
    _, labels = unaligned(p.hidden[:, 0], p.targets[:, 0])
    batch = {
        "input_ids": labels.clamp(min=0),
        "attention_mask": torch.ones_like(labels),
        "completion_mask": (labels != -100).long(),
        "label": p.desirable[:, 0],
        "ref_logps": p.ref_logps[:, 0],
        "ref_KL_logps": p.ref_logps[:, 0],
    }
    fake = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        _compute_kl_logps=lambda model, batch: mismatched,
        loss_type="kto",
        beta=BETA,
        desirable_weight=1.3,
        undesirable_weight=0.7,
        _metrics=trl_metrics(),
        _total_train_tokens=0,
        _tp_size=1,
    )
    expected = trainer._compute_loss(fake, FixedHead(p.hidden[:, 0], p.weight), batch, return_outputs=False)
    baseline = kto_baseline(mismatched, p.ref_logps[:, 0])
    ours = kto(p.ref_logps, p.desirable, kl=baseline, beta=BETA, desirable_weight=1.3, undesirable_weight=0.7)
    loss = linear_sequence_loss(p.hidden, p.weight, p.targets, ours)
    assert baseline > 0
    assert_close(loss, expected)
    assert_close(gradients(loss, p.hidden, p.weight), gradients(expected, p.hidden, p.weight))


def test_a_baseline_below_zero_is_zero():
    logps = torch.tensor([-3.0, -4.0], requires_grad=True)
    baseline = kto_baseline(logps, torch.tensor([-1.0, -1.0]))
    assert baseline == 0 and not baseline.requires_grad
    assert_close(kto_baseline(logps, torch.tensor([-4.0, -6.0])), torch.tensor(1.5))


def test_orpo_is_trls():
    """TRL computes in float32 whatever it gets."""
    trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    p = in_dtype(make_groups(candidates=2), torch.float32)
    logits, labels = unaligned(chosen_first(p.hidden @ p.weight.T), chosen_first(p.targets))
    means = trainer.get_batch_logps(logits, labels, average_log_prob=True).chunk(2)
    ratios = trainer.odds_ratio_loss(SimpleNamespace(beta=BETA, accelerator=accelerator()), *means)[0]
    nll = torch.nn.functional.cross_entropy(logits[:G, :-1].flatten(0, 1), labels[:G, 1:].flatten())
    expected = nll - ratios.mean()
    loss = linear_sequence_loss(p.hidden, p.weight, p.targets, orpo(p.lengths, beta=BETA))
    assert_close(loss, expected)
    assert_close(gradients(loss, p.hidden, p.weight), gradients(expected, p.hidden, p.weight))


def test_nca_of_one_good_candidate_is_trls_nca_pair():
    pytest.importorskip("trl")
    hidden, weight, targets = make_pairs(torch.float64)
    ref_logps = -3 * torch.rand(len(targets), 2).double() * T
    expected = trl_dpo_loss("nca_pair", hidden, weight, targets, ref_logps)
    rewards = torch.tensor([1000.0, 0.0]).double().expand(len(targets), 2)
    loss = linear_sequence_loss(hidden, weight, targets, nca(ref_logps, rewards, beta=BETA))
    assert_close(loss, expected)
    assert_close(gradients(loss, hidden, weight), gradients(expected, hidden, weight))


def test_gspo_is_trls_grpo_of_sequences():
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    p = in_dtype(make_groups(), torch.float64)
    logps = (p.hidden @ p.weight.T).log_softmax(-1).gather(-1, p.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    flat, mask = logps.flatten(0, 1), (p.targets != -100).long().flatten(0, 1)
    old = flat.detach() + 0.1 * torch.randn(flat.shape).double()
    fake = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        _get_per_token_logps_and_entropies=lambda *_, **__: (flat, torch.zeros_like(flat), None),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="sequence",
        beta=0.0,
        loss_type="grpo",
        epsilon_low=0.02,
        epsilon_high=0.03,
        args=SimpleNamespace(delta=None),
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=trl_metrics(),
    )
    ids = p.targets.clamp(min=0).flatten(0, 1)
    batch = {"prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids, "completion_mask": mask}
    batch |= {"advantages": p.advantages.flatten(), "old_per_token_logps": old}
    expected = trainer._compute_loss(fake, None, batch)
    old_logps = (old * mask).sum(-1).view(G, C)
    ours = gspo(old_logps, p.advantages, p.lengths, clip_low=0.02, clip_high=0.03)
    loss = linear_sequence_loss(p.hidden, p.weight, p.targets, ours)
    assert_close(loss, expected)
    assert_close(gradients(loss, p.hidden, p.weight), gradients(expected, p.hidden, p.weight))


@pytest.mark.parametrize("name", LOSSES)
def test_in_the_forward_pass_of_a_model(name):
    """``SequenceLossRequest``: the same loss of the log-likelihoods that the model's own logits give."""
    candidates, make, _ = LOSSES[name]
    p = in_dtype(make_groups(candidates), torch.float32)
    model = attach_linear_loss(tiny_models.llama())
    ids = torch.randint(3, tiny_models.VOCAB, (G * candidates, T + 1))
    p.targets = ids[:, 1:].unflatten(0, (G, candidates)).masked_fill(p.targets == -100, -100)
    logps = dense_logps(model.model(ids[:, :-1]).last_hidden_state, model.lm_head.weight, p.targets.flatten(0, 1))
    p.ref_logps, p.old_logps = (logps.detach().view(G, candidates) + shift for shift in (0.3 * p.rewards, 0.1))
    expected = make(p)(logps, range(G))
    targets, layout = packed(p)
    out = model(ids[:, :-1], linear_loss=SequenceLossRequest(targets, layout, make(p)))
    assert out.logits is None
    assert_close(out.loss, expected, rtol=1e-5, atol=1e-6)
    parameters = list(model.parameters())
    assert_close(gradients(out.loss, *parameters), gradients(expected, *parameters), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: kto(p.ref_logps[:, :2], p.desirable, kl=0.0),
            r"ref_logps must be \(G, 4\) with G >= 5, got \(5, 2\)",
        ),
        (lambda p: nca(p.ref_logps, p.rewards[:3]), r"rewards must be \(G, 4\) with G >= 5, got \(3, 4\)"),
        (lambda p: orpo(p.lengths), r"lengths must be \(G, 2\), chosen and rejected, got \(5, 4\)"),
    ],
)
def test_numbers_that_do_not_fit_the_groups_are_refused(make, message):
    p = make_groups()
    with pytest.raises(ValueError, match=message):
        linear_sequence_loss(p.hidden.requires_grad_(), p.weight, p.targets, make(p))
