"""How long and how repetitive free generations are, beside the texts they should resemble."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

ORDERS = (1, 2, 3, 4)


@dataclass(frozen=True)
class GenerationStatistics:
    """Of some completions; their EOS counts as no token. NaN where there is nothing to average.

    Attributes:
        count: completions.
        mean_length, median_length: tokens of a completion.
        ended: share of completions that EOS ended; None where no EOS was named.
        repetition: by n, the mean over completions of ``1 - distinct n-grams / n-grams``, those with fewer than n
            tokens left out: seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training".
        distinct: by n, the n-grams of all completions together, distinct ones over all: distinct-n of Li et al. 2016,
            "A Diversity-Promoting Objective Function for Neural Conversation Models", with the number of n-grams in
            place of that of tokens below, so that 1 is reached. It falls with the size of a corpus.
    """

    count: int
    mean_length: float
    median_length: float
    ended: float | None
    repetition: dict[int, float]
    distinct: dict[int, float]


def generation_statistics(
    completions: Sequence[Sequence[int]], eos_token_id: int | None = None
) -> GenerationStatistics:
    """Length, end and repetition of completions.

    Args:
        completions: token ids of each; what follows an EOS is no part of it.
        eos_token_id: the token that ends a completion, if one does.
    """
    texts = [_before(completion, eos_token_id) for completion in completions]
    lengths = [len(text) for text in texts]
    ended = sum(len(text) < len(completion) for text, completion in zip(texts, completions, strict=True))
    repetition, distinct = {}, {}
    for n in ORDERS:
        grams = [[text[i : i + n] for i in range(len(text) - n + 1)] for text in texts]
        repetition[n] = _mean([1 - len(set(own)) / len(own) for own in grams if own])
        total = sum(map(len, grams))
        distinct[n] = len(set().union(*grams)) / total if total else float("nan")
    return GenerationStatistics(
        count=len(texts),
        mean_length=_mean(lengths),
        median_length=float(statistics.median(lengths)) if lengths else float("nan"),
        ended=None if eos_token_id is None or not texts else ended / len(texts),
        repetition=repetition,
        distinct=distinct,
    )


def _before(completion: Sequence[int], eos_token_id: int | None) -> tuple[int, ...]:
    tokens = tuple(completion)
    return tokens[: tokens.index(eos_token_id)] if eos_token_id in tokens else tokens


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else float("nan")
