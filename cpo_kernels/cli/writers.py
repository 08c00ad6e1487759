"""Who writes negatives ahead of time: a model here, or a server."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from cpo_kernels.negatives.autoregressive import Sampling
from cpo_kernels.negatives.seeds import part_seed
from cpo_kernels.trainer.config import CPOConfig
from cpo_kernels.trainer.reference import fingerprint
from cpo_kernels.trainer.writing import endpoint_of, write_with_endpoint, write_with_model

from .errors import input_errors

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

    def __call__(self, prompts: Sequence[Sequence[int]], first: int, count: int, sampling: Sampling) -> Written:
        """``count`` completions behind each of ``prompts``, the first of which is number ``first``."""
        write = write_with_model(self.model, self.tokenizer, count, synced_gpus=False)
        return write(prompts, range(first, first + len(prompts)), sampling)


class EndpointWriter:
    """A server that is asked with texts."""

    def __init__(self, config: CPOConfig, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        with input_errors(RuntimeError):
            self.endpoint = endpoint_of(config)

    def identity(self) -> str:
        """URL and name."""
        return f"{self.endpoint.url} {self.endpoint.model}"

    def __call__(self, prompts: Sequence[Sequence[int]], first: int, count: int, sampling: Sampling) -> Written:
        """``count`` completions behind each of ``prompts``, as this tokenizer has them."""
        sampling = dataclasses.replace(sampling, seed=part_seed(sampling.seed, first))
        write = write_with_endpoint(self.endpoint, self.tokenizer, count)
        with input_errors(RuntimeError):
            return write(prompts, range(first, first + len(prompts)), sampling)
