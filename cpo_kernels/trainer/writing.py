"""Autoregressive negatives along a run: written for several steps at once, kept until used, saved with checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cpo_kernels.negatives import CompletionsEndpoint, Sampling, autoregressive_negatives

from .config import CPOConfig
from .data import TokenizedExamples

FILE_NAME = "autoregressive-{process}.json"

Key = tuple[int, int]  # (step, index of the example)
# From prompts, the indices of their examples, and how to sample, to negatives of each.
Write = Callable[[Sequence[Sequence[int]], Sequence[int], Sampling], list[list[list[int]]]]


class Store:
    """Negatives that are written and not yet used."""

    def __init__(self) -> None:
        self.negatives: dict[Key, list[list[int]]] = {}

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        """The keys without negatives."""
        return [key for key in keys if key not in self.negatives]

    def forget_before(self, step: int) -> None:
        """Drop what belongs to steps before ``step``."""
        self.negatives = {key: own for key, own in self.negatives.items() if key[0] >= step}

    def save(self, checkpoint: str | Path, process: int) -> None:
        """Leave what is not yet used in a checkpoint: a resumed run must not write it anew with another model."""
        entries = [[*key, own] for key, own in self.negatives.items()]
        Path(checkpoint, FILE_NAME.format(process=process)).write_text(json.dumps(entries), encoding="utf-8")

    def load(self, checkpoint: str) -> None:
        """Read what all processes left in a checkpoint."""
        self.negatives = {}
        for path in sorted(Path(checkpoint).glob(FILE_NAME.format(process="*"))):
            for step, index, own in json.loads(path.read_text(encoding="utf-8")):
                self.negatives[step, index] = own


def sampling_of(config: CPOConfig, examples: TokenizedExamples, *key: int) -> Sampling:
    """How negatives of some examples are sampled, as a function of ``key``.

    Their length is at most the configured one, or else that of the longest ground truth, and never more than what
    ``max_length`` leaves behind the longest prompt: of all the data, so that no example depends on its neighbours.
    """
    longest = config.autoregressive_max_new_tokens or examples.longest_completion
    return Sampling(
        temperature=config.autoregressive_temperature,
        top_p=config.autoregressive_top_p,
        max_new_tokens=min(longest, config.max_length - examples.longest_prompt),
        batch_size=config.autoregressive_batch_size,
        seed=int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little"),
    )


def write_with_model(model: nn.Module, tokenizer: Any, count: int, synced_gpus: bool) -> Write:
    """A writer that samples from the model itself."""
    eos = tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def write(prompts: Sequence[Sequence[int]], indices: Sequence[int], sampling: Sampling) -> list[list[list[int]]]:
        return autoregressive_negatives(
            model,
            prompts,
            count,
            eos_token_id=eos,
            pad_token_id=pad,
            sampling=sampling,
            keys=indices,
            synced_gpus=synced_gpus,
        )

    return write


def write_with_endpoint(endpoint: CompletionsEndpoint, tokenizer: Any, count: int) -> Write:
    """A writer that asks a server, which takes and gives text."""

    def ids(completion: Any) -> list[int]:
        tokens = tokenizer(completion.text, add_special_tokens=False)["input_ids"]
        return [*tokens, tokenizer.eos_token_id] if completion.ended or not tokens else tokens

    def write(prompts: Sequence[Sequence[int]], indices: Sequence[int], sampling: Sampling) -> list[list[list[int]]]:
        texts = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
        return [[ids(own) for own in group] for group in endpoint.negatives(texts, count, sampling)]

    return write
