"""Build the inputs of a training step from indices of examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .along_truth import scheduled_conditions
from .batch import ContrastBatch
from .config import CPOConfig
from .data import TokenizedExamples
from .negatives import EVALUATION_STEP, Drawn, Negatives
from .ranking import Ranking


@dataclass
class BatchBuilder:
    """A builder of batches, which draws the negatives of examples and packs them.

    Args:
        config: the objective and its limits.
        negatives: the source that draws negatives.
        ranking: the ranking that orders negatives.
        share_prefixes: whether prompts may be shared by their candidates.
    """

    config: CPOConfig
    negatives: Negatives
    ranking: Ranking
    share_prefixes: bool

    def build(self, examples: TokenizedExamples, indices: Sequence[int], step: int, contrast: bool) -> ContrastBatch:
        """Make the groups of some examples at ``step``, with negatives if ``contrast``."""
        special = self.negatives.special
        batch = ContrastBatch(special.ends, special.pad, self.config.length_budget, self.share_prefixes)
        drawn = self.negatives.draw(examples, indices, step) if contrast else [Drawn() for _ in indices]
        conditions = self._conditions(examples, indices, step)
        for index, own, condition in zip(indices, drawn, conditions, strict=True):
            prompt, completion = examples.prompts[index], examples.completions[index]
            batch.add_group(prompt, completion, own.negatives, condition, own.ref_logp)
        return batch

    def inputs(
        self, batch: ContrastBatch, num_groups: int, num_target_tokens: int, ref_logps: Tensor | None = None
    ) -> dict[str, Any]:
        """Join the tensors of a batch and the sizes of the whole step, by which its loss is divided.

        Args:
            batch: one micro-batch of this process.
            num_groups: groups of all micro-batches of all processes.
            num_target_tokens: tokens of rank 0 in all micro-batches of all processes.
            ref_logps: (S,) if they are known already.
        """
        inputs = batch.tensors() | {
            "own_target_tokens": batch.num_target_tokens,
            "num_groups": num_groups,
            "num_target_tokens": num_target_tokens,
        }
        if ref_logps is not None:
            inputs["ref_logps"] = ref_logps
        elif not self.ranking.by_reference:  # A reference that ranks candidates has to read all of them.
            known = batch.reference_tensors()
            # A sharded reference runs in all processes or in none, and others may have candidates to read.
            if "unread" in known or not self.negatives.sources.synced_gpus:
                inputs |= known
        self.ranking.rank_texts(batch, inputs)
        return inputs

    def _conditions(
        self, examples: TokenizedExamples, indices: Sequence[int], step: int
    ) -> Sequence[Sequence[int] | None]:
        """Return the tokens that the body sees in place of each completion in scheduled sampling; else None."""
        if self.config.objective != "scheduled_sampling" or step == EVALUATION_STEP:
            return [None] * len(indices)
        sources = self.negatives.sources
        with sources.asking("model") as model:
            return scheduled_conditions(
                model,
                [(examples.prompts[index], examples.completions[index]) for index in indices],
                self.negatives.seed,
                step,
                indices,
                self.config.scheduled_sampling_probability,
                self.config.scheduled_sampling_passes,
                self.negatives.ends,
                sources.head,
                sources.device,
            )
