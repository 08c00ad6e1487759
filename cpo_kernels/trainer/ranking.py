"""Ranks of candidates by similarity to the ground truth: of sentence embeddings or of mean hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from cpo_kernels.negatives import Negative, SentenceEmbedder, similarity_ranks

from .batch import ContrastBatch
from .config import CPOConfig
from .reference import Reference
from .zero import loading_whole

Ids = Sequence[int]


class Ranking:
    """A ranking of negatives by cosine similarity to their ground truth.

    Args:
        config: says whether negatives are ranked, and by which sentence encoder; without one, by hidden states.
        tokenizer: the tokenizer of the candidates; None suffices without a sentence encoder.
        device: device of the sentence encoder.
        wanted: whether negatives are ranked; None for what the configuration says.

    Raises:
        RuntimeError: a sentence encoder that cannot be loaded.
        ValueError: a sentence encoder and no tokenizer.
    """

    def __init__(self, config: CPOConfig, tokenizer: Any, device: Any, wanted: bool | None = None) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.wanted = config.ranking == "similarity" if wanted is None else wanted
        name = config.embedding_model if self.wanted else None
        if name is not None and tokenizer is None:
            raise ValueError(f"embedding_model={name!r} reads text; pass the tokenizer")
        with loading_whole():
            self._embedder = None if name is None else SentenceEmbedder(name, device=str(device))

    @property
    def by_reference(self) -> bool:
        """Whether the embeddings are mean hidden states of the reference."""
        return self.wanted and self._embedder is None

    def rank_texts(self, batch: ContrastBatch, inputs: dict[str, Any]) -> None:
        """Set ``inputs["ranks"]`` by sentence embeddings of the candidates, if a sentence encoder is configured."""
        if self._embedder is None:
            return
        tokens = [list(segment.tokens) for segment in batch.segments]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        # A candidate that ends at once is embedded by its end: the embedding of no text may have no direction.
        texts = [text if text.strip() else self.tokenizer.decode(ids) for text, ids in zip(texts, tokens, strict=True)]
        inputs["ranks"] = ranks_by_similarity(self._embedder.embed(texts), inputs)

    def rank_written(
        self,
        reference: Reference | None,
        prompts: Sequence[Ids],
        truths: Sequence[Ids],
        negatives: Sequence[Sequence[Ids]],
    ) -> list[list[int]]:
        """Rank negatives that were written ahead of time.

        Args:
            reference: the model whose hidden states are used if no sentence encoder is configured.
            prompts: token ids of each example's prompt.
            truths: token ids of each ground truth.
            negatives: token ids of each example's negatives.

        Returns:
            For each example the ranks of its negatives, from 1; equally similar ones share a rank.
        """
        ranks: list[list[int]] = []
        size = self.config.per_device_eval_batch_size
        for start in range(0, len(negatives), size):
            some = slice(start, start + size)
            batch = ContrastBatch(eos_token_id=(), max_length=self.config.length_budget)  # without truncations to end
            for prompt, truth, own in zip(prompts[some], truths[some], negatives[some], strict=True):
                batch.add_group(prompt, truth, [Negative("autoregressive", ids) for ids in own])
            inputs = batch.tensors()
            self.rank_texts(batch, inputs)
            if self.by_reference and reference is not None:
                embeddings = reference.score(inputs, {}, pool=True).embeddings
                assert embeddings is not None
                inputs["ranks"] = ranks_by_similarity(embeddings, inputs)
            ranks += [inputs["ranks"][first + 1 : last] for first, last in pairwise(batch.groups)]
        return ranks


def ranks_by_similarity(embeddings: Tensor, inputs: Mapping[str, Any]) -> list[int]:
    """Rank candidates (S,) by cosine similarity to the first of each group, among those that the data ranks equal."""
    return similarity_ranks(embeddings, inputs["cu_groups"], base_ranks=inputs["ranks"])
