"""From examples as people write them to token ids."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cpo_kernels.negatives import KINDS

from .formats import normalize_example

TOKENIZER_BATCH = 1000


class TokenizedExamples(Dataset):
    """Prompts, completions and what negatives they bring, as token ids; item i tells its own index.

    Args:
        prompts, completions: one sequence of token ids per example, neither empty.
        negatives: for every example its own negatives, each a sequence of token ids; None where no example has any.
        ranks: for every example the ranks of its negatives, >= 0, or None for equal ones; None where none has any.
        kinds: for every example the kinds of its negatives. Default: "given".
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        negatives: Sequence[Sequence[Sequence[int]]] | None = None,
        ranks: Sequence[Sequence[int] | None] | None = None,
        kinds: Sequence[Sequence[str]] | None = None,
    ) -> None:
        for name, values in (("completion", completions), ("list of negatives", negatives), ("list of kinds", kinds)):
            if values is not None and len(values) != len(prompts):
                raise ValueError(f"expected one {name} per prompt, got {len(values)} for {len(prompts)} prompts")
        self.prompts, self.completions = prompts, completions
        self.negatives, self.ranks, self.kinds = negatives, ranks, kinds
        self._check()

    def _check(self) -> None:
        """Raise ``ValueError`` for an example with an empty part, or with other numbers of ranks or kinds."""
        for index, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True)):
            own = () if self.negatives is None else self.negatives[index]
            for name, ids in (("prompt", prompt), ("completion", completion), *(("negative", ids) for ids in own)):
                if not len(ids):
                    raise ValueError(f"a {name} of example {index} is empty")
            ranks = None if self.ranks is None else self.ranks[index]
            kinds = None if self.kinds is None else self.kinds[index]
            for name, values in (("ranks", ranks), ("kinds", kinds)):
                if values is not None and len(values) != len(own):
                    raise ValueError(f"example {index} has {len(own)} negatives but {len(values)} {name}")

    def check_lengths(self, max_length: int) -> None:
        """Raise ``ValueError`` for a prompt and completion that have more than ``max_length`` tokens together."""
        for index, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True)):
            if len(prompt) + len(completion) > max_length or len(prompt) == max_length:
                raise ValueError(
                    f"example {index} has {len(prompt)} + {len(completion)} tokens, max_length is {max_length}"
                )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Samplers that group by length read input_ids.
        return {"index": index, "input_ids": [*self.prompts[index], *self.completions[index]]}

    @property
    def brings_negatives(self) -> bool:
        """Whether any example has negatives of its own."""
        return self.negatives is not None

    @cached_property
    def longest_prompt(self) -> int:
        """How many tokens the longest prompt has."""
        return max(map(len, self.prompts))

    @cached_property
    def longest_completion(self) -> int:
        """How many tokens the longest completion has."""
        return max(map(len, self.completions))

    @cached_property
    def digest(self) -> str:
        """A digest of all token ids, ranks and kinds: the data's key in a cache."""
        state = hashlib.sha256()
        for index in range(len(self)):
            own = [] if self.negatives is None else list(self.negatives[index])
            for ids in (self.prompts[index], self.completions[index], *own):
                state.update(array("q", [len(ids), *ids]).tobytes())
            about = (self.ranks and self.ranks[index], self.kinds and self.kinds[index])
            state.update(repr((len(own), *about)).encode())
        return state.hexdigest()


def collate_indices(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Collate for the data loader: {"index": (B,)}; tensors are built once negatives are drawn."""
    return {"index": torch.tensor([item["index"] for item in items])}


def tokenize_examples(
    examples: Iterable[Mapping[str, Any]], tokenizer: Any, *, max_length: int, max_prompt_length: int
) -> TokenizedExamples:
    """Turn examples into token ids.

    A prompt is tokenised with the special tokens that the tokenizer puts before a text; an empty one becomes BOS. Of
    a prompt over ``max_prompt_length`` the end is kept, after BOS if it began with it. A completion is tokenised
    without special tokens and ended with EOS; one that does not fit in ``max_length`` loses its end, EOS included. So
    are negatives, but for the token ids of those that a model has drawn, which may have been cut off: they are taken as
    they are. An empty negative is EOS alone: a model that ended at once.

    Args:
        examples: mappings as :func:`~cpo_kernels.trainer.formats.normalize_example` takes them:
            ``{"prompt", "completion"}``, with ``"negatives"`` and ``"ranks"`` if they bring any, or TRL's
            ``{"prompt", "chosen", "rejected"}``; values are strings, lists of token ids, or conversations.
        tokenizer: a tokenizer of ``transformers`` with an EOS token.
        max_length: tokens of prompt and completion together, at most.
        max_prompt_length: tokens of the prompt, at most; smaller than ``max_length``.

    Raises:
        TypeError: data without a length, such as a stream: batch negatives are drawn from all of it.
        ValueError: no examples, no EOS token, or an example without a key, with a value that is neither text nor token
            ids, with an empty completion, or with an empty prompt that no BOS token can stand for; it is named.
    """
    if not hasattr(examples, "__len__"):
        raise TypeError(f"expected examples with a length, got {type(examples).__name__}; streams are not supported")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, which ends every completion; set tokenizer.eos_token")
    prompts: list[Sequence[int]] = []
    completions: list[Sequence[int]] = []
    negatives: list[list[list[int]]] = []
    ranks: list[list[int] | None] = []
    kinds: list[list[str]] = []
    for start, chunk in _chunks(examples):
        normal = [normalize_example(example, start + offset, tokenizer) for offset, example in enumerate(chunk)]
        texts = [("prompt", start + i, example["prompt"]) for i, example in enumerate(normal)]
        raw_prompts = _encode(texts, tokenizer, add_special_tokens=True)
        texts = []
        for i, example in enumerate(normal):
            texts.append(("completion", start + i, example["completion"]))
            texts += [("negatives", start + i, negative) for negative in example["negatives"]]
        raw_completions = iter(_encode(texts, tokenizer, add_special_tokens=False))
        for i, (prompt, example) in enumerate(zip(raw_prompts, normal, strict=True)):
            prompt = _finish_prompt(prompt, tokenizer, max_prompt_length, start + i)
            limit = max_length - len(prompt)
            completion = next(raw_completions)
            if not completion or completion == [tokenizer.eos_token_id]:
                raise ValueError(f"the completion of example {start + i} is empty")
            prompts.append(prompt)
            completions.append(_end(completion, tokenizer.eos_token_id, limit))
            negatives.append(
                [
                    _finish_negative(next(raw_completions), given, kind, tokenizer.eos_token_id, limit)
                    for given, kind in zip(example["negatives"], example["kinds"], strict=True)
                ]
            )
            ranks.append(example["ranks"])
            kinds.append(example["kinds"])
    if not prompts:
        raise ValueError("expected at least one example, got none")
    if not any(negatives):
        return TokenizedExamples(prompts, completions)
    return TokenizedExamples(prompts, completions, negatives, ranks, kinds)


def _chunks(examples: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
    """Yield lists of examples, each with the index of its first: tokenizers are fast on many texts at a time."""
    start, chunk = 0, []
    for example in examples:
        chunk.append(example)
        if len(chunk) == TOKENIZER_BATCH:
            yield start, chunk
            start, chunk = start + len(chunk), []
    if chunk:
        yield start, chunk


def _encode(values: Sequence[tuple[str, int, Any]], tokenizer: Any, add_special_tokens: bool) -> list[list[int]]:
    """Turn values of (name, index of the example, string or token ids) into token ids."""
    texts = [value for _, _, value in values if isinstance(value, str)]
    encoded = iter(tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"] if texts else [])
    appends_eos = add_special_tokens and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    ids = []
    for name, index, value in values:
        if isinstance(value, str):
            tokens = list(next(encoded))
            ids.append(tokens[:-1] if appends_eos else tokens)
        elif isinstance(value, (list, tuple)) and all(isinstance(token, int) for token in value):
            ids.append(list(value))
        else:
            kind = type(value).__name__
            raise ValueError(f"{name!r} of example {index} must be a string or a list of token ids, got {kind}")
    return ids


def _finish_prompt(ids: list[int], tokenizer: Any, limit: int, index: int) -> list[int]:
    bos = tokenizer.bos_token_id
    if not ids:
        if bos is None:
            raise ValueError(
                f"the prompt of example {index} is empty and the tokenizer has no BOS token to stand for it; the first "
                "token of a completion needs a row that predicts it"
            )
        return [bos]
    if len(ids) <= limit:
        return ids
    return [bos, *ids[len(ids) - limit + 1 :]] if ids[0] == bos else ids[-limit:]


def _finish_negative(ids: list[int], given: Any, kind: str, eos: int, limit: int) -> list[int]:
    drawn = KINDS[kind].by_model and not isinstance(given, str)
    return ids[:limit] if drawn and ids else _end(ids, eos, limit)


def _end(ids: list[int], eos: int, limit: int) -> list[int]:
    """End the completion with EOS and leave at most ``limit`` tokens."""
    return (ids if ids and ids[-1] == eos else [*ids, eos])[:limit]
