"""The negatives that need no model: drawn from the data, cut from the ground truth, or brought by the example."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from cpo_kernels.negatives import batch_negatives, truncation_negatives

from .batch import Negative
from .data import TokenizedExamples


@dataclass(frozen=True)
class NegativeSampler:
    """Draws the negatives of an example: a pure function of (seed, step, example), whatever else is in its batch.

    Batch negatives come from the whole data set. A batch is a random sample of it, so their distribution is that of
    the other completions in a batch, but they do not depend on how a batch is split into micro-batches, on the number
    of processes, or on where a run was resumed, and a batch of one example has them too.
    """

    examples: TokenizedExamples
    eos_token_id: int
    num_batch_negatives: int
    num_truncation_negatives: int
    seed: int
    max_length: int | None = None

    def draw(self, index: int, step: int) -> list[Negative]:
        """The negatives of example ``index`` as it is contrasted at ``step``; those that it brings come first."""
        behind = self.rank_of_drawn(index)
        completions = self.examples.completions
        rng = Random(f"{self.seed}/{step}/{index}")
        # What of a completion fits behind this prompt must be wrong, not only the whole of it.
        room = None if self.max_length is None else self.max_length - len(self.examples.prompts[index])
        others = batch_negatives(completions, index, self.num_batch_negatives, rng, room)
        cuts = truncation_negatives(completions[index], self.eos_token_id, self.num_truncation_negatives, rng)
        return [
            *self.given(index),
            *(Negative("batch", completions[other], rank=behind) for other in others),
            *(Negative("truncation", cut=cut, rank=behind) for cut in cuts),
        ]

    def given(self, index: int) -> list[Negative]:
        """The negatives that the example brings."""
        if self.examples.negatives is None:
            return []
        negatives = self.examples.negatives[index]
        ranks = None if self.examples.ranks is None else self.examples.ranks[index]
        kinds = ["given"] * len(negatives) if self.examples.kinds is None else self.examples.kinds[index]
        return [
            Negative(kind, tokens, rank=1 if ranks is None else ranks[number])
            for number, (kind, tokens) in enumerate(zip(kinds, negatives, strict=True))
        ]

    def rank_of_drawn(self, index: int) -> int:
        """The rank of a negative that was drawn: behind those that the example ranks."""
        ranks = None if self.examples.ranks is None else self.examples.ranks[index]
        return 1 + max(ranks, default=0) if ranks is not None else 1
