"""Mean-field negatives (MN in arXiv 2502.16433): a random share of the truth's tokens, each drawn anew along the truth.

The row that predicts a token of the ground truth also gives its replacement, drawn given the true tokens before it and
independently of the other replacements: one forward pass over the ground truth gives its log-likelihood and any number
of negatives, and nothing is generated. All other tokens stay as they are.

A negative is at most as long as the ground truth. It ends at the first EOS drawn (:func:`finish`): in generation
nothing follows EOS, and a model contrasted with tokens behind an EOS would learn about texts that it never writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpo_kernels.engine.statistics import device_seeds, linear_token_statistics
from cpo_kernels.functional import linear_token_logps
from cpo_kernels.kernels import counter_random
from cpo_kernels.kernels.numerics import IGNORE_INDEX
from cpo_kernels.layout import check_boundaries
from cpo_kernels.options import suggests_arguments

from .endings import as_ids, without_end
from .wrong import is_wrong

DEFAULT_FRACTION = 0.25


class MeanField(NamedTuple):
    """Log-likelihoods and samples along ground truths, from one product with the head.

    Attributes:
        logps: (N,) log-probabilities of the ground truth's tokens in nats, not differentiable.
        samples: (count, N) int64, the tokens drawn in place of the targets; -100 where none is drawn, so that the true
            token stays: see :func:`finish`.
    """

    logps: Tensor
    samples: Tensor


@partial(suggests_arguments, passes_to=linear_token_logps)
def mean_field_negatives(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    seeds: int | Tensor,
    eos_token_id: int | Sequence[int],
    count: int = 1,
    mean_field_fraction: float = DEFAULT_FRACTION,
    cu_tokens: Sequence[int] | None = None,
    **head: Any,
) -> list[list[list[int]]]:
    """Draw up to ``count`` mean-field negatives of each of some ground truths, whose rows are given.

    Args:
        hidden, weight, targets, seeds, count, mean_field_fraction, cu_tokens, **head: as for
            :func:`mean_field_samples`; targets of -100 are in no negative.
        eos_token_id: the token that ends a ground truth, or every one that may. A drawn one ends its negative.

    Returns:
        ``negatives[example][number]``, token ids, one list for each ground truth: fewer than ``count`` where what was
        drawn is the ground truth, by :func:`is_wrong`.

    Raises:
        ValueError: as for :func:`mean_field_samples`.
    """
    drawn = mean_field_samples(
        hidden,
        weight,
        targets,
        seeds=seeds,
        count=count,
        mean_field_fraction=mean_field_fraction,
        eos_token_id=eos_token_id,
        cu_tokens=cu_tokens,
        **head,
    )
    negatives = []
    truths = _split(targets, cu_tokens)
    for samples, truth in zip(drawn.samples.split([len(truth) for truth in truths], dim=1), truths, strict=True):
        # Tokens that are not there are no part of any text.
        there = [place for place, token in enumerate(truth) if token != IGNORE_INDEX]
        own = [truth[place] for place in there]
        texts = finish(samples[:, there], own, eos_token_id)
        negatives.append([text for text in texts if is_wrong(text, own, eos_token_id)])
    return negatives


@partial(suggests_arguments, passes_to=linear_token_logps)
def mean_field_samples(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    seeds: int | Tensor,
    count: int = 1,
    mean_field_fraction: float = DEFAULT_FRACTION,
    eos_token_id: int | Sequence[int] | None = None,
    cu_tokens: Sequence[int] | None = None,
    mask: Tensor | None = None,
    **head: Any,
) -> MeanField:
    """Draw the tokens of ``count`` mean-field negatives along ground truths; :func:`finish` makes texts of them.

    :func:`mean_field_negatives` does both; this one also returns the log-likelihoods of the ground truths' tokens, from
    the same product.

    With a seed for each token, the positions that a negative replaces are a function of its ground truth's seeds and of
    its number, and so are the tokens drawn there, given the hidden states: neither depends on ``count`` or on the other
    ground truths, and what is drawn at a position does not depend on the fraction.

    Args:
        hidden: (N, H), the rows that predict the tokens of the ground truths, one after the other.
        weight: (V, H), the head of the model, or of the reference, that the tokens are drawn from.
        targets: (N,) int64, the ground truths; -100 for no token.
        seeds: one for the call, or (N,) int64 of :func:`~.seeds.token_seeds`, one for each token, so that the draws for
            an example do not depend on the other examples of the call.
        count: how many negatives of each ground truth.
        mean_field_fraction: the share c of positions that a negative replaces, in (0, 1]. Of the T tokens before the
            end of a ground truth, exactly ``max(1, round(c * T))``, chosen uniformly without replacement. With 1 every
            token, the one that ends the ground truth too.
        eos_token_id: the token that ends a ground truth, or every one that may; needed for a fraction below 1, and read
            with the targets on the host.
        cu_tokens: (E + 1,) host integers; the tokens of ground truth e are ``cu_tokens[e]:cu_tokens[e + 1]``. None: the
            targets are one ground truth.
        mask: (count, N) bool, the positions that each negative replaces; None: those that the fraction chooses.
        **head: bias and options as for :func:`cpo_kernels.linear_token_statistics`.

    Raises:
        ValueError: a fraction outside (0, 1], or below 1 without ``eos_token_id``; boundaries that do not fit; a mask
            of another shape; and what :func:`cpo_kernels.linear_token_statistics` raises.
    """
    check_fraction(mean_field_fraction)
    if mask is not None and mask.shape != (count, *targets.shape):
        raise ValueError(f"mask must have shape {(count, *targets.shape)}, got {tuple(mask.shape)}")
    if mask is None and mean_field_fraction < 1:
        if eos_token_id is None:
            raise ValueError(
                f"mean_field_fraction={mean_field_fraction} leaves the end of a ground truth as it is and needs "
                "eos_token_id, the token or tokens that may end one; got None"
            )
        completions = _split(targets, cu_tokens)
        mask = replaced_positions(
            _seeds_of_tokens(seeds, targets), completions, eos_token_id, count, mean_field_fraction
        )
    sample_mask = None if mask is None else mask.T
    out = linear_token_statistics(
        hidden, weight, targets, seed=seeds, num_samples=count, sample_mask=sample_mask, **head
    )
    assert out.samples is not None
    return MeanField(out.logps, out.samples.T)


def check_fraction(fraction: float) -> None:
    """Raise ``ValueError`` for a share of replaced positions outside (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"mean_field_fraction must be in (0, 1], got {fraction}")


def replaced_positions(
    seeds: Tensor,
    completions: Sequence[Sequence[int]],
    eos_token_id: int | Sequence[int],
    count: int,
    fraction: float,
) -> Tensor | None:
    """Choose the positions that each mean-field negative replaces.

    Every position has a random number for each negative, a function of its seed; a negative replaces the positions of
    its ground truth that have the smallest, which are a uniform choice without replacement.

    Args:
        seeds: (N,) int64, one for each token of the ground truths.
        completions: token ids of E ground truths of N tokens together; -100 for no token.
        eos_token_id: the token that ends a ground truth, or every one that may; what ends one is not replaced.
        count: how many negatives of each ground truth.
        fraction: the share of positions, in (0, 1].

    Returns:
        (count, N) bool on the device of the seeds; None for all of them, where the fraction is 1.
    """
    if fraction == 1:
        return None
    ends = (*as_ids(eos_token_id), IGNORE_INDEX)
    # Of each token the number of its ground truth, from 1 on; 0 where it has to stay.
    owners: list[int] = []
    for number, completion in enumerate(completions, start=1):
        free = [0 if token == IGNORE_INDEX else number for token in without_end(completion, ends)]
        owners += free + [0] * (len(completion) - len(free))
    eligible = Counter(owners)
    counts = [eligible[number] for number in range(len(completions) + 1)]
    sizes = [0, *(max(1, round(fraction * own)) if own else 0 for own in counts[1:])]
    device = seeds.device
    owner = torch.tensor(owners, dtype=torch.int64, device=device)
    # Counters below 0: what is drawn at a position counts from 0 on.
    numbers = counter_random.counted(seeds, -1 - torch.arange(count, device=device)[:, None])
    by_number = numbers.argsort(1)
    order = by_number.gather(1, owner[by_number].argsort(dim=1, stable=True))
    # Sorted by ground truth and then by number, the smallest of each lie at its start.
    tokens = torch.tensor(counts, device=device)
    limits = tokens.cumsum(0) - tokens + torch.tensor(sizes, device=device)
    chosen = torch.arange(len(owners), device=device) < limits[owner.sort().values]
    return torch.zeros_like(numbers, dtype=torch.bool).scatter_(1, order, chosen.expand_as(order))


def _seeds_of_tokens(seeds: int | Tensor, targets: Tensor) -> Tensor:
    """Return the seeds (N,) of tokens, made of that of the call where there is only one."""
    own = device_seeds(seeds, targets)
    return own if own.dim() else counter_random.counted(own, -1 - torch.arange(len(targets), device=targets.device))


def _split(targets: Tensor, cu_tokens: Sequence[int] | None) -> list[list[int]]:
    """Return the tokens of each ground truth."""
    if targets.dim() != 1:
        raise ValueError(f"targets must have shape (N,), got {tuple(targets.shape)}")
    tokens = targets.tolist()
    bounds = [0, len(tokens)] if cu_tokens is None else cu_tokens
    check_boundaries("cu_tokens", bounds)
    if bounds[-1] != len(tokens):
        raise ValueError(f"cu_tokens must end with the number of targets, {len(tokens)}, got {bounds[-1]}")
    return [tokens[start:end] for start, end in pairwise(bounds)]


@suggests_arguments
def finish(samples: Tensor, completion: Sequence[int], eos_token_id: int | Sequence[int]) -> list[list[int]]:
    """Put the tokens drawn for one ground truth in their places, and cut each text behind its first drawn EOS.

    Args:
        samples: (count, T) int64, the tokens drawn for each negative; -100 where the true token stays: because none was
            to be drawn, or because none could be (a row of NaN has no distribution).
        completion: (T,) token ids of the ground truth. An EOS within it that stays cuts nothing.
        eos_token_id: the token that ends a completion, or every one that may.

    Returns:
        ``count`` completions. Some may be the ground truth: see :func:`is_wrong`.

    Raises:
        ValueError: samples of another length than the ground truth.
    """
    if samples.dim() != 2 or samples.shape[1] != len(completion):
        raise ValueError(f"samples must have shape (count, {len(completion)}), got {tuple(samples.shape)}")
    ends = as_ids(eos_token_id)
    texts = []
    for sequence in samples.tolist():
        length = next((place + 1 for place, token in enumerate(sequence) if token in ends), len(sequence))
        texts.append([old if new < 0 else new for new, old in zip(sequence[:length], completion, strict=False)])
    return texts
