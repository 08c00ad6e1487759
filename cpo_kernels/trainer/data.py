"""From ``{"prompt", "completion"}`` examples to token ids, and from token ids to the tensors of one contrast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cpo_kernels.negatives import batch_negatives, truncate, truncation_negatives

TOKENIZER_BATCH = 1000


class TokenizedExamples(Dataset):
    """Prompts and completions as token ids; item i tells its own index, from which its negatives are drawn.

    Args:
        prompts, completions: one sequence of token ids per example, neither empty.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> None:
        if len(prompts) != len(completions):
            raise ValueError(f"expected one completion per prompt, got {len(completions)} for {len(prompts)} prompts")
        self.prompts, self.completions = prompts, completions

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # input_ids is there for samplers that group by length
        return {"index": index, "input_ids": [*self.prompts[index], *self.completions[index]]}


def collate_indices(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The collator of the data loader: {"index": (B,)}; tensors are built once negatives are drawn."""
    return {"index": torch.tensor([item["index"] for item in items])}


def tokenize_examples(
    examples: Iterable[Mapping[str, Any]], tokenizer: Any, *, max_length: int, max_prompt_length: int
) -> TokenizedExamples:
    """Token ids of examples.

    A prompt is tokenised with the special tokens that the tokenizer puts before a text; an empty one becomes BOS. Of
    a prompt over ``max_prompt_length`` the end is kept, after BOS if it began with it. A completion is tokenised
    without special tokens and ended with EOS; one that does not fit in ``max_length`` loses its end, EOS included.

    Args:
        examples: mappings with ``"prompt"`` and ``"completion"``, each a string or a list of token ids.
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
    for start, chunk in _chunks(examples):
        raw_prompts = _encode(chunk, "prompt", start, tokenizer, add_special_tokens=True)
        raw_completions = _encode(chunk, "completion", start, tokenizer, add_special_tokens=False)
        for offset, (prompt, completion) in enumerate(zip(raw_prompts, raw_completions, strict=True)):
            prompt = _finish_prompt(prompt, tokenizer, max_prompt_length, start + offset)
            prompts.append(prompt)
            completions.append(_finish_completion(completion, tokenizer, max_length - len(prompt), start + offset))
    if not prompts:
        raise ValueError("expected at least one example, got none")
    return TokenizedExamples(prompts, completions)


def _chunks(examples: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
    """Lists of examples, each with the index of its first: tokenizers are fast on many texts at a time."""
    start, chunk = 0, []
    for example in examples:
        chunk.append(example)
        if len(chunk) == TOKENIZER_BATCH:
            yield start, chunk
            start, chunk = start + len(chunk), []
    if chunk:
        yield start, chunk


def _encode(
    chunk: Sequence[Mapping[str, Any]], key: str, start: int, tokenizer: Any, add_special_tokens: bool
) -> list[list[int]]:
    values = []
    for offset, example in enumerate(chunk):
        if key not in example:
            raise ValueError(f"example {start + offset} has no {key!r}, only {sorted(example)}")
        values.append(example[key])
    texts = [value for value in values if isinstance(value, str)]
    encoded = iter(tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"] if texts else [])
    appends_eos = add_special_tokens and tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    ids = []
    for offset, value in enumerate(values):
        if isinstance(value, str):
            tokens = list(next(encoded))
            ids.append(tokens[:-1] if appends_eos else tokens)
        elif isinstance(value, (list, tuple)) and all(isinstance(token, int) for token in value):
            ids.append(list(value))
        else:
            kind = type(value).__name__
            raise ValueError(f"{key!r} of example {start + offset} must be a string or a list of token ids, got {kind}")
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


def _finish_completion(ids: list[int], tokenizer: Any, limit: int, index: int) -> list[int]:
    eos = tokenizer.eos_token_id
    if not ids or ids == [eos]:
        raise ValueError(f"the completion of example {index} is empty")
    return (ids if ids[-1] == eos else [*ids, eos])[:limit]


@dataclass
class ContrastBatch:
    """Sequences for the body and tokens for the head: groups are added one by one, then :meth:`tensors` packs them.

    Every sequence is a prompt and a completion and becomes one row of (B, L); the tokens are those of all candidates.
    The last prompt row of a group's ground truth predicts the first token of all its candidates.
    """

    eos_token_id: int
    pad_token_id: int = 0
    max_length: int | None = None
    sequences: list[list[int]] = field(default_factory=list)
    segments: list[tuple[Sequence[int], list[tuple[int, int]]]] = field(default_factory=list)
    groups: list[int] = field(default_factory=lambda: [0])

    def add_group(
        self,
        prompt: Sequence[int],
        completion: Sequence[int],
        negatives: Iterable[Sequence[int]] = (),
        cuts: Iterable[int] = (),
    ) -> None:
        """Add one group: the ground truth, then whole completions as negatives, then its truncations.

        Args:
            prompt: token ids, at least one.
            completion: token ids of the ground truth.
            negatives: token ids of other completions; each costs the body one more sequence. The end of one that
                does not fit in ``max_length`` behind this prompt is left out.
            cuts: where to truncate the ground truth; costs the body nothing.
        """
        if not len(prompt):
            raise ValueError(f"group {len(self.groups) - 1} has an empty prompt")
        limit = None if self.max_length is None else self.max_length - len(prompt)
        first = (len(self.sequences), len(prompt) - 1)  # (sequence, position) of the ground truth's last prompt row
        positions = self._add_sequence(prompt, completion, first)
        for negative in negatives:
            self._add_sequence(prompt, negative[:limit], first)
        for cut in cuts:
            self.segments.append(truncate(completion, positions, cut, self.eos_token_id))
        self.groups.append(len(self.segments))

    def _add_sequence(
        self, prompt: Sequence[int], completion: Sequence[int], first: tuple[int, int]
    ) -> list[tuple[int, int]]:
        index = len(self.sequences)
        # The last token predicts nothing, so the body does not see it.
        self.sequences.append([*prompt, *completion[:-1]])
        positions = [first, *((index, len(prompt) - 1 + t) for t in range(1, len(completion)))]
        self.segments.append((completion, positions))
        return positions

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.groups) - 1

    @property
    def num_target_tokens(self) -> int:
        """Tokens of the ground truths, which the MLE part averages over."""
        return sum(len(self.segments[start][0]) for start in self.groups[:-1])

    def tensors(self) -> dict[str, Any]:
        """The batch.

        Returns:
            input_ids, attention_mask (B, L) int64, right-padded; targets, rows (N,) int64, with rows into the
            flattened (B * L) positions; cu_tokens (S + 1) and cu_groups (G + 1), lists of host integers.
        """
        longest = max(map(len, self.sequences))
        input_ids = torch.full((len(self.sequences), longest), self.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for i, sequence in enumerate(self.sequences):
            input_ids[i, : len(sequence)] = torch.tensor(sequence)
            attention_mask[i, : len(sequence)] = 1
        cu_tokens = [0]
        for targets, _ in self.segments:
            cu_tokens.append(cu_tokens[-1] + len(targets))
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "targets": torch.tensor([token for targets, _ in self.segments for token in targets]),
            "rows": torch.tensor([i * longest + t for _, positions in self.segments for i, t in positions]),
            "cu_tokens": cu_tokens,
            "cu_groups": list(self.groups),
        }


@dataclass(frozen=True)
class NegativeSampler:
    """Draws the negatives of an example: a pure function of (seed, step, example), whatever else is in its batch.

    Batch negatives come from the whole data set. A batch is a random sample of it, so their distribution is that of
    the other completions in a batch, but they do not depend on how a batch is split into micro-batches, on the number
    of processes, or on where a run was resumed, and a batch of one example has them too.
    """

    examples: TokenizedExamples
    eos_token_id: int
    num_batch_negatives: int
    num_truncation_negatives: int
    seed: int

    def add_to(self, batch: ContrastBatch, index: int, step: int) -> None:
        """Add the group of example ``index`` as it is contrasted at ``step``."""
        completions = self.examples.completions
        completion = completions[index]
        rng = Random(f"{self.seed}/{step}/{index}")
        others = batch_negatives(completions, index, self.num_batch_negatives, rng)
        cuts = truncation_negatives(completion, self.eos_token_id, self.num_truncation_negatives, rng)
        batch.add_group(self.examples.prompts[index], completion, [completions[other] for other in others], cuts)
