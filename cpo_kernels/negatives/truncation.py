"""Truncation negatives (TN in arXiv 2502.16433): the ground truth cut early and ended with EOS.

The tokens before the cut are the ground truth's, and the row that predicts the next token of the ground truth also
predicts the EOS. So such a negative needs no forward pass of the transformer: it is a list of rows of the ground truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

from .endings import end_of, without_end

Row = TypeVar("Row")


def truncation_negatives(
    completion: Sequence[int], eos_token_id: int | Sequence[int], count: int, rng: Random
) -> list[int]:
    """Draw where to cut a completion.

    A cut c keeps the first c tokens and puts EOS in place of the next. Cuts are drawn uniformly without replacement
    from 1 to the last one that removes a token other than EOS; a completion of a single token besides EOS is cut to EOS
    alone.

    Args:
        completion: token ids of the ground truth, with or without EOS at its end.
        eos_token_id: the token that ends a completion, or every one that may.
        count: how many cuts to draw.
        rng: source of randomness; the result is a function of its state and of the completion alone.

    Returns:
        At most ``count`` different cuts, fewer where the completion is too short to have as many.

    Raises:
        ValueError: the completion holds nothing besides EOS.
    """
    content = len(without_end(completion, eos_token_id))
    if content == 0:
        raise ValueError("a completion without tokens besides EOS cannot be truncated")
    cuts = range(1, content) if content > 1 else range(1)
    return rng.sample(cuts, min(count, len(cuts)))


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
