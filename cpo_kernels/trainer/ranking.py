"""The order of candidates by their similarity to the ground truth, in the space of one of two embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cpo_kernels.negatives import SentenceEmbedder, similarity_ranks

from .batch import ContrastBatch
from .config import CPOConfig


class Ranking:
    """Ranks the negatives of a batch by cosine similarity to their ground truth, if the configuration says so."""

    def __init__(self, config: CPOConfig, tokenizer: Any, device: Any) -> None:
        self.tokenizer = tokenizer
        self.wanted = config.ranking == "similarity"
        name = config.embedding_model if self.wanted else None
        self._embedder = None if name is None else SentenceEmbedder(name, device=str(device))

    @property
    def by_reference(self) -> bool:
        """Whether the embeddings are mean hidden states of the reference."""
        return self.wanted and self._embedder is None

    def rank_texts(self, batch: ContrastBatch, inputs: dict[str, Any]) -> None:
        """Set ``inputs["ranks"]`` by the embeddings of the candidates' texts, where a model for them is named."""
        if self._embedder is None:
            return
        tokens = [list(segment.tokens) for segment in batch.segments]
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        inputs["ranks"] = ranks_by_similarity(self._embedder.embed(texts), inputs)


def ranks_by_similarity(embeddings: Tensor, inputs: Mapping[str, Any]) -> list[int]:
    """Ranks (S,) by cosine similarity to the first of each group, among those that the data ranks equal."""
    return similarity_ranks(embeddings, inputs["cu_groups"], base_ranks=inputs["ranks"])
