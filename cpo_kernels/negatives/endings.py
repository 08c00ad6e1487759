"""The tokens that end a completion: a tokenizer's EOS, those of a generation configuration, a chat template's own.

Wherever a function takes ``eos_token_id`` it is one token id or several, as in ``transformers``. Any of them ends a
completion. A candidate that has to be ended gets the end of its ground truth, or else the first id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# An answer in a made-up conversation, which shows what a template puts behind an answer.
ANSWER = "cpoanswer"


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
    default, special = _default_end(model.config), _special_ids(tokenizer)
    return [end for end in as_ids(ends) if end != default or end in special]


def _default_end(config: Any) -> int | None:
    """Return the EOS token that every model of a configuration class has unless it is told another."""
    try:
        return getattr(type(config)(), "eos_token_id", None)
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
