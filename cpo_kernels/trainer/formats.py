"""The forms that an example may have, and how they become one: a prompt, its candidates, their ranks and kinds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpo_kernels.negatives import KINDS

Value = Any  # A text, a list of token ids, or a conversation: a list of {"role", "content"}


@dataclass(frozen=True)
class Example:
    """One example in the form that is tokenised.

    Attributes:
        prompt: a text or a list of token ids.
        candidates: the completion, then its negatives; each a text that follows the prompt's, or a list of token ids.
        ranks: the ranks of the negatives, or None where the example gives none.
        kinds: the kinds of the negatives.
        rendered: whether the texts were rendered by a chat template. They then hold every special token, and each
            candidate is the text of a whole conversation, the prompt's included.
    """

    prompt: str | list[int]
    candidates: list[Any]
    ranks: list[int] | None
    kinds: list[str]
    rendered: bool = False


def normalize_example(example: Mapping[str, Any], index: int, tokenizer: Any, vocab_size: int | None = None) -> Example:
    """Bring one example to the form that is tokenised.

    Accepted are ``{"prompt", "completion"}`` and TRL's preference data ``{"prompt", "chosen", "rejected"}``, each value
    a text, a list of token ids, or a conversation (a list of ``{"role", "content"}``); ``rejected`` is one value or a
    list of them. Beside a completion, ``"negatives"`` is a list of values. Both may have ``"ranks"``, one integer a
    negative (0: as good as the ground truth), and ``"kinds"``, for each negative a name in
    :data:`cpo_kernels.negatives.KINDS`. A field that is ``None`` counts as absent; any other field is ignored.

    - Without a prompt, the common beginning of ``chosen`` and every ``rejected`` is the prompt, by TRL's rule; also
      where the prompt is a text and the other fields are conversations that repeat it.
    - Conversations go through the tokenizer's chat template, with the example's ``"tools"`` and
      ``"chat_template_kwargs"``. Keys whose value is ``None`` are left out of messages, tools and arguments at any
      depth, because tables fill missing keys with ``None``.

    Args:
        example: the example.
        index: number of the example, for messages.
        tokenizer: a tokenizer of ``transformers``; used for conversations only.
        vocab_size: number of embeddings of the model; None leaves token ids unchecked.

    Raises:
        ValueError: a field that is missing, of a wrong form or without its counterpart, a text that has no encoding, a
            token id that the model has no embedding for, or a conversation that the tokenizer has no template for; the
            message names the example and the field.
    """
    fields = {name: value for name, value in example.items() if value is not None}
    prompt, completion, negatives, named = _candidates(fields, index, vocab_size)
    ranks = _ranks(fields, index, named, len(negatives))
    kinds = _kinds(fields, index, named, len(negatives))
    candidates = [completion, *negatives]
    if not _is_conversation(completion):
        return Example(prompt, candidates, ranks, kinds)
    if not _is_conversation(prompt):
        raise ValueError(f"the conversations of example {index} do not begin with the same message; expected a prompt")
    render = _Renderer(fields, index, tokenizer)
    texts = [render([*prompt, *candidate]) for candidate in candidates]
    return Example(render.prompt(prompt), texts, ranks, kinds, rendered=True)


def check_example(example: Mapping[str, Any], index: int, vocab_size: int | None = None) -> None:
    """Raise ``ValueError`` for an example that :func:`normalize_example` would refuse, chat templates aside."""
    fields = {name: value for name, value in example.items() if value is not None}
    _, _, negatives, named = _candidates(fields, index, vocab_size)
    _ranks(fields, index, named, len(negatives))
    _kinds(fields, index, named, len(negatives))


def check_no_text(example: Mapping[str, Any] | Example, index: int) -> None:
    """Raise ``ValueError`` for an example with a text or a conversation, which only a tokenizer reads."""
    if isinstance(example, Example):
        fields = {"prompt": example.prompt, "completion": example.candidates[0], "negatives": example.candidates[1:]}
    else:
        fields = {name: example.get(name) for name in ("prompt", "completion", "negatives", "chosen", "rejected")}
    for name, value in fields.items():
        if _holds_text(value):
            raise ValueError(
                f"{name!r} of example {index} holds text, {_describe(value)}, and there is no tokenizer; pass one, or "
                "give lists of token ids"
            )


def _holds_text(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return not (value and _is_token(value[0])) and any(map(_holds_text, value))
    return isinstance(value, (str, Mapping))


def _candidates(fields: Mapping[str, Any], index: int, vocab_size: int | None) -> tuple[Value, Value, list[Value], str]:
    """Return prompt, completion and negatives unchanged, and the name of the field of negatives."""
    preference = [name for name in ("chosen", "rejected") if name in fields]
    if not preference:
        prompt, completion = (_value(fields, name, index, vocab_size) for name in ("prompt", "completion"))
        negatives = _values(fields, "negatives", index, vocab_size) if "negatives" in fields else []
        _check_forms(index, {"prompt": [prompt], "completion": [completion], "negatives": negatives})
        return prompt, completion, negatives, "negatives"
    for other in ("completion", "negatives"):
        if other in fields:
            raise ValueError(f"example {index} has both {preference[0]!r} and {other!r}; expected one of the two forms")
    chosen = _value(fields, "chosen", index, vocab_size)
    rejected = _values(fields, "rejected", index, vocab_size)
    if not rejected:
        raise ValueError(f"'rejected' of example {index} is an empty list; expected at least one completion")
    prompt = _value(fields, "prompt", index, vocab_size) if "prompt" in fields else None
    implicit = prompt is None or (isinstance(prompt, str) and _is_conversation(chosen))
    _check_forms(index, {"prompt": [] if implicit else [prompt], "chosen": [chosen], "rejected": rejected})
    if implicit:
        cut = min(_shared_prefix(chosen, other, index) for other in rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], [other[cut:] for other in rejected]
    return prompt, chosen, rejected, "rejected"


def _value(fields: Mapping[str, Any], name: str, index: int, vocab_size: int | None) -> Value:
    if name not in fields:
        raise ValueError(f"example {index} has no {name!r}, only {sorted(fields)}")
    value = fields[name]
    if not _is_value(value):
        raise ValueError(
            f"{name!r} of example {index} must be a string, a list of token ids or a list of messages "
            f"{{'role', 'content'}}, got {_describe(value)}"
        )
    return _checked(value, name, index, vocab_size)


def _values(fields: Mapping[str, Any], name: str, index: int, vocab_size: int | None) -> list[Value]:
    """Return the negatives in a field; a single one in TRL's ``rejected`` needs no list around it."""
    if name not in fields:
        raise ValueError(f"example {index} has no {name!r}, only {sorted(fields)}")
    values = fields[name]
    if name == "rejected" and (isinstance(values, str) or (_is_value(values) and len(values))):
        values = [values]
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name!r} of example {index} must be a list of completions, got {_describe(values)}")
    for number, value in enumerate(values):
        if not _is_value(value):
            raise ValueError(
                f"{name!r} of example {index} must be a list of strings, of lists of token ids or of lists of messages "
                f"{{'role', 'content'}}, got {_describe(value)} at {number}"
            )
    return [_checked(value, name, index, vocab_size) for value in values]


def _checked(value: Value, name: str, index: int, vocab_size: int | None) -> Value:
    """Check a value's encoding and token ids, and return it without keys of None in its conversation."""
    if _is_conversation(value):
        value = [without_none(message) for message in value]
        check_encodable(value, f"{name!r} of example {index}")
    elif isinstance(value, str):
        check_encodable(value, f"{name!r} of example {index}")
    else:
        value = list(value)
        beyond = [token for token in value if token < 0 or (vocab_size is not None and token >= vocab_size)]
        if beyond:
            upper = "" if vocab_size is None else f" and below {vocab_size}, the number of the model's embeddings"
            raise ValueError(
                f"{name!r} of example {index} has the token id {beyond[0]}; expected ids of at least 0{upper}"
            )
    return value


def check_encodable(value: Any, what: str) -> None:
    """Raise ``ValueError`` for a text, at any depth, that UTF-8 cannot encode; ``what`` names the place in messages."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                bad = value[error.start]
                raise ValueError(
                    f"{what} holds half of a surrogate pair, {bad!r} at character {error.start}, which is no text"
                ) from None
    elif isinstance(value, Mapping):
        for key, own in value.items():
            check_encodable(key, what)
            check_encodable(own, what)
    elif isinstance(value, (list, tuple)):
        for own in value:
            check_encodable(own, what)


def without_none(value: Any) -> Any:
    """Remove every key of a mapping whose value is None, at any depth; lists keep their items."""
    if isinstance(value, Mapping):
        return {key: without_none(own) for key, own in value.items() if own is not None}
    if isinstance(value, (list, tuple)):
        return [without_none(own) for own in value]
    return value


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_value(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, (list, tuple)) and (all(map(_is_token, value)) or _is_conversation(value))


def _is_conversation(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value)


def _check_forms(index: int, values: Mapping[str, Sequence[Value]]) -> None:
    """Raise ``ValueError`` where some values are conversations and others are not: no template could join them."""
    forms = {name: [_is_conversation(value) for value in group] for name, group in values.items()}
    if len({form for group in forms.values() for form in group}) < 2:
        return
    parts = [f"{name!r} {'has' if any(group) else 'has no'} messages" for name, group in forms.items() if group]
    raise ValueError(f"example {index} mixes messages with plain texts or token ids: {', '.join(parts)}")


def _shared_prefix(chosen: Sequence[Any], rejected: Sequence[Any], index: int) -> int:
    """Find where the implicit prompt of a pair ends, by the rule of ``trl.data_utils.extract_prompt``.

    The prompt ends before the first difference and, in texts, before a space in front of it. If one value begins with
    the whole other value, the prompt ends before the last item of the shorter.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"'chosen' and 'rejected' of example {index} have no 'prompt' and are not both texts")
    shorter = min(len(chosen), len(rejected))
    if shorter == 0:  # An empty value shares no prompt.
        return 0
    cut = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    # Where even the first items differ TRL reads chosen[-1]; an empty prompt has no space to remove.
    return cut - 1 if cut > 0 and chosen[cut] != rejected[cut] and chosen[cut - 1] == " " else cut


# Conversations


class _Renderer:
    """The chat template of a tokenizer for the conversations of one example."""

    def __init__(self, fields: Mapping[str, Any], index: int, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"example {index} is a conversation, but the tokenizer has no chat template; set "
                "tokenizer.chat_template, or give texts"
            )
        tools, options = fields.get("tools"), fields.get("chat_template_kwargs", {})
        tools = json.loads(tools) if isinstance(tools, str) else tools
        check_encodable((tools, options), f"'tools' or 'chat_template_kwargs' of example {index}")
        self.index, self.tokenizer = index, tokenizer
        self.options = {"tools": without_none(tools) or None, **without_none(options)}

    def prompt(self, messages: list[Mapping[str, Any]]) -> str:
        """Render a prompt and the header of the answer; if it ends with an assistant's message, leave that open."""
        role = messages[-1]["role"]
        if role == "assistant":
            return self(messages, continue_final_message=True)
        if role not in ("user", "tool"):
            raise ValueError(
                f"'prompt' of example {self.index} must end with a user, tool or assistant message, got {role!r}"
            )
        return self(messages, add_generation_prompt=True)

    def __call__(self, messages: list[Mapping[str, Any]], **options: Any) -> str:
        """Render messages with the example's arguments of the template and with ``options``."""
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **self.options)
        except Exception as error:  # A template may raise anything.
            message = f"the chat template does not take the messages of example {self.index}: {error}"
            raise ValueError(message) from error


# Ranks and kinds of negatives


def _per_negative(fields: Mapping[str, Any], name: str, index: int, negatives: str, count: int) -> list[Any]:
    values = fields[name]
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name!r} of example {index} must be a list, got {_describe(values)}")
    if len(values) != count:
        raise ValueError(
            f"{name!r} of example {index} must have one entry for each of {count} {negatives!r}, got {len(values)}"
        )
    return list(values)


def _ranks(fields: Mapping[str, Any], index: int, negatives: str, count: int) -> list[int] | None:
    if "ranks" not in fields:
        return None
    ranks = _per_negative(fields, "ranks", index, negatives, count)
    for number, rank in enumerate(ranks):
        if not _is_token(rank) or rank < 0:
            raise ValueError(
                f"'ranks' of example {index} must be integers of at least 0, got {_describe(rank)} at {number}"
            )
    return ranks


def _kinds(fields: Mapping[str, Any], index: int, negatives: str, count: int) -> list[str]:
    if "kinds" not in fields:
        return ["given"] * count
    kinds = _per_negative(fields, "kinds", index, negatives, count)
    for number, kind in enumerate(kinds):
        if kind not in KINDS:
            raise ValueError(
                f"'kinds' of example {index} must be among {', '.join(KINDS)}, got {_describe(kind)} at {number}"
            )
    return kinds
