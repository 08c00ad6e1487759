"""The terms of GRPO and its relatives, token by token, from log-probabilities; ``loss_type`` of Liger and TRL."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, distributed

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
# Those without a clipped ratio, which is what an importance ratio of whole sequences would take the place of.
OF_TOKENS_ONLY = ("cispo", "sapo", "vespo")
# Limits of log ratios, and of the weight that VESPO makes of their sum.
LOG_LIMIT, LOG_TINY = 20.0, math.log(1e-8)


class PolicySettings(Protocol):
    """The settings of the loss module that the terms depend on, by Liger's names."""

    beta: float
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    max_completion_length: int | None
    importance_sampling_level: str
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    delta: float | None
    use_bias_correction_kl: bool
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float


class Given(NamedTuple):
    """What comes with some sequences, of T tokens each, besides their log-probabilities.

    Attributes:
        mask: (b, T) weights, 0 where there is no token.
        advantages: (b, 1).
        old: (b, T) log-probabilities under the model that drew the samples; None: the present ones.
        ref: (b, T) log-probabilities under the reference; None: the present ones.
        ratio: (b, T) or (b, 1), correction of the ratio between the sampler and the old model, or None.
    """

    mask: Tensor
    advantages: Tensor
    old: Tensor | None
    ref: Tensor | None
    ratio: Tensor | None

    def of(self, sequences: slice) -> Given:
        """Return what comes with some of the sequences."""
        return Given(*(None if tensor is None else tensor[sequences] for tensor in self))  # type: ignore[arg-type]


class Terms(NamedTuple):
    """What the loss and the metrics are sums of, each (b, T), or (b, 1) where all tokens have the same.

    Attributes:
        losses: the loss of each token.
        kl: the estimate of the divergence from the reference; None with ``beta=0``.
        clipped: bool, whether the ratio was clipped.
    """

    losses: Tensor
    kl: Tensor | None
    clipped: Tensor


def terms_of(logps: Tensor, given: Given, settings: PolicySettings) -> Terms:
    """Compute the terms of tokens from their log-probabilities (b, T)."""
    gain, kind = given.advantages, settings.loss_type
    log_ratio = logps - (logps.detach() if given.old is None else given.old)
    of_tokens = log_ratio
    if settings.importance_sampling_level == "sequence":
        lengths = given.mask.sum(-1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio * given.mask).sum(-1, keepdim=True) / lengths
    ratio = log_ratio.exp()
    nowhere = torch.zeros_like(ratio, dtype=torch.bool)
    low, high = ratio < 1 - settings.epsilon_low, ratio > 1 + settings.epsilon_high
    if kind == "cispo":
        losses = -ratio.clamp(max=settings.epsilon_high).detach() * gain * logps
        low, high = nowhere, ratio > settings.epsilon_high
    elif kind == "sapo":
        losses = -gain * torch.where(
            gain > 0, soft_gate(ratio, settings.sapo_temperature_pos), soft_gate(ratio, settings.sapo_temperature_neg)
        )
        low, high = nowhere, nowhere
    elif kind == "vespo":
        losses = -vespo_weights(of_tokens, given, settings) * gain * logps
        low, high = nowhere, nowhere
    else:
        bounded = ratio if settings.delta is None else ratio.clamp(max=settings.delta)
        clipped = ratio.clamp(1 - settings.epsilon_low, 1 + settings.epsilon_high)
        losses = -torch.minimum(bounded * gain, clipped * gain)
    if given.ratio is not None and kind != "vespo":
        losses = losses * given.ratio
    kl = None
    if settings.beta != 0:
        log_gap = (logps.detach() if given.ref is None else given.ref) - logps
        kl = log_gap.exp() - log_gap - 1  # Schulman's k3, an unbiased estimate that is never negative
        kl = kl * ratio if settings.use_bias_correction_kl else kl
        losses = losses + settings.beta * kl
    return Terms(losses, kl, (low & (gain < 0)) | (high & (gain > 0)))


def soft_gate(ratio: Tensor, temperature: float) -> Tensor:
    """Return SAPO's smooth stand-in for a clipped ratio (arXiv 2511.20347)."""
    return (temperature * (ratio - 1)).sigmoid() * (4 / temperature)


@torch.no_grad()
def vespo_weights(log_ratio: Tensor, given: Given, settings: PolicySettings) -> Tensor:
    """Return VESPO's weights (b, 1) of sequences, ``w ** k * exp(lambda * (1 - w))`` of their ratios w."""
    log_weight = (log_ratio.clamp(-LOG_LIMIT, LOG_LIMIT) * given.mask).sum(-1, keepdim=True)
    if given.ratio is not None:
        log_weight = log_weight + given.ratio.log().clamp(LOG_TINY, LOG_LIMIT).sum(-1, keepdim=True)
    log_weight = log_weight.clamp(LOG_TINY, LOG_LIMIT)
    good = given.advantages >= 0
    power = torch.where(good, settings.vespo_k_pos, settings.vespo_k_neg)
    rate = torch.where(good, settings.vespo_lambda_pos, settings.vespo_lambda_neg).clamp(min=1e-4)
    return (rate + power * log_weight - rate * log_weight.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def token_weights(mask: Tensor, settings: PolicySettings, num_items: float | Tensor | None) -> Tensor:
    """Return what each token's loss is multiplied by, (B, T), so that their sum is the loss of the call.

    Args:
        mask: (B, T), of all sequences of the call.
        settings: the loss module.
        num_items: tokens of the whole accumulated batch over all processes, for the types that divide by them; None:
            those of this call on all processes.
    """
    sequences, kind = mask.shape[0], settings.loss_type
    lengths = mask.sum(-1, keepdim=True)
    if kind in ("grpo", "sapo"):
        return mask / lengths.clamp(min=1) / sequences
    if kind == "bnpo":
        return mask / mask.sum().clamp(min=1)
    if kind == "dr_grpo":
        return mask / (sequences * settings.max_completion_length)  # type: ignore[operator]
    if kind == "luspo":  # as in TRL and Liger, the mean over all positions, masked ones too
        return (lengths / mask.numel()).expand_as(mask)
    return mask / tokens_per_process(mask, num_items)


def tokens_per_process(mask: Tensor, num_items: float | Tensor | None) -> Tensor:
    """Return the tokens of a batch over the number of processes that share it, at least 1."""
    spread = distributed.is_available() and distributed.is_initialized()
    processes = distributed.get_world_size() if spread else 1
    if num_items is not None:
        return torch.as_tensor(num_items, device=mask.device).to(mask.dtype).div(processes).clamp(min=1)
    tokens = mask.sum()
    if spread:
        distributed.all_reduce(tokens)
    return (tokens / processes).clamp(min=1)
