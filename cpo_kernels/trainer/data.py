"""Tokenised examples, and how they are made of examples as people write them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cpo_kernels.negatives import KINDS
from cpo_kernels.negatives.endings import as_ids, end_token_ids
from cpo_kernels.negatives.progress import progress_bar
from cpo_kernels.options import suggests_arguments

from .encoding import encode_examples
from .formats import Example, check_no_text, normalize_example

TOKENIZER_BATCH = 1000


@suggests_arguments
class TokenizedExamples(Dataset):
    """Prompts, completions and their negatives as token ids; item i holds its own index.

    Args:
        prompts, completions: one sequence of token ids per example, neither empty.
        negatives: for every example its own negatives, each a sequence of token ids; None if no example has any.
        ranks: for every example the ranks of its negatives, >= 0, or None for equal ones; None if no example has ranks.
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
        """Raise ``ValueError`` for an example with an empty part, or unequal numbers of negatives, ranks and kinds."""
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

    def check_token_ids(self, vocab_size: int) -> None:
        """Raise ``ValueError`` for a token id that is not below ``vocab_size``, the number of embeddings."""
        for index, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True)):
            own = () if self.negatives is None else self.negatives[index]
            for name, ids in (("prompt", prompt), ("completion", completion), *(("negative", ids) for ids in own)):
                if min(ids) < 0 or max(ids) >= vocab_size:
                    bad = next(token for token in ids if not 0 <= token < vocab_size)
                    raise ValueError(
                        f"the {name} of example {index} has the token id {bad}, but the model has {vocab_size} "
                        "embeddings; a tokenizer with more tokens needs model.resize_token_embeddings(len(tokenizer))"
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
    """Collate items of a data loader to {"index": (B,)}; other tensors are built once negatives are drawn."""
    return {"index": torch.tensor([item["index"] for item in items])}


@suggests_arguments
def tokenize_examples(
    examples: Iterable[Mapping[str, Any] | Example],
    tokenizer: Any,
    *,
    max_length: int,
    max_prompt_length: int,
    eos_token_id: int | Sequence[int] | None = None,
    bos_token_id: int | None = None,
    vocab_size: int | None = None,
    disable_tqdm: bool = False,
) -> TokenizedExamples:
    """Turn examples into token ids.

    A prompt and the completion behind it are tokenised as one text, with the special tokens that the tokenizer puts
    before a text. The prompt's tokens are those that its own text shares with every joined text, as in TRL, so that a
    token that spans the boundary belongs to the completion. Conversations are tokenised alike, as the chat template
    writes them. An empty prompt becomes BOS. A prompt over ``max_prompt_length`` keeps its end, and BOS if it began
    with it.

    A completion is ended with EOS unless it ends with one, or with the end of a turn; white space behind that end is
    left out, since nothing is ever generated there. An empty completion is EOS alone. A completion that does not fit in
    ``max_length`` loses its end, EOS included. Negatives are treated alike, except for token ids that a model has
    drawn: these may have been cut off, and are not ended.

    Args:
        examples: mappings as :func:`~cpo_kernels.trainer.formats.normalize_example` takes them:
            ``{"prompt", "completion"}``, with ``"negatives"`` and ``"ranks"`` if they bring any, or TRL's
            ``{"prompt", "chosen", "rejected"}``; values are strings, lists of token ids, or conversations. Or what that
            function returns.
        tokenizer: a tokenizer of ``transformers`` with an EOS token; or None for examples of token ids, which then need
            ``eos_token_id`` and whose white space is not known.
        max_length: tokens of prompt and completion together, at most.
        max_prompt_length: tokens of the prompt, at most; smaller than ``max_length``.
        eos_token_id: every token that ends a completion; the first is put behind one that has none. Default: the
            tokenizer's EOS, and the token that its chat template ends an answer with.
        bos_token_id: the token that stands for an empty prompt. Default: the tokenizer's BOS.
        vocab_size: how many embeddings the model has; None leaves token ids unchecked.
        disable_tqdm: show no progress bar, which otherwise is shown on a terminal after some seconds.

    Raises:
        TypeError: data without a length, such as a stream: batch negatives are drawn from all of it.
        ValueError: no examples, no EOS token, or an example without a key, with a value that is neither text nor token
            ids, with text but no tokenizer, with text that has no encoding, with a token id beyond the embeddings, or
            with an empty prompt where there is no BOS token; the message names the example.
    """
    if not hasattr(examples, "__len__"):
        raise TypeError(f"expected examples with a length, got {type(examples).__name__}; streams are not supported")
    if tokenizer is None and eos_token_id is None:
        raise ValueError("without a tokenizer eos_token_id is needed, the token or tokens that end a completion")
    ends = end_token_ids(tokenizer) if eos_token_id is None else as_ids(eos_token_id)
    finish = _Finish(tokenizer, ends, bos_token_id)
    prompts: list[Sequence[int]] = []
    completions: list[Sequence[int]] = []
    negatives: list[list[list[int]]] = []
    ranks: list[list[int] | None] = []
    kinds: list[list[str]] = []
    with progress_bar("Tokenising", "example", len(examples), disable_tqdm) as bar:  # type: ignore[arg-type]
        for start, chunk in _chunks(examples):
            if tokenizer is None:
                for offset, row in enumerate(chunk):
                    check_no_text(row, start + offset)
            normal = [
                row if isinstance(row, Example) else normalize_example(row, start + offset, tokenizer, vocab_size)
                for offset, row in enumerate(chunk)
            ]
            for example, (prompt, candidates) in zip(normal, encode_examples(normal, tokenizer, ends), strict=True):
                prompts.append(finish.prompt(prompt, max_prompt_length, len(prompts)))
                room = max_length - len(prompts[-1])
                completions.append(finish.completion(candidates[0], room))
                drawn = [
                    KINDS[kind].by_model and not isinstance(given, str)
                    for kind, given in zip(example.kinds, example.candidates[1:], strict=True)
                ]
                negatives.append(
                    [
                        ids[:room] if as_drawn and ids else finish.completion(ids, room)
                        for ids, as_drawn in zip(candidates[1:], drawn, strict=True)
                    ]
                )
                ranks.append(example.ranks)
                kinds.append(example.kinds)
            bar.update(len(chunk))
    if not prompts:
        raise ValueError("expected at least one example, got none")
    brought = (negatives, ranks, kinds) if any(negatives) else (None, None, None)
    tokenized = TokenizedExamples(prompts, completions, *brought)
    if vocab_size is not None:
        tokenized.check_token_ids(vocab_size)
    return tokenized


def _chunks(examples: Iterable[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Yield lists of examples, each with the index of its first: tokenizers are fast on many texts at a time."""
    start, chunk = 0, []
    for example in examples:
        chunk.append(example)
        if len(chunk) == TOKENIZER_BATCH:
            yield start, chunk
            start, chunk = start + len(chunk), []
    if chunk:
        yield start, chunk


class _Finish:
    """The rules by which prompts and completions are cut to their lengths, and completions ended.

    Args:
        tokenizer: the tokenizer of the token ids; without one no token is white space.
        ends: every token that ends a completion; the first is put behind one that has none.
        bos: the token that stands for an empty prompt; None for the tokenizer's.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int], bos: int | None = None) -> None:
        self.ends = ends
        self.bos = getattr(tokenizer, "bos_token_id", None) if bos is None else bos
        self._who = "there is" if tokenizer is None else "the tokenizer has"
        self._is_space = cache(lambda token: tokenizer is not None and not tokenizer.decode([token]).strip())

    def prompt(self, ids: list[int], limit: int, index: int) -> list[int]:
        """Return at most ``limit`` tokens of the prompt of example ``index``, at least one."""
        bos = self.bos
        if not ids:
            if bos is None:
                raise ValueError(
                    f"the prompt of example {index} has no token of its own and {self._who} no BOS token to "
                    "stand for it; the first token of a completion needs a row that predicts it"
                )
            return [bos]
        if len(ids) <= limit:
            return ids
        return [bos, *ids[len(ids) - limit + 1 :]] if ids[0] == bos else ids[-limit:]

    def completion(self, ids: list[int], room: int) -> list[int]:
        """End a completion and return at most ``room`` of its tokens."""
        length = len(ids)
        while length and ids[length - 1] not in self.ends and self._is_space(ids[length - 1]):
            length -= 1
        ended = length and ids[length - 1] in self.ends
        return (ids[:length] if ended else [*ids, self.ends[0]])[:room]
