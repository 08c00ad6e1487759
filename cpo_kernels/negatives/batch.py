"""Batch negatives (BN in arXiv 2502.16433): other examples' completions under this prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random


def batch_negatives(
    completions: Sequence[Sequence[int]], index: int, count: int, rng: Random, max_tokens: int | None = None
) -> list[int]:
    """Draw ``count`` other completions of a pool as negatives for the prompt of example ``index``.

    The draw is uniform without replacement. The example's own completion, any completion with the same tokens as it,
    and repeats of a completion already drawn are passed over, so the negatives are wrong and differ from one another.

    Args:
        completions: the pool, token ids of every example's completion: a batch, or a whole data set.
        index: the example to draw for, a position in ``completions``.
        count: how many negatives to draw.
        rng: source of randomness; the result is a function of its state and of the pool alone.
        max_tokens: compare only this many first tokens, if the rest will be cut off; None to compare all.

    Returns:
        ``count`` positions in ``completions``.

    Raises:
        ValueError: the pool holds fewer than ``count`` distinct completions that differ from the example's own.
    """
    if count == 0:
        return []
    taken = {tuple(completions[index][:max_tokens])}
    drawn: list[int] = []
    for other in _random_order(len(completions), rng):
        tokens = tuple(completions[other][:max_tokens])
        if tokens in taken:
            continue
        taken.add(tokens)
        drawn.append(other)
        if len(drawn) == count:
            return drawn
    raise ValueError(
        f"example {index} needs {count} batch negatives, but the {len(completions)} completions to draw from hold "
        f"only {len(drawn)} that differ from its own and from each other"
    )


def _random_order(size: int, rng: Random) -> Iterator[int]:
    """Yield every index of range(size) once, in random order, at a cost that grows with what is consumed only."""
    # Those entries of a Fisher-Yates shuffle's array that differ from range(size).
    moved: dict[int, int] = {}
    for i in range(size):
        j = rng.randrange(i, size)
        yield moved.get(j, j)
        moved[j] = moved.pop(i, i)
