"""Who writes negatives ahead of time: a model here, or a server."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from cpo_kernels.negatives.autoregressive import Sampling, autoregressive_negatives
from cpo_kernels.negatives.completions import CompletionsEndpoint
from cpo_kernels.trainer.config import CPOConfig
from cpo_kernels.trainer.reference import fingerprint

from .errors import input_errors

KEY_VARIABLE = "CPO_KERNELS_COMPLETIONS_KEY"

Prompt = str | Sequence[int]
Written = list[list[list[int]]]  # token ids of each sample of each prompt


class ModelWriter:
    """A model that samples; what it writes for an example depends on nothing but the example and its number.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    def identity(self) -> str:
        """What tells its negatives from those of another."""
        return fingerprint(self.model)

    def __call__(
        self, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], first: int, count: int, sampling: Sampling
    ) -> Written:
        """``count`` completions behind each of the prompts ``ids``, the first of which is number ``first``."""
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        return autoregressive_negatives(
            self.model,
            ids,
            count,
            eos_token_id=eos,
            pad_token_id=eos if pad is None else pad,
            sampling=sampling,
            keys=range(first, first + len(ids)),
        )


class EndpointWriter:
    """A server that is asked with texts."""

    def __init__(self, config: CPOConfig, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        url, model = str(config.autoregressive_url), str(config.autoregressive_model)
        with input_errors(RuntimeError):
            self.endpoint = CompletionsEndpoint(url, model, api_key=os.environ.get(KEY_VARIABLE))

    def identity(self) -> str:
        """URL and name."""
        return f"{self.endpoint.url} {self.endpoint.model}"

    def __call__(
        self, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], first: int, count: int, sampling: Sampling
    ) -> Written:
        """``count`` completions behind each of ``prompts``, as this tokenizer has them."""
        # The server's seeds depend on the place in a call; the number of the first example tells calls apart.
        sampling = dataclasses.replace(sampling, seed=sampling.seed + first)
        with input_errors(RuntimeError):
            answers = self.endpoint.negatives([self._text(prompt) for prompt in prompts], count, sampling)
        texts = [completion.text for own in answers for completion in own]
        encoded = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        eos = [self.tokenizer.eos_token_id]
        return [[list(next(encoded)) + (eos if completion.ended else []) for completion in own] for own in answers]

    def _text(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        # The server puts its own BOS in front.
        return self.tokenizer.decode(prompt).removeprefix(self.tokenizer.bos_token or "")
