"""Our losses equal those of TRL and Liger on the same tensors; each test says how the parameters map."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from devices import DEVICE
from pairs import BETA, G, T, V, chosen_first, gradients, make_pairs, trl_dpo_loss, unaligned
from torch.testing import assert_close

import cpo_kernels
from cpo_kernels import contrastive_loss, cpo_loss, linear_cpo_loss

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# Development dependencies: constraints.txt pins them and CI installs them, so these tests are skipped only by users.
cpo_trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
liger = pytest.importorskip("liger_kernel.chunked_loss")


def trl_cpo(loss_type: str, *, label_smoothing: float = 0.0, simpo_gamma: float = 0.0) -> SimpleNamespace:
    """The attributes that `CPOTrainer.cpo_loss` reads; alpha = 0 means no AlphaPO."""
    return SimpleNamespace(
        alpha=0.0,
        beta=BETA,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        simpo_gamma=simpo_gamma,
        accelerator=SimpleNamespace(device=DEVICE),
    )


CPO_CASES = [
    # TRL's sigmoid is the Plackett-Luce of two; label_smoothing has the same meaning.
    ("sigmoid", {}, {}),
    ("sigmoid", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    # simpo_gamma is in units of the score, beta * logp, as our margin is; it adds SimPO's mean over tokens.
    ("simpo", {"simpo_gamma": 0.7}, {"margin": 0.7, "length_normalized": True}),
    (
        "simpo",
        {"simpo_gamma": 0.7, "label_smoothing": 0.1},
        {"margin": 0.7, "length_normalized": True, "label_smoothing": 0.1},
    ),
    ("hinge", {}, {"loss_type": "hinge"}),
    # beta is IPO's tau. TRL's CPO trainer contrasts means of token log-probabilities for ipo.
    ("ipo", {}, {"loss_type": "ipo", "length_normalized": True}),
]


@pytest.mark.parametrize(("loss_type", "theirs", "ours"), CPO_CASES)
def test_contrastive_loss_is_trl_cpo_loss(loss_type, theirs, ours):
    logps = (4 * torch.randn(G, 2, dtype=torch.float64)).requires_grad_()
    ours = {name: value for name, value in ours.items() if name != "length_normalized"}
    expected, *rewards = cpo_trainer.CPOTrainer.cpo_loss(trl_cpo(loss_type, **theirs), logps[:, 0], logps[:, 1])
    loss = contrastive_loss(logps, beta=BETA, reduction="none", **ours)
    assert_close(loss, expected)
    assert_close(gradients(loss, logps), gradients(expected, logps))
    assert_close(BETA * logps.detach(), torch.stack(rewards, 1))


@pytest.mark.parametrize(("loss_type", "theirs", "ours"), CPO_CASES)
@pytest.mark.parametrize("materialised", [True, False], ids=["logits", "hidden"])
def test_cpo_loss_is_trl_cpo_trainer(loss_type, theirs, ours, materialised):
    hidden, weight, targets = make_pairs(torch.float64)
    logits, labels = unaligned(chosen_first(hidden @ weight.T), chosen_first(targets))
    average = loss_type in ("ipo", "simpo")  # as CPOTrainer.concatenated_forward decides it
    logps = cpo_trainer.CPOTrainer.get_batch_logps(logits, labels, average_log_prob=average)
    expected, *rewards = cpo_trainer.CPOTrainer.cpo_loss(trl_cpo(loss_type, **theirs), *logps.chunk(2))
    if materialised:
        out = cpo_loss(hidden @ weight.T, targets, beta=BETA, **ours)
    else:
        out = linear_cpo_loss(hidden, weight, targets, beta=BETA, **ours)
    assert_close(out.loss, expected.mean())
    assert_close(gradients(out.loss, hidden, weight), gradients(expected.mean(), hidden, weight))
    assert_close(out.logps, torch.stack(logps.chunk(2), 1).detach())
    assert_close(out.rewards, torch.stack(rewards, 1))
    assert_close(out.accuracy.double(), (rewards[0] > rewards[1]).double().mean())
    assert_close(out.margin, (rewards[0] - rewards[1]).mean())


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "sigmoid_norm"])
def test_linear_cpo_loss_is_trl_dpo_loss(loss_type):
    hidden, weight, targets = make_pairs(torch.float64)
    ref_logps = -3 * torch.rand(G, 2, dtype=torch.float64) * T
    expected = trl_dpo_loss(loss_type, hidden, weight, targets, ref_logps)
    # For ipo and sigmoid_norm both divide logp - ref by the number of tokens.
    normalized = loss_type in ("ipo", "sigmoid_norm")
    out = linear_cpo_loss(
        hidden,
        weight,
        targets,
        ref_logps=ref_logps,
        beta=BETA,
        loss_type="plackett_luce" if loss_type.startswith("sigmoid") else loss_type,
        length_normalized=normalized,
    )
    assert_close(out.loss, expected)
    assert_close(gradients(out.loss, hidden, weight), gradients(expected, hidden, weight))


@pytest.mark.parametrize("pairs_per_chunk", [1, 2])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize(("alpha", "label_smoothing"), [(0.0, 0.0), (0.0, 0.2), (0.5, 0.0)])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_linear_cpo_loss_is_liger_cpo_loss(pairs_per_chunk, average, alpha, label_smoothing, with_bias):
    hidden, weight, targets = make_pairs(torch.float32)
    bias = torch.randn(V, requires_grad=True) if with_bias else None
    # Liger's alpha weighs the mean NLL of the chosen tokens (our mle_weight); its preference term has weight 1.
    theirs = liger.LigerFusedLinearCPOLoss(
        beta=BETA,
        alpha=alpha,
        compute_nll_loss=alpha > 0,
        label_smoothing=label_smoothing,
        average_log_prob=average,
        compiled=False,
        chunk_size=pairs_per_chunk,
    )
    expected, (chosen, rejected, *_) = theirs(weight, chosen_first(hidden), chosen_first(targets), bias)
    out = linear_cpo_loss(
        hidden,
        weight,
        targets,
        beta=BETA,
        mle_weight=alpha,
        label_smoothing=label_smoothing,
        length_normalized=average,
        bias=bias,
    )
    inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
    assert_close(out.loss, expected)
    assert_close(out.logps, torch.stack([chosen, rejected], 1).detach())
    assert_close(gradients(out.loss, *inputs), gradients(expected, *inputs))


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_linear_cpo_loss_is_liger_dpo_loss(loss_type):
    hidden, weight, targets = make_pairs(torch.float32)
    ref_hidden, ref_weight = (x.detach() + 0.1 * torch.randn_like(x) for x in (hidden, weight))
    theirs = liger.LigerFusedLinearDPOLoss(beta=BETA, compiled=False, loss_type=loss_type)
    stacked = chosen_first(hidden), chosen_first(targets), None, chosen_first(ref_hidden)
    expected, _ = theirs(weight, *stacked, ref_weight)
    out = linear_cpo_loss(
        hidden,
        weight,
        targets,
        ref_logps=cpo_kernels.linear_sequence_logps(ref_hidden, ref_weight, targets),
        beta=BETA,
        loss_type="plackett_luce" if loss_type == "sigmoid" else loss_type,
    )
    assert_close(out.loss, expected)
    assert_close(gradients(out.loss, hidden, weight), gradients(expected, hidden, weight))
