"""Autoregressive negatives of a run: written for several steps at once, stored until used, saved with checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from cpo_kernels.negatives import CompletionsEndpoint, Sampling, autoregressive_negatives
from cpo_kernels.negatives.endings import special_tokens, turn_end
from cpo_kernels.negatives.files import write_whole
from cpo_kernels.negatives.redaction import without_credentials
from cpo_kernels.negatives.seeds import call_seed

from .config import CPOConfig
from .data import TokenizedExamples
from .encoding import continuations, prompt_texts
from .fingerprint import fingerprint

FILE_NAME = "autoregressive-{process}.json"
KEY_VARIABLE = "CPO_KERNELS_COMPLETIONS_KEY"

Key = tuple[int, int]  # (step, index of the example)
Ids = Sequence[int]
Written = list[list[list[int]]]  # Token ids of each completion of each prompt.


class Store:
    """Negatives that are written and not yet used."""

    def __init__(self) -> None:
        self.negatives: dict[Key, list[list[int]]] = {}

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        """Return the keys without negatives."""
        return [key for key in keys if key not in self.negatives]

    def forget_before(self, step: int) -> None:
        """Drop the negatives of steps before ``step``."""
        self.negatives = {key: own for key, own in self.negatives.items() if key[0] >= step}

    def save(self, checkpoint: str | Path, process: int) -> None:
        """Save unused negatives in a checkpoint: a resumed run must not write them anew with a later model."""
        entries = [[*key, own] for key, own in self.negatives.items()]
        write_whole(Path(checkpoint, FILE_NAME.format(process=process)), json.dumps(entries))

    def load(self, checkpoint: str) -> None:
        """Read the negatives that all processes saved in a checkpoint.

        Raises:
            ValueError: a file that is cut off or damaged; the message names it.
        """
        self.negatives = {}
        for path in sorted(Path(checkpoint).glob(FILE_NAME.format(process="*"))):
            try:
                for step, index, own in json.loads(path.read_text(encoding="utf-8")):
                    self.negatives[step, index] = own
            except (OSError, ValueError, TypeError) as error:
                raise ValueError(f"{path} cannot be read ({error}); go on from another checkpoint") from error


def room_for(config: CPOConfig, examples: TokenizedExamples) -> int:
    """Return how many tokens, at least 1, ``max_length`` leaves behind the longest prompt of the data."""
    return max(1, config.length_budget - examples.longest_prompt)


def sampling_of(config: CPOConfig, examples: TokenizedExamples, *key: int) -> Sampling:
    """Return how negatives of some examples are sampled, with a seed made of ``key``.

    Their length is at most the configured one, or else that of the longest ground truth, and never more than
    ``max_length`` leaves behind the longest prompt of all the data, so that no example depends on its neighbours.
    """
    longest = config.autoregressive_max_new_tokens or examples.longest_completion
    return Sampling(
        temperature=config.autoregressive_temperature,
        top_p=config.autoregressive_top_p,
        max_new_tokens=min(longest, room_for(config, examples)),
        batch_size=config.autoregressive_batch_size,
        seed=call_seed(*key),
    )


class ModelWriter:
    """A model that samples completions, which depend on prompt, key and sampling alone.

    Args:
        model: returns a causal language model.
        tokenizer: its tokenizer, or None.
        synced_gpus: whether all processes have to run the same number of forward passes, as with sharded parameters.
        disable_tqdm: whether to show no progress bar.
    """

    def __init__(
        self, model: Callable[[], nn.Module], tokenizer: Any, synced_gpus: bool = False, disable_tqdm: bool = False
    ) -> None:
        self.model, self.synced_gpus, self.special = model, synced_gpus, special_tokens(tokenizer, model())
        self.disable_tqdm = disable_tqdm

    @property
    def identity(self) -> str:
        """The name that tells this writer's negatives from those of other writers."""
        return f"{fingerprint(self.model())} {self.special.ends} {self.special.pad}"

    def __call__(self, prompts: Sequence[Ids], keys: Sequence[int], count: int, sampling: Sampling) -> Written:
        """Write ``count`` completions of each prompt, whose draws depend on the prompt's key."""
        return autoregressive_negatives(
            self.model(),
            prompts,
            count,
            eos_token_id=self.special.ends,
            pad_token_id=self.special.pad,
            sampling=sampling,
            keys=keys,
            synced_gpus=self.synced_gpus,
            disable_tqdm=self.disable_tqdm,
        )


class EndpointWriter:
    """A server, named in the configuration, that completes texts.

    Its key is read from the variable ``CPO_KERNELS_COMPLETIONS_KEY``.

    Raises:
        RuntimeError: ``openai`` is not installed.
        ValueError: a configuration that names no server, or no tokenizer.
    """

    def __init__(self, config: CPOConfig, tokenizer: Any) -> None:
        url, model = config.autoregressive_url, config.autoregressive_model
        if url is None or model is None:
            raise ValueError(f"expected autoregressive_url and autoregressive_model, got {url!r} and {model!r}")
        if tokenizer is None:
            raise ValueError(f"the server at autoregressive_url={url!r} reads and writes text; pass the tokenizer")
        self.tokenizer, self._turn_end = tokenizer, turn_end(tokenizer)
        self.endpoint = CompletionsEndpoint(url, model, api_key=os.environ.get(KEY_VARIABLE))
        self.endpoint.disable_tqdm = config.hides_progress

    @property
    def identity(self) -> str:
        """The name that tells this writer's negatives from those of other writers."""
        return without_credentials(f"{self.endpoint.url} {self.endpoint.model}")

    def __call__(self, prompts: Sequence[Ids], keys: Sequence[int], count: int, sampling: Sampling) -> Written:
        """Write ``count`` completions of each prompt; ``keys`` are ignored, since servers have none."""
        answers = self.endpoint.negatives(prompt_texts(self.tokenizer, prompts), count, sampling)
        texts = [completion.text for own in answers for completion in own]
        before = [prompt for prompt, own in zip(prompts, answers, strict=True) for _ in own]
        encoded = iter(continuations(self.tokenizer, before, texts))
        return [
            [_ended(next(encoded), completion.ended, self._end(prompt)) for completion in own]
            for prompt, own in zip(prompts, answers, strict=True)
        ]

    def _end(self, prompt: Ids) -> int:
        """Return the token that ends an answer to this prompt: the end of a turn if the prompt has turns, else EOS."""
        end = self._turn_end
        return end if end is not None and end in prompt else self.tokenizer.eos_token_id


def _ended(tokens: Sequence[int], ended: bool, eos: int) -> list[int]:
    """Append EOS to a completion that the model ended or that has no tokens."""
    return [*tokens, eos] if ended or not tokens else list(tokens)
