"""Batch negatives (BN in arXiv 2502.16433): other examples' completions under this prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from cpo_kernels.options import suggests_arguments

from .endings import without_end
from .seeds import generator
from .wrong import is_wrong


@suggests_arguments
def batch_negatives(
    completions: Sequence[Sequence[int]],
    count: int,
    *,
    indices: Sequence[int] | None = None,
    seed: int = 0,
    step: int = 0,
    eos_token_id: int | Sequence[int] = (),
    max_tokens: int | None = None,
) -> list[list[list[int]]]:
    """Draw ``count`` other completions of a pool as negatives of each of some examples.

    The draw is uniform without replacement. The example's own completion, whatever equals it by :func:`is_wrong`, and
    repeats of a completion already drawn are passed over, so the negatives are wrong and differ from one another.

    Args:
        completions: the pool, token ids of every example's completion: a batch, or a whole data set.
        count: how many negatives of each example.
        indices: the examples to draw for, positions in ``completions``. Default: all.
        seed, step: the draws for an example are a function of these, of its index and of the pool alone.
        eos_token_id: the token that ends a completion, or every one that may; completions are compared without. By
            default they are compared with all of their tokens.
        max_tokens: cut negatives to this many tokens, and compare no more of any completion; None to cut none.

    Returns:
        ``negatives[example][number]``, token ids.

    Raises:
        ValueError: a negative count, or a pool that holds fewer than ``count`` distinct completions that differ from an
            example's own; the message names the example.
    """
    chosen = range(len(completions)) if indices is None else indices
    return [
        [
            list(completions[other][:max_tokens])
            for other in draw_others(completions, index, count, generator(seed, step, index), eos_token_id, max_tokens)
        ]
        for index in chosen
    ]


def draw_others(
    completions: Sequence[Sequence[int]],
    index: int,
    count: int,
    rng: Random,
    eos_token_id: int | Sequence[int] = (),
    max_tokens: int | None = None,
) -> list[int]:
    """Draw the positions of the batch negatives of one example; arguments as for :func:`batch_negatives`.

    The result is a function of the pool and of the generator's state alone.
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    if count == 0:
        return []
    own = completions[index][:max_tokens]
    taken: set[tuple[int, ...]] = set()
    drawn: list[int] = []
    for other in _random_order(len(completions), rng):
        tokens = completions[other][:max_tokens]
        content = tuple(without_end(tokens, eos_token_id))
        if content in taken or not is_wrong(tokens, own, eos_token_id):
            continue
        taken.add(content)
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
