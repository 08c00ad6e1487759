"""Truncation negatives (TN in arXiv 2502.16433): the ground truth cut early and ended with EOS.

The tokens before the cut are the ground truth's, and the row that predicts the next token of the ground truth also
predicts the EOS. So such a negative needs no forward pass of the transformer: it is a list of rows of the ground truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

from cpo_kernels.options import suggests_arguments

from .endings import end_of, without_end
from .seeds import generator

Row = TypeVar("Row")


@suggests_arguments
def truncation_negatives(
    completions: Sequence[Sequence[int]],
    count: int,
    *,
    eos_token_id: int | Sequence[int],
    keys: Sequence[int] | None = None,
    seed: int = 0,
    step: int = 0,
) -> list[list[list[int]]]:
    """Cut each completion early in up to ``count`` places, and end it there.

    Places are drawn uniformly without replacement, so that at least one token stays and one besides EOS is removed; a
    completion of a single token besides EOS is cut to EOS alone. None is the ground truth, by :func:`is_wrong`.

    Args:
        completions: token ids of each ground truth, with or without EOS at its end.
        count: how many negatives of each.
        eos_token_id: the token that ends a completion, or every one that may; a negative is ended by the one that ends
            its ground truth, or else by the first.
        keys: for each completion an integer, such as the index of its example, on which its cuts depend besides
            ``seed`` and ``step``. Default: its position, 0, 1, ...
        seed, step: any integers.

    Returns:
        ``negatives[example][number]``, token ids: fewer than ``count`` where a completion is too short to have as many,
        none where it has nothing besides EOS. A negative of n tokens is predicted by the first n rows of its ground
        truth.

    Raises:
        ValueError: a negative count, or another number of keys than of completions.
    """
    if keys is not None and len(keys) != len(completions):
        raise ValueError(f"expected one key per completion, {len(completions)}, got {len(keys)}")
    negatives = []
    for key, completion in zip(range(len(completions)) if keys is None else keys, completions, strict=True):
        cuts = draw_cuts(completion, eos_token_id, count, generator(seed, step, key))
        negatives.append([truncate(completion, completion, cut, eos_token_id)[0] for cut in cuts])
    return negatives


def draw_cuts(completion: Sequence[int], eos_token_id: int | Sequence[int], count: int, rng: Random) -> list[int]:
    """Draw how many tokens to keep in each of up to ``count`` truncations of one completion.

    The result is a function of the completion and of the generator's state alone.
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    content = len(without_end(completion, eos_token_id))
    cuts = range(1, content) if content > 1 else range(content)
    return rng.sample(cuts, min(count, len(cuts)))


@suggests_arguments
def truncate(
    completion: Sequence[int], rows: Sequence[Row], cut: int, eos_token_id: int | Sequence[int]
) -> tuple[list[int], list[Row]]:
    """Return the truncated candidate's tokens as a :class:`~cpo_kernels.CandidateLayout` takes them.

    Args:
        completion: (T,) token ids of the ground truth.
        rows: (T,) the row of ``hidden`` that predicts each token, or any object that represents the row.
        cut: how many tokens to keep, in [0, T).
        eos_token_id: the token that ends the candidate; of several, the one that ends the completion, or else the
            first.

    Returns:
        targets and rows of the candidate's ``cut + 1`` tokens; the rows are the ground truth's own.

    Raises:
        ValueError: ``rows`` of another length than ``completion``, or a cut outside [0, T).
    """
    if len(rows) != len(completion):
        raise ValueError(f"rows must have one entry per token, {len(completion)}, got {len(rows)}")
    if not 0 <= cut < len(completion):
        raise ValueError(f"cut must be in [0, {len(completion)}), got {cut}")
    return [*completion[:cut], end_of(completion, eos_token_id)], list(rows[: cut + 1])
