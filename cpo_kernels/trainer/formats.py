"""The shapes that an example may have, brought to one: prompt, completion, negatives, their ranks and their kinds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cpo_kernels.negatives import KINDS

Value = Any  # A text, a list of token ids, or a conversation: a list of {"role", "content"}


def normalize_example(example: Mapping[str, Any], index: int, tokenizer: Any) -> dict[str, Any]:
    """Bring one example to the form that training reads.

    Accepted are ``{"prompt", "completion"}`` and TRL's preference data ``{"prompt", "chosen", "rejected"}``, each value
    a text, a list of token ids, or a conversation (a list of ``{"role", "content"}``); ``rejected`` is one value or a
    list of them. Beside a completion, ``"negatives"`` is a list of values. Both may have ``"ranks"``, one integer a
    negative (0: as good as the ground truth), and ``"kinds"``, for each negative a name in
    :data:`cpo_kernels.negatives.KINDS`. A field that is ``None`` counts as absent; any other field is ignored.

    - Without a prompt, what ``chosen`` and every ``rejected`` begin with is the prompt, by TRL's rule; so also where
      the prompt is a text and the others are conversations that repeat it.
    - Conversations go through the tokenizer's chat template (with the example's ``"tools"`` and
      ``"chat_template_kwargs"``) and become token ids: the prompt is what the templated prompt, followed by the header
      of an answer, shares with all candidates, as in TRL. White space behind the EOS token that ends the last message
      is left out: nothing is ever generated there.

    Args:
        example: the example.
        index: its number, for messages.
        tokenizer: a tokenizer of ``transformers``; used for conversations only.

    Returns:
        ``"prompt"`` and ``"completion"``, a string or a list of token ids each; ``"negatives"``, a list of them that
        may be empty; ``"ranks"``, a list of integers or None; ``"kinds"``, a list of strings, ``"given"`` where the
        example does not say.

    Raises:
        ValueError: a field that is missing, of a wrong form or without its counterpart, or a conversation that the
            tokenizer has no template for; the message names the example and the field.
    """
    fields = {name: value for name, value in example.items() if value is not None}
    prompt, completion, negatives, named = _candidates(fields, index)
    if _is_conversation(completion):
        prompt, completion, negatives = _apply_template(fields, index, prompt, completion, negatives, tokenizer)
    return {
        "prompt": prompt,
        "completion": completion,
        "negatives": negatives,
        "ranks": _ranks(fields, index, named, len(negatives)),
        "kinds": _kinds(fields, index, named, len(negatives)),
    }


def check_example(example: Mapping[str, Any], index: int) -> None:
    """Raise ``ValueError`` for what :func:`normalize_example` would not take, chat templates aside."""
    fields = {name: value for name, value in example.items() if value is not None}
    _, _, negatives, named = _candidates(fields, index)
    _ranks(fields, index, named, len(negatives))
    _kinds(fields, index, named, len(negatives))


def _candidates(fields: Mapping[str, Any], index: int) -> tuple[Value, Value, list[Value], str]:
    """Read prompt, completion and negatives as the example has them, and the name of the field of negatives."""
    preference = [name for name in ("chosen", "rejected") if name in fields]
    if not preference:
        prompt, completion = (_value(fields, name, index) for name in ("prompt", "completion"))
        negatives = _values(fields, "negatives", index) if "negatives" in fields else []
        _check_forms(index, {"prompt": [prompt], "completion": [completion], "negatives": negatives})
        return prompt, completion, negatives, "negatives"
    for other in ("completion", "negatives"):
        if other in fields:
            raise ValueError(f"example {index} has both {preference[0]!r} and {other!r}; expected one of the two forms")
    chosen = _value(fields, "chosen", index)
    rejected = _values(fields, "rejected", index)
    if not rejected:
        raise ValueError(f"'rejected' of example {index} is an empty list; expected at least one completion")
    prompt = _value(fields, "prompt", index) if "prompt" in fields else None
    implicit = prompt is None or (isinstance(prompt, str) and _is_conversation(chosen))
    _check_forms(index, {"prompt": [] if implicit else [prompt], "chosen": [chosen], "rejected": rejected})
    if implicit:
        cut = min(_shared_prefix(chosen, other, index) for other in rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], [other[cut:] for other in rejected]
    return prompt, chosen, rejected, "rejected"


def _value(fields: Mapping[str, Any], name: str, index: int) -> Value:
    if name not in fields:
        raise ValueError(f"example {index} has no {name!r}, only {sorted(fields)}")
    value = fields[name]
    if not _is_value(value):
        raise ValueError(
            f"{name!r} of example {index} must be a string, a list of token ids or a list of messages "
            f"{{'role', 'content'}}, got {_describe(value)}"
        )
    return list(value) if isinstance(value, tuple) else value


def _values(fields: Mapping[str, Any], name: str, index: int) -> list[Value]:
    """Read the negatives in a field; one of TRL's ``rejected`` may stand without a list around it."""
    if name not in fields:
        raise ValueError(f"example {index} has no {name!r}, only {sorted(fields)}")
    values = fields[name]
    if name == "rejected" and _is_value(values) and len(values):
        return [values]
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name!r} of example {index} must be a list of completions, got {_describe(values)}")
    for number, value in enumerate(values):
        if not _is_value(value):
            raise ValueError(
                f"{name!r} of example {index} must be a list of strings, of lists of token ids or of lists of messages "
                f"{{'role', 'content'}}, got {_describe(value)} at {number}"
            )
    return [list(value) if isinstance(value, tuple) else value for value in values]


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
    """Raise where some values are conversations and others are not: no template could join them."""
    forms = {name: [_is_conversation(value) for value in group] for name, group in values.items()}
    if len({form for group in forms.values() for form in group}) < 2:
        return
    parts = [f"{name!r} {'has' if any(group) else 'has no'} messages" for name, group in forms.items() if group]
    raise ValueError(f"example {index} mixes messages with plain texts or token ids: {', '.join(parts)}")


def _shared_prefix(chosen: Sequence[Any], rejected: Sequence[Any], index: int) -> int:
    """Find where the implicit prompt of a pair ends, by the rule of ``trl.data_utils.extract_prompt``.

    That is before the first difference and, in texts, before a space that precedes it; where one value begins with
    the whole other, before the last item of the shorter.
    """
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"'chosen' and 'rejected' of example {index} have no 'prompt' and are not both texts")
    shorter = min(len(chosen), len(rejected))
    if shorter == 0:
        name = "rejected" if len(chosen) else "chosen"
        raise ValueError(f"{name!r} of example {index} is empty, and without 'prompt' it has to begin with the prompt")
    cut = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    # TRL looks at chosen[-1] here where the first items differ already; a prompt of nothing has no last space.
    return cut - 1 if cut > 0 and chosen[cut] != rejected[cut] and chosen[cut - 1] == " " else cut


# Conversations


def _apply_template(
    fields: Mapping[str, Any], index: int, prompt: Value, completion: Value, negatives: list[Value], tokenizer: Any
) -> tuple[list[int], list[int], list[list[int]]]:
    """Turn prompt, completion and negatives that are conversations into token ids."""
    if not _is_conversation(prompt):
        raise ValueError(f"the conversations of example {index} do not begin with the same message; expected a prompt")
    render = _Renderer(fields, index, tokenizer)
    prefix = render.prompt(prompt)
    texts = [render.whole([*prompt, *candidate]) for candidate in (completion, *negatives)]
    prefix = prefix[: min(_common_length(prefix, text) for text in texts)]
    # Templates write special tokens out, so the tokenizer adds none.
    prefix_ids, *ids = tokenizer([prefix, *texts], add_special_tokens=False)["input_ids"]
    cut = min(_common_length(prefix_ids, candidate) for candidate in ids)
    first, *others = (list(candidate[cut:]) for candidate in ids)
    return list(prefix_ids[:cut]), first, others


class _Renderer:
    """The chat template of a tokenizer for the conversations of one example."""

    def __init__(self, fields: Mapping[str, Any], index: int, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"example {index} is a conversation, but the tokenizer has no chat template; set "
                "tokenizer.chat_template, or give texts"
            )
        tools = fields.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        self.index, self.tokenizer = index, tokenizer
        self.options = {"tools": tools or None, **fields.get("chat_template_kwargs", {})}

    def prompt(self, messages: list[Mapping[str, Any]]) -> str:
        """Render a prompt with the header of the answer; one that ends with an assistant's words leaves them open."""
        role = messages[-1]["role"]
        if role == "assistant":
            return self._render(messages, continue_final_message=True)
        if role not in ("user", "tool"):
            raise ValueError(
                f"'prompt' of example {self.index} must end with a user, tool or assistant message, got {role!r}"
            )
        return self._render(messages, add_generation_prompt=True)

    def whole(self, messages: list[Mapping[str, Any]]) -> str:
        """Render a prompt and an answer, without white space behind the EOS token that ends it."""
        text = self._render(messages)
        eos = self.tokenizer.eos_token
        return text.rstrip() if eos and text.rstrip().endswith(eos) else text

    def _render(self, messages: list[Mapping[str, Any]], **options: Any) -> str:
        # Tables fill the keys that a message does not have with None, which templates would take for a value.
        kept = [{k: v for k, v in m.items() if v is not None or k == "content"} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(kept, tokenize=False, **options, **self.options)
        except Exception as error:  # A template may raise anything.
            message = f"the chat template does not take the messages of example {self.index}: {error}"
            raise ValueError(message) from error


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


# What is said of the negatives


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
