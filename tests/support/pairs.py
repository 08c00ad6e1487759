"""Pairs of completions as TRL and Liger take them, and TRL's DPO loss on hidden states that are given."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import torch
from devices import DEVICE
from torch import Tensor

G, T, V, H = 5, 7, 23, 6
BETA = 0.3
ALLOWED_PROMPT = 3  # leading tokens of a completion that may be prompt


def make_pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Make hidden (G, 2, T, H), weight (V, H), targets (G, 2, T) of different lengths."""
    hidden = torch.randn(G, 2, T, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    targets = torch.randint(V, (G, 2, T))
    prompt = torch.randint(ALLOWED_PROMPT + 1, (G, 2, 1))
    return hidden, weight, targets.masked_fill(torch.arange(T) < prompt, -100)


def chosen_first(x: Tensor) -> Tensor:
    """Turn (G, 2, ...) into (2G, ...): all chosen, then all rejected sequences, as TRL and Liger take them."""
    return x.transpose(0, 1).flatten(0, 1)


def unaligned(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Add the position that TRL's shift removes: its `logits[:, t]` predicts `labels[:, t + 1]`."""
    return torch.cat([logits, logits[:, :1]], 1), torch.cat([torch.full_like(targets[:, :1], -100), targets], 1)


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Compute gradients of a loss, whose upstream gradient differs from group to group if it is one per group."""
    return torch.autograd.grad(loss, inputs, torch.arange(1.0, loss.numel() + 1, dtype=loss.dtype).view_as(loss))


class FixedHead:
    """A model whose hidden states are given: what `DPOTrainer` sees of a model with TRL's fused head."""

    training = True

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.weight = hidden, weight

    def __call__(self, *, labels: Tensor, **_: object) -> SimpleNamespace:
        logits, targets = self.hidden @ self.weight.T, labels[:, 1:]
        logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        zeros = torch.zeros_like(logps)
        logged = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
        return SimpleNamespace(log_probs=logps.masked_fill(targets == -100, 0.0), **logged)


def trl_dpo_loss(loss_type: str, hidden: Tensor, weight: Tensor, targets: Tensor, ref_logps: Tensor) -> Tensor:
    """Run `DPOTrainer._compute_loss` with precomputed reference log-likelihoods."""
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=DEVICE, gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=BETA,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    _, labels = unaligned(chosen_first(hidden), chosen_first(targets))
    inputs = {
        "input_ids": labels.clamp(min=0),
        "attention_mask": torch.ones_like(labels),
        "completion_mask": (labels != -100).long(),
        "ref_chosen_logps": ref_logps[:, 0],
        "ref_rejected_logps": ref_logps[:, 1],
    }
    model = FixedHead(chosen_first(hidden), weight)
    return DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
