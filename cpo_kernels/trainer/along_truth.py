"""Tokens drawn along ground truths in one forward pass, for mean-field negatives and for scheduled sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cpo_kernels.models import StatisticsRequest
from cpo_kernels.negatives.endings import end_of
from cpo_kernels.negatives.seeds import generator, pass_seed, token_seeds

from .batch import ContrastBatch, body_inputs


@dataclass(frozen=True)
class Passage:
    """A ground truth, and how a forward pass reads it.

    Args:
        prompt, completion: token ids.
        seeds: (T,) int64, one for each token of the completion.
        drawn: (count, T) bool, the tokens to draw; None, in all passages of a pass, for all tokens.
        conditioned_on: (T,) token ids that the model sees in place of the completion's.
        cuts: truncations of the completion, whose log-likelihoods are computed too.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    seeds: Tensor
    drawn: Tensor | None = None
    conditioned_on: Sequence[int] | None = None
    cuts: Sequence[int] = ()


@dataclass(frozen=True)
class Reading:
    """The results of one forward pass over a passage.

    Attributes:
        samples: (count, T) int64 on the CPU, each token drawn from the next-token distribution at its place; -100 where
            none is to be drawn, or none can be.
        logp: log-likelihood of the completion, nats.
        cut_logps: log-likelihoods of its truncations, nats.
    """

    samples: Tensor
    logp: float
    cut_logps: list[float]


def read(
    model: nn.Module,
    passages: Sequence[Passage],
    count: int,
    eos_token_id: int | Sequence[int],
    head: Mapping[str, Any],
    device: torch.device,
) -> list[Reading]:
    """Read passages in one forward pass, and draw ``count`` tokens for the place of each of their tokens.

    Args:
        model: a model with :func:`~cpo_kernels.attach_linear_loss`, in evaluation mode.
        passages: the ground truths to read.
        count: number of draws for each token.
        eos_token_id: the token that ends a truncation; of several, the one that ends its ground truth, or the first.
        head: options of the head.
        device: device of the model.
    """
    batch = ContrastBatch(eos_token_id)
    for passage in passages:
        batch.add_group(passage.prompt, passage.completion, conditioned_on=passage.conditioned_on)
    tensors = batch.tensors()
    inputs = {name: value.to(device) for name, value in tensors.items() if isinstance(value, Tensor)}
    # The row at a cut predicts two targets: the next token of the ground truth and the end of the truncation.
    starts = tensors["cu_tokens"]
    ends = [start + cut for start, passage in zip(starts, passages, strict=False) for cut in passage.cuts]
    places = torch.tensor(ends, dtype=torch.int64, device=device)
    last_tokens = [end_of(passage.completion, eos_token_id) for passage in passages for _ in passage.cuts]
    seeds = torch.cat([passage.seeds for passage in passages]).to(device)
    masks = [passage.drawn.T for passage in passages if passage.drawn is not None]
    nothing = torch.zeros((len(ends), count), dtype=torch.bool, device="cpu")
    request = StatisticsRequest(
        torch.cat([inputs["targets"], places.new_tensor(last_tokens)]),
        torch.cat([inputs["rows"], inputs["rows"][places]]),
        seed=torch.cat([seeds, torch.zeros_like(places)]),
        num_samples=count,
        sample_mask=torch.cat([*masks, nothing]).to(device) if masks else None,
        **head,
    )
    out = model(**body_inputs(inputs), linear_loss=request)
    logps, last = out.token_logps.double().cpu(), iter(out.token_logps.double().cpu()[starts[-1] :].tolist())
    samples = out.samples.cpu()
    return [
        Reading(
            samples=samples[start:end].T,
            logp=float(logps[start:end].sum()),
            cut_logps=[float(logps[start : start + cut].sum()) + next(last) for cut in passage.cuts],
        )
        for (start, end), passage in zip(pairwise(starts), passages, strict=True)
    ]


def scheduled_conditions(
    model: nn.Module,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    seed: int,
    step: int,
    indices: Sequence[int],
    probability: float,
    passes: int,
    eos_token_id: int | Sequence[int],
    head: Mapping[str, Any],
    device: torch.device,
) -> list[list[int]]:
    """Draw the text that parallel scheduled sampling conditions on (Duckworth et al. 2019, algorithm 1).

    In every pass each token of a completion is replaced, with ``probability``, by a token that the model draws at its
    place, conditioned on the result of the pass before.

    Args:
        model: a model with :func:`~cpo_kernels.attach_linear_loss`, in evaluation mode.
        texts: prompt and completion of each example.
        seed, step, indices: of each example the draws depend on these two and on its index alone.
        probability: probability that a token is replaced.
        passes: number of sampling passes.
        eos_token_id: the token that ends a completion, or every one that may.
        head: options of the head.
        device: device of the model.
    """
    conditions = [list(completion) for _, completion in texts]
    lengths = [len(completion) for _, completion in texts]
    for number in range(passes):
        seeds = token_seeds(pass_seed(seed, number), step, indices, lengths).split(lengths)
        generators = [generator((seed, step, index), number) for index in indices]
        chosen = [
            torch.tensor([[rng.random() < probability for _ in range(length)]], device="cpu")
            for rng, length in zip(generators, lengths, strict=True)
        ]
        passages = [
            Passage(prompt, completion, own, drawn, conditioned_on=condition)
            for (prompt, completion), own, drawn, condition in zip(texts, seeds, chosen, conditions, strict=True)
        ]
        readings = read(model, passages, 1, eos_token_id, head, device)
        conditions = [
            [old if new < 0 else new for new, old in zip(reading.samples[0].tolist(), completion, strict=True)]
            for reading, (_, completion) in zip(readings, texts, strict=True)
        ]
    return conditions
