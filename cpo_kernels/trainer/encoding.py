"""Token ids of texts that follow one another: the joined text is tokenised, then split at the end of the prompt.

Tokenised separately, ``"Hello "`` and ``"world"`` give other tokens than ``"Hello world"``. So the joined text is
tokenised. The prompt's tokens are those that its own text shares with every joined text, as in TRL: a token that spans
the boundary belongs to the completion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers.utils import logging

from .formats import Example

logger = logging.get_logger(__name__)

Ids = Sequence[int]


def encode_examples(
    examples: Sequence[Example], tokenizer: Any, eos_token_id: Sequence[int]
) -> list[tuple[list[int], list[list[int]]]]:
    """Return the token ids of each example's prompt, and of each of its candidates.

    Args:
        examples: prompts and candidates, texts or token ids.
        tokenizer: a tokenizer of ``transformers``; None for examples of token ids alone.
        eos_token_id: every token that ends a completion. This function ends no completion, but leaves out white space
            behind an end, since nothing is ever generated there.
    """
    if tokenizer is None:
        return [(list(example.prompt), example.candidates) for example in examples]  # type: ignore[arg-type]
    # A generation configuration may name tokens that the tokenizer does not have.
    ends = tuple(token for token in tokenizer.convert_ids_to_tokens(list(eos_token_id)) if token)
    texts: dict[bool, list[str]] = {False: [], True: []}
    for example in examples:
        texts[example.rendered] += _texts(example, ends)
    # Tokenizers are fast on many texts at once.
    encoded = {rendered: iter(encode(tokenizer, own, not rendered)) for rendered, own in texts.items()}
    return [_split(example, encoded[example.rendered], tokenizer) for example in examples]


def _texts(example: Example, ends: tuple[str, ...]) -> list[str]:
    """Return the texts to tokenise: the prompt, then the prompt joined with each candidate that is a text."""
    if not isinstance(example.prompt, str):
        return []
    front = "" if example.rendered else example.prompt
    candidates = [text for text in example.candidates if isinstance(text, str)]
    trimmed = [text.rstrip() if text.rstrip().endswith(ends) else text for text in candidates]
    return [example.prompt, *(front + text for text in trimmed)]


def _split(example: Example, encoded: Iterator[list[int]], tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Take the tokens of an example's texts from ``encoded`` and split them where its prompt ends."""
    if not isinstance(example.prompt, str):
        texts = [text for text in example.candidates if isinstance(text, str)]
        behind = iter(continuations(tokenizer, [example.prompt] * len(texts), texts))
        return example.prompt, [next(behind) if isinstance(value, str) else value for value in example.candidates]
    prompt = next(encoded)
    # A candidate given as token ids follows the prompt's tokens unchanged.
    joined = [next(encoded) if isinstance(value, str) else [*prompt, *value] for value in example.candidates]
    cut = min(_common_length(prompt, ids) for ids in joined)
    if example.rendered and cut < len(prompt):
        logger.warning_once(
            "Training sees another prompt than generation does: rendered for an answer it ends with "
            f"{tokenizer.decode(prompt[cut:])!r}, which the chat template does not write into the whole conversation."
        )
    return prompt[:cut], [ids[cut:] for ids in joined]


def _common_length(first: Ids, second: Ids) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def encode(tokenizer: Any, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
    """Return the token ids of texts.

    With ``add_special_tokens``, the special tokens that the tokenizer puts before a text are added, but no second BOS
    to a text that begins with it. Those that it puts behind a text, such as EOS, are left out.
    """
    if not texts:
        return []
    encoded = [list(ids) for ids in tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]]
    before, behind = _special_tokens(tokenizer) if add_special_tokens else ([], [])
    bos = tokenizer.bos_token_id
    for ids in encoded:
        del ids[len(ids) - len(behind) :]
        if bos is not None and before[-1:] == [bos] and ids[len(before) : len(before) + 1] == [bos]:
            del ids[len(before)]
    return encoded


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and behind a text."""
    with_them = list(tokenizer("a")["input_ids"])
    text = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(with_them) - len(text) + 1):
        if with_them[start : start + len(text)] == text:
            return with_them[:start], with_them[start + len(text) :]
    return [], []


def prompt_texts(tokenizer: Any, prompts: Sequence[Ids]) -> list[str]:
    """Return the texts of prompts given as token ids, with special tokens written out as templates do.

    A BOS in front is left out if the tokenizer adds it by itself.
    """
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and _special_tokens(tokenizer)[0][-1:] == [bos]
    starts = [int(adds_bos and prompt[:1] == [bos]) for prompt in map(list, prompts)]
    return [
        tokenizer.decode(list(prompt[start:]), clean_up_tokenization_spaces=False)
        for prompt, start in zip(prompts, starts, strict=True)
    ]


def continuations(tokenizer: Any, prompts: Sequence[Ids], texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts that follow prompts whose token ids are given.

    They are the tokens behind the prompt in the joined text if that begins with the prompt's tokens, else the tokens of
    the text alone.
    """
    joined = [prompt + text for prompt, text in zip(prompt_texts(tokenizer, prompts), texts, strict=True)]
    alone = encode(tokenizer, texts, add_special_tokens=False)
    return [
        whole[len(prompt) :] if whole[: len(prompt)] == list(prompt) else own
        for prompt, whole, own in zip(prompts, encode(tokenizer, joined), alone, strict=True)
    ]


def text_behind(tokenizer: Any, prompt: Ids, ids: Ids, prompt_text: str | None = None) -> str | None:
    """Return the text that token ids add to a prompt, without special tokens.

    Some tokenizers drop the space in front of the first word of ids decoded alone, so they are decoded together with
    the prompt.

    Args:
        tokenizer: the tokenizer of the token ids.
        prompt, ids: the prompt's tokens and those that follow them.
        prompt_text: the text that the result is to follow, if it is longer than that of the prompt's tokens because the
            end of the prompt shares a token with its completion.

    Returns:
        The text; None where the text of the ids does not begin with the rest of ``prompt_text``.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    said, whole = tokenizer.batch_decode([list(prompt), [*prompt, *ids]], **options)
    text = whole[len(said) :] if whole.startswith(said) else tokenizer.decode(list(ids), **options)
    if prompt_text is None or said not in prompt_text:
        return text
    rest = prompt_text.rpartition(said)[2] if said else prompt_text
    return text[len(rest) :] if text.startswith(rest) else None
