"""Autoregressive negatives along a run: written for several steps at once, kept until used, saved with checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cpo_kernels.negatives import CompletionsEndpoint, Sampling, autoregressive_negatives
from cpo_kernels.negatives.seeds import call_seed

from .config import CPOConfig
from .data import TokenizedExamples

FILE_NAME = "autoregressive-{process}.json"
KEY_VARIABLE = "CPO_KERNELS_COMPLETIONS_KEY"

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


def room_for(config: CPOConfig, examples: TokenizedExamples) -> int:
    """Tokens that ``max_length`` leaves for a continuation behind any prompt of the data, 1 at least."""
    return max(1, config.max_length - examples.longest_prompt)


def sampling_of(config: CPOConfig, examples: TokenizedExamples, *key: int) -> Sampling:
    """How negatives of some examples are sampled, as a function of ``key``.

    Their length is at most the configured one, or else that of the longest ground truth, and never more than what
    ``max_length`` leaves behind the longest prompt: of all the data, so that no example depends on its neighbours.
    """
    longest = config.autoregressive_max_new_tokens or examples.longest_completion
    return Sampling(
        temperature=config.autoregressive_temperature,
        top_p=config.autoregressive_top_p,
        max_new_tokens=min(longest, room_for(config, examples)),
        batch_size=config.autoregressive_batch_size,
        seed=call_seed(*key),
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


def endpoint_of(config: CPOConfig) -> CompletionsEndpoint:
    """The server that a configuration names; its key is read from the variable ``CPO_KERNELS_COMPLETIONS_KEY``.

    Raises:
        RuntimeError: ``openai`` is not installed.
        ValueError: a configuration that names no server.
    """
    url, model = config.autoregressive_url, config.autoregressive_model
    if url is None or model is None:
        raise ValueError(f"expected autoregressive_url and autoregressive_model, got {url!r} and {model!r}")
    return CompletionsEndpoint(url, model, api_key=os.environ.get(KEY_VARIABLE))


def prompt_texts(tokenizer: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The texts that a server makes these token ids of: special tokens are written out, as chat templates have them.

    A BOS in front is left out where the tokenizer, and so the server's, puts it there by itself.
    """
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    starts = [int(adds_bos and prompt[0] == bos) for prompt in prompts]
    return [
        tokenizer.decode(list(prompt[start:]), clean_up_tokenization_spaces=False)
        for prompt, start in zip(prompts, starts, strict=True)
    ]


def write_with_endpoint(endpoint: CompletionsEndpoint, tokenizer: Any, count: int) -> Write:
    """A writer that asks a server, which takes and gives text."""
    eos = tokenizer.eos_token_id

    def write(prompts: Sequence[Sequence[int]], indices: Sequence[int], sampling: Sampling) -> list[list[list[int]]]:
        answers = endpoint.negatives(prompt_texts(tokenizer, prompts), count, sampling)
        texts = [completion.text for own in answers for completion in own]
        encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        return [[_ended(next(encoded), completion.ended, eos) for completion in own] for own in answers]

    return write


def _ended(tokens: Sequence[int], ended: bool, eos: int) -> list[int]:
    """A completion with the EOS that ended it; one without any tokens is EOS alone."""
    return [*tokens, eos] if ended or not tokens else list(tokens)
