"""The order of negatives that were written ahead of time, by their likeness to the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from cpo_kernels.models import LogpsRequest, attach_linear_loss
from cpo_kernels.negatives import Negative, SentenceEmbedder, similarity_ranks
from cpo_kernels.trainer.batch import ContrastBatch, body_inputs, layout_of
from cpo_kernels.trainer.config import CPOConfig

from .errors import InputError, input_errors

Ids = Sequence[int]


class Likeness:
    """Ranks by cosine similarity, of sentence embeddings where a model for them is named, else of hidden states.

    Args:
        config: ``embedding_model``, lengths, batch size and device.
        tokenizer: of the candidates.
        model: the language model whose hidden states are taken; None where a server writes.
    """

    def __init__(self, config: CPOConfig, tokenizer: Any, model: Any) -> None:
        self.config, self.tokenizer, self.model = config, tokenizer, model
        self.embedder: SentenceEmbedder | None = None
        if config.embedding_model is not None:
            with input_errors(RuntimeError):
                self.embedder = SentenceEmbedder(config.embedding_model, device=str(config.device))
        elif model is None:
            raise InputError(
                "negatives_ranking='similarity' needs an embedding_model where a server writes the negatives"
            )
        else:
            with input_errors(RuntimeError):
                attach_linear_loss(model)

    def ranks(
        self, prompts: Sequence[Ids], truths: Sequence[Ids], negatives: Sequence[Sequence[Ids]]
    ) -> list[list[int]]:
        """For each example the ranks of its negatives, from 1; the likest first, equals equal."""
        ranks: list[list[int]] = []
        size = self.config.per_device_eval_batch_size
        for start in range(0, len(negatives), size):
            some = slice(start, start + size)
            cu_groups = [0, *accumulate(1 + len(own) for own in negatives[some])]
            flat = similarity_ranks(self._embed(prompts[some], truths[some], negatives[some]), cu_groups)
            ranks += [flat[first + 1 : last] for first, last in pairwise(cu_groups)]
        return ranks

    def _embed(self, prompts: Sequence[Ids], truths: Sequence[Ids], negatives: Sequence[Sequence[Ids]]) -> Tensor:
        """Embeddings (S, H): of each example its ground truth, then its negatives."""
        if self.embedder is not None:
            candidates = [list(ids) for truth, own in zip(truths, negatives, strict=True) for ids in (truth, *own)]
            return self.embedder.embed(self.tokenizer.batch_decode(candidates, skip_special_tokens=True))
        eos = self.tokenizer.eos_token_id
        batch = ContrastBatch(eos, eos, self.config.max_length)
        for prompt, truth, own in zip(prompts, truths, negatives, strict=True):
            batch.add_group(prompt, truth, [Negative("autoregressive", ids) for ids in own])
        inputs = {
            name: value.to(self.config.device) if isinstance(value, Tensor) else value
            for name, value in batch.tensors().items()
        }
        request = LogpsRequest(inputs["targets"], layout_of(inputs), pool=True)
        with torch.no_grad():
            return self.model(**body_inputs(inputs), linear_loss=request).embeddings
