"""Losses of other papers, as the ``loss_fn`` of :func:`cpo_kernels.linear_sequence_loss`.

Each function takes the other inputs of a loss besides log-likelihoods, for all G groups of a call, and returns a
function of the log-likelihoods of some of these groups::

    loss = linear_sequence_loss(hidden, weight, targets, gspo(old_logps, advantages, lengths))

with hidden (G, C, T, H) and targets (G, C, T), or a layout of G groups of C candidates each. The loss is the mean over
the G groups, or over their sequences if no candidate is compared with another: under gradient accumulation, and over
processes, these means have to be averaged. Tensors are on the device of ``hidden`` and floating
point unless said otherwise; ``lengths`` are ``(targets != -100).sum(-1)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cpo_kernels.options import suggests_arguments

LossFn = Callable[[Tensor, range], Tensor]


@suggests_arguments
def kto(
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    kl: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossFn:
    """Make KTO of Ethayarajh et al. 2024 (arXiv 2402.01306), for answers that are good or bad by themselves.

    Args:
        ref_logps: (G, C) log-likelihoods under the reference model; C may be 1, as no candidate is compared. A
            sequence without tokens has no gradient but is counted.
        desirable: (G, C) bool.
        kl: the baseline, a scalar without gradient, in nats: see :func:`kto_baseline`.
        beta: inverse temperature of the value function.
        desirable_weight: the paper's lambda of good answers.
        undesirable_weight: the paper's lambda of bad answers.
    """

    def loss_fn(logps: Tensor, groups: range) -> Tensor:
        logps, ref, good = of_groups(logps, groups, ref_logps=ref_logps, desirable=desirable)
        lost = (beta * torch.where(good, kl - (logps - ref), logps - ref - kl)).sigmoid()
        return torch.where(good, desirable_weight * lost, undesirable_weight * lost).sum() / ref_logps.numel()

    return loss_fn


@suggests_arguments
def kto_baseline(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Compute KTO's estimate of the KL divergence from the reference, a scalar without gradient.

    Args:
        logps: (n,) log-likelihoods of completions after prompts that they do not belong to, such as the previous
            example's of the batch. They take a forward pass of their own, without gradients. With several processes,
            average ``logps - ref_logps`` over all of them before the clamp.
        ref_logps: (n,) log-likelihoods of the same completions under the reference model.
    """
    return (logps - ref_logps).detach().mean().clamp(min=0)


@suggests_arguments
def orpo(lengths: Tensor, *, beta: float = 0.1, nll_weight: float = 1.0) -> LossFn:
    """Make ORPO of Hong et al. 2024 (arXiv 2403.07691): odds of means over tokens, without a reference.

    Args:
        lengths: (G, 2) integers, tokens of the chosen and of the rejected sequence, at least 1.
        beta: the paper's lambda, the weight of the odds ratio.
        nll_weight: weight of the NLL per token of the chosen sequences.
    """
    if lengths.dim() != 2 or lengths.shape[1] != 2:
        raise ValueError(f"lengths must be (G, 2), chosen and rejected, got {tuple(lengths.shape)}")

    def loss_fn(logps: Tensor, groups: range) -> Tensor:
        logps, tokens = of_groups(logps, groups, lengths=lengths)
        means = logps / tokens
        odds = log_odds(means)
        contrast = -logsigmoid(odds[:, 0] - odds[:, 1]).sum() / len(lengths)
        return beta * contrast - nll_weight * logps[:, 0].sum() / lengths[:, 0].sum()

    return loss_fn


def log_odds(logps: Tensor) -> Tensor:
    """Compute log(p / (1 - p)) from log p."""
    return logps - (-logps.expm1()).log()


@suggests_arguments
def info_nca(ref_logps: Tensor, rewards: Tensor, *, beta: float = 0.1, reward_temperature: float = 1.0) -> LossFn:
    """Make InfoNCA of Chen et al. 2024 (arXiv 2402.05369): cross-entropy of the softmaxes of rewards and of scores.

    Args:
        ref_logps: (G, C) log-likelihoods under the reference model.
        rewards: (G, C), -infinity for an absent candidate; every group has a present one.
        beta: inverse temperature of the scores ``beta * (logp - ref)``.
        reward_temperature: the paper's alpha, > 0.
    """

    def loss_fn(logps: Tensor, groups: range) -> Tensor:
        logps, ref, given = of_groups(logps, groups, ref_logps=ref_logps, rewards=rewards)
        absent = given == -torch.inf
        predicted = (beta * (logps - ref)).masked_fill(absent, -torch.inf).log_softmax(-1).masked_fill(absent, 0.0)
        return -((given / reward_temperature).softmax(-1) * predicted).sum() / len(ref_logps)

    return loss_fn


@suggests_arguments
def nca(ref_logps: Tensor, rewards: Tensor, *, beta: float = 0.1, reward_temperature: float = 1.0) -> LossFn:
    """Make NCA of Chen et al. 2024 (arXiv 2402.05369): each candidate against noise, so that good ones stay likely.

    Arguments as for :func:`info_nca`. Rewards 1,000 apart (of -infinity the candidate would be absent) give
    ``nca_pair`` of TRL and Liger.
    """

    def loss_fn(logps: Tensor, groups: range) -> Tensor:
        logps, ref, given = of_groups(logps, groups, ref_logps=ref_logps, rewards=rewards)
        scores, present = beta * (logps - ref), given != -torch.inf
        noise = present / present.sum(-1, keepdim=True)
        signal = (given / reward_temperature).softmax(-1)
        return -(signal * logsigmoid(scores) + noise * logsigmoid(-scores)).sum() / len(ref_logps)

    return loss_fn


@suggests_arguments
def gspo(
    old_logps: Tensor, advantages: Tensor, lengths: Tensor, *, clip_low: float = 3e-4, clip_high: float = 4e-4
) -> LossFn:
    """Make GSPO of Zheng et al. 2025 (arXiv 2507.18071): GRPO with one importance ratio a sequence.

    Args:
        old_logps: (G, C) log-likelihoods under the model that drew the samples.
        advantages: (G, C), such as rewards less their group's mean, over its standard deviation.
        lengths: (G, C) integers, tokens of each sample; 0 for an absent one, which has no loss but is counted.
        clip_low: the ratio of the per-token mean likelihoods is clipped to [1 - clip_low, 1 + clip_high].
        clip_high: see ``clip_low``; the defaults are the paper's.
    """

    def loss_fn(logps: Tensor, groups: range) -> Tensor:
        extra = {"old_logps": old_logps, "advantages": advantages, "lengths": lengths}
        logps, old, gain, tokens = of_groups(logps, groups, **extra)
        ratio = ((logps - old) / tokens.clamp(min=1)).exp()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        return -torch.minimum(ratio * gain, clipped * gain).masked_fill(tokens == 0, 0.0).sum() / old_logps.numel()

    return loss_fn


def of_groups(logps: Tensor, groups: range, **tensors: Tensor) -> list[Tensor]:
    """Return log-likelihoods as (len(groups), C), and from each tensor (G, C) the rows of these groups."""
    shape = (len(groups), logps.numel() // len(groups))
    parts = [logps.reshape(shape)]
    for name, tensor in tensors.items():
        parts.append(tensor[groups.start : groups.stop])
        if parts[-1].shape != shape:
            raise ValueError(f"{name} must be (G, {shape[1]}) with G >= {groups.stop}, got {tuple(tensor.shape)}")
    return parts
