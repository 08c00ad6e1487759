"""Tokens drawn along ground truths in one forward pass: mean-field negatives, and scheduled sampling's conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from cpo_kernels.models import StatisticsRequest
from cpo_kernels.negatives import token_seeds

from .batch import ContrastBatch, body_inputs


@dataclass(frozen=True)
class Passage:
    """A ground truth and what it is read with.

    Args:
        prompt, completion: token ids.
        seeds: (T,) int64, one for each token of the completion.
        conditioned_on: (T,) token ids that the model sees in place of the completion's.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    seeds: Tensor
    conditioned_on: Sequence[int] | None = None


def draw(
    model: nn.Module, passages: Sequence[Passage], count: int, head: Mapping[str, Any], device: torch.device
) -> list[Tensor]:
    """For each passage ``count`` sequences (count, T) of tokens, each drawn from its own next-token distribution.

    Args:
        model: with :func:`~cpo_kernels.attach_linear_loss`, in evaluation mode.
        passages: what is read, in one forward pass.
        count: draws of each token.
        head: options of the head.
        device: of the model.
    """
    batch = ContrastBatch(eos_token_id=0)  # there is no truncation that it would end
    for passage in passages:
        batch.add_group(passage.prompt, passage.completion, conditioned_on=passage.conditioned_on)
    tensors = batch.tensors()
    inputs = {name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)}
    seeds = torch.cat([passage.seeds for passage in passages]).to(device)
    request = StatisticsRequest(inputs["targets"], inputs["rows"], seed=seeds, num_samples=count, **head)
    samples = model(**body_inputs(inputs), linear_loss=request).samples
    return [own.T for own in samples.cpu().split([len(passage.completion) for passage in passages])]


def scheduled_conditions(
    model: nn.Module,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    keys: Sequence[tuple[int, int, int]],
    probability: float,
    passes: int,
    head: Mapping[str, Any],
    device: torch.device,
) -> list[list[int]]:
    """What parallel scheduled sampling conditions on in place of each completion (Duckworth et al. 2019, algorithm 1).

    In every pass each token of the completion is replaced, with ``probability``, by one that the model draws at its
    place, conditioned on what the pass before has left there.

    Args:
        model: with :func:`~cpo_kernels.attach_linear_loss`, in evaluation mode.
        texts: prompt and completion of each example.
        keys: (seed, step, example) of each, which alone decide what is drawn.
        probability: that a token is replaced.
        passes: sampling passes.
        head: options of the head.
        device: of the model.
    """
    conditions = [list(completion) for _, completion in texts]
    for number in range(passes):
        passages = [
            Passage(prompt, completion, token_seeds(seed + (number << 64), step, index, len(completion)), condition)
            for (prompt, completion), (seed, step, index), condition in zip(texts, keys, conditions, strict=True)
        ]
        drawn = draw(model, passages, 1, head, device)
        for i, ((_, completion), key) in enumerate(zip(texts, keys, strict=True)):
            rng = Random(f"{key}/{number}")
            conditions[i] = [
                # -100: a model whose logits are NaN draws nothing
                new if rng.random() < probability and new >= 0 else old
                for new, old in zip(drawn[i][0].tolist(), completion, strict=True)
            ]
    return conditions
