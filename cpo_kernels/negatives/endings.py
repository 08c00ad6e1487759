"""The tokens that end a completion: a tokenizer's EOS, those of a generation configuration, a chat template's own.

Wherever a function takes ``eos_token_id`` it is one token id or several, as in ``transformers``. Any of them ends a
completion. A candidate that has to be ended gets the end of its ground truth, or else the first id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

# An answer in a made-up conversation, which shows what a template puts behind an answer.
ANSWER = "cpoanswer"


class SpecialTokens(NamedTuple):
    """The token ids with a meaning of their own.

    Attributes:
        ends: every token that ends a completion; the first is put behind one that has none.
        pad: the token that fills rows up, which is masked.
        bos: the token that stands for an empty prompt; None where there is none.
    """

    ends: tuple[int, ...]
    pad: int
    bos: int | None


def special_tokens(tokenizer: Any, model: Any) -> SpecialTokens:
    """Return the special tokens of a tokenizer and its model, or without a tokenizer those that the model names.

    Without one, each is that of the model's generation configuration, or else that of its configuration; what a
    configuration class has by default counts only where neither says anything else, and what is no token of the model
    counts as absent. Where no token is for padding, it is the first that ends a completion.

    Args:
        tokenizer: a tokenizer of ``transformers``, or None.
        model: a model of ``transformers``, bare or adapted.

    Raises:
        ValueError: a tokenizer without an EOS token, or no tokenizer and a model that names none.
    """
    if tokenizer is not None:
        ends, pad, bos = end_token_ids(tokenizer, model), tokenizer.pad_token_id, tokenizer.bos_token_id
        return SpecialTokens(ends, ends[0] if pad is None else pad, bos)
    ends = _named_by(model, "eos_token_id")
    if not ends:
        raise ValueError(
            "there is no tokenizer, and the model names no token of its own that ends a completion; set "
            f"model.generation_config.eos_token_id, got {getattr(model.generation_config, 'eos_token_id', None)}, "
            "or pass the tokenizer"
        )
    pad, bos = _named_by(model, "pad_token_id"), _named_by(model, "bos_token_id")
    return SpecialTokens(ends, pad[0] if pad else ends[0], bos[0] if bos else None)


def _named_by(model: Any, name: str) -> tuple[int, ...]:
    """Return the tokens that the configurations of a model give for ``name``, as far as it has them."""
    config, size = model.config.get_text_config(), getattr(model.get_input_embeddings(), "num_embeddings", None)
    given = [getattr(own, name, None) for own in (getattr(model, "generation_config", None), config)]
    chosen = [ids for ids in given if ids != _default(config, name)] + given
    for ids in chosen:
        named = tuple(i for i in as_ids(() if ids is None else ids) if i >= 0 and (size is None or i < size))
        if named:
            return named
    return ()


def end_token_ids(tokenizer: Any, model: Any = None) -> tuple[int, ...]:
    """Return every token id that ends a completion.

    These are the tokenizer's EOS, which comes first, the token that its chat template ends an answer with, and those
    of the model's generation configuration. One of these that the tokenizer does not mark as special and that the
    model's configuration class has by default says nothing about the model and is left out.

    Args:
        tokenizer: a tokenizer of ``transformers``.
        model: a model of ``transformers``, bare or adapted; None for the tokenizer's ends alone.

    Raises:
        ValueError: a tokenizer without an EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, which ends every completion; set tokenizer.eos_token")
    ends = [tokenizer.eos_token_id, turn_end(tokenizer), *_of_generation(tokenizer, model)]
    return tuple(dict.fromkeys(end for end in ends if end is not None))


def turn_end(tokenizer: Any) -> int | None:
    """Return the special token that the chat template puts behind an answer; None where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # A template may raise anything; this one does not take the made-up conversation.
        return None
    _, answered, behind = text.rpartition(ANSWER)
    if not answered or not behind.strip():
        return None
    first = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"][0]
    return first if first in _special_ids(tokenizer) else None


def _special_ids(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}


def _of_generation(tokenizer: Any, model: Any) -> list[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ends is None:
        return []
    default, special = _default(model.config, "eos_token_id"), _special_ids(tokenizer)
    return [end for end in as_ids(ends) if end != default or end in special]


def _default(config: Any, name: str) -> Any:
    """Return the special token that every model of a configuration class has unless it is told another."""
    try:
        return getattr(type(config)(), name, None)
    except Exception:  # Classes from outside transformers may need arguments, and have no default then.
        return None


def as_ids(eos_token_id: int | Sequence[int]) -> tuple[int, ...]:
    """Return one or several token ids as a tuple."""
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


def without_end(completion: Sequence[int], eos_token_id: int | Sequence[int]) -> list[int]:
    """Return a completion without the token, or tokens, that end it."""
    ends, length = as_ids(eos_token_id), len(completion)
    while length and completion[length - 1] in ends:
        length -= 1
    return list(completion[:length])


def end_of(completion: Sequence[int], eos_token_id: int | Sequence[int]) -> int:
    """Return the token that ends a completion, or the first of ``eos_token_id`` where none does."""
    length = len(without_end(completion, eos_token_id))
    return completion[length] if length < len(completion) else as_ids(eos_token_id)[0]


def until_end(tokens: Sequence[int], eos_token_id: int | Sequence[int]) -> list[int]:
    """Return the tokens through the first that ends a completion; all of them where none does."""
    ends = as_ids(eos_token_id)
    return next((list(tokens[: place + 1]) for place, token in enumerate(tokens) if token in ends), list(tokens))
