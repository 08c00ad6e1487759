"""Mean-field negatives (MN in arXiv 2502.16433): every token drawn from the next-token distribution along the truth.

The row that predicts a token of the ground truth also gives its replacement, independently of the other replacements:
one forward pass over the ground truth gives its log-likelihood and any number of negatives, and nothing is generated.

A negative is at most as long as the ground truth. It ends at the first EOS drawn (:func:`finish`): in generation
nothing follows EOS, and a model contrasted with tokens behind an EOS would learn about texts that it never writes. A
negative in which no EOS is drawn is a completion that was cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from torch import Tensor

from cpo_kernels.engine.statistics import linear_token_statistics

from .endings import until_end


class MeanField(NamedTuple):
    """Log-likelihoods and samples along ground truths, from one product with the head.

    Attributes:
        logps: (N,) log-probabilities of the ground truth's tokens in nats, not differentiable.
        samples: (count, N) int64, the tokens drawn in place of the targets; -100 where the target is -100, and where
            the mask of the call is false.
    """

    logps: Tensor
    samples: Tensor


def mean_field_negatives(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    seeds: int | Tensor,
    count: int = 1,
    mask: Tensor | None = None,
    **head: Any,
) -> MeanField:
    """Draw ``count`` mean-field negatives along ground truths.

    Args:
        hidden: (N, H), the rows that predict the tokens of the ground truths, one after the other.
        weight: (V, H), the head of the model, or of the reference, that the tokens are drawn from.
        targets: (N,) int64, the ground truths; -100 for no token.
        seeds: one for the call, or (N,) int64 of :func:`~.seeds.token_seeds`, one for each token, so that the draws for
            an example do not depend on the other examples of the call.
        count: how many negatives of each ground truth.
        mask: (count, N) bool, the tokens that each negative draws, the same as without a mask; None: all.
        **head: bias and options as for :func:`cpo_kernels.linear_token_statistics`.

    Raises:
        ValueError: a mask of another shape, and what :func:`cpo_kernels.linear_token_statistics` raises.
    """
    if mask is not None and mask.shape != (count, *targets.shape):
        raise ValueError(f"mask must have shape {(count, *targets.shape)}, got {tuple(mask.shape)}")
    sample_mask = None if mask is None else mask.T
    out = linear_token_statistics(
        hidden, weight, targets, seed=seeds, num_samples=count, sample_mask=sample_mask, **head
    )
    assert out.samples is not None
    return MeanField(out.logps, out.samples.T)


def finish(samples: Tensor, eos_token_id: int | Sequence[int]) -> list[list[int]]:
    """Turn sequences (count, T) drawn for one ground truth into completions, each cut behind its first EOS.

    ``eos_token_id`` is the token that ends a completion, or every one that may.

    A sequence ends before a token of -100, which could not be drawn because its row has no distribution (NaN).
    """
    drawn = [list(takewhile(lambda token: token >= 0, sequence)) for sequence in samples.tolist()]
    return [until_end(sequence, eos_token_id) for sequence in drawn]


def is_wrong(negative: Sequence[int], completion: Sequence[int]) -> bool:
    """Tell whether a drawn sequence can be a negative: it has tokens, and is not the ground truth itself.

    A model that is sure of the ground truth draws just that; such a draw has to be left out.
    """
    return len(negative) > 0 and list(negative) != list(completion)
