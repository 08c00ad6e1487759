"""Prefix sharing: a prompt and its candidates as one row with a tree-shaped mask, and which models can do it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cpo_kernels.models.adapters import find_base
from cpo_kernels.models.head import evaluating, find_body, positions_of
from cpo_kernels.models.sharded import is_sharded
from cpo_kernels.options import suggests_arguments

from .masks import IMPLEMENTATIONS, layer_windows, tree_inputs
from .tree import PrefixTree, SharedBatch, pack_groups

__all__ = ["PrefixTree", "SharedBatch", "check_prefix_sharing", "pack_groups", "tree_inputs"]

MAX_PROBED_WINDOW = 256  # a longer window is replaced by SHORT_WINDOW during the probe
SHORT_WINDOW = 16
# Relative to the norm of a hidden state: above the rounding of deep models, below the effect of a wrong token.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# The names under which configurations list the types of their layers.
LAYER_LISTS = ("layer_types", "layers_block_type", "block_types", "attention_layers")
ATTENTION = ("full_attention", "sliding_attention", "attention", "global")


@suggests_arguments
def check_prefix_sharing(model: nn.Module) -> None:
    """Check that packed rows give a model the hidden states of separate rows.

    Configuration and modules are read first: layers must not carry a state from token to token, attention must take a
    mask, and positions must restart with each candidate. Then two groups of two candidates run as packed and as
    separate rows in evaluation mode. Their prompts are longer than a sliding window, since a window that counts indices
    instead of positions is silently wrong. The model is not changed. The run is skipped where parameters are missing
    (on the meta device, or sharded).

    Args:
        model: a causal language model of ``transformers``, or a PEFT model of one.

    Raises:
        RuntimeError: the model cannot share prefixes; says why.
    """
    base: Any = find_base(model)
    body = find_body(base)
    reason = _refusal(base, body)
    if reason:
        raise RuntimeError(f"{type(base).__name__} cannot share prefixes: {reason}")
    if not is_sharded(body):
        _probe(base, body)


def _refusal(model: PreTrainedModel, body: nn.Module) -> str | None:
    """Say why configuration and modules rule out that the model shares prefixes; None if they do not."""
    config: Any = model.config.get_text_config()
    if config._attn_implementation not in IMPLEMENTATIONS:
        return (
            f"its attention implementation {config._attn_implementation!r} takes no such mask; expected one of "
            f"{', '.join(IMPLEMENTATIONS)}"
        )
    if getattr(model, "_is_stateful", False):
        return "its layers carry a state from token to token, which no mask keeps from one candidate to the next"
    for name in LAYER_LISTS:
        others = sorted({str(kind) for kind in getattr(config, name, None) or ()} - set(ATTENTION))
        if others:
            return f"it has layers of type {', '.join(others)} (its configuration's {name}), not only attention"
    convolution = next((name for name, module in body.named_modules() if isinstance(module, nn.Conv1d)), None)
    if convolution is not None:
        return f"it has a convolution along the row ({convolution})"
    if getattr(config, "alibi", False):
        return "its attention is biased by the distance of indices in a row (ALiBi)"
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return "its body takes no position_ids, which each candidate restarts behind the prompt"
    try:
        layer_windows(config)
    except RuntimeError as error:
        return str(error)
    return None


def _probe(model: PreTrainedModel, body: nn.Module) -> None:
    name = type(model).__name__
    with evaluating(model), _short_window(model) as window:
        lengths = _probe_lengths(model, window)
        if lengths is None:
            return
        prompts, completions = _probe_groups(model, *lengths)
        separate = _separate_states(body, prompts, completions)
        try:
            shared = _shared_states(model, body, prompts, completions)
        except Exception as error:
            raise RuntimeError(f"{name} cannot share prefixes: its body failed on packed rows ({error})") from error
    distance = (shared - separate).norm(dim=-1) / separate.norm(dim=-1).clamp(min=1e-30)
    worst, tolerance = float(distance.max()), TOLERANCES.get(model.dtype, TOLERANCES[torch.bfloat16])
    if not worst <= tolerance:
        raise RuntimeError(
            f"{name} cannot share prefixes: on a probe its hidden states differ from those of separate rows by "
            f"{worst:.2g} of their norm, expected at most {tolerance:g} in {model.dtype}"
        )


def _probe_lengths(model: PreTrainedModel, window: int | None) -> tuple[int, int] | None:
    """Choose lengths of prompt and candidate: the prompt longer than the window, both within the model's positions.

    The result is None for a model of fewer than 2 positions, which cannot share any.
    """
    positions = positions_of(model.config) or 2**31
    candidate = min((window or 8) // 2 + 4, positions // 2)
    prompt = min((window or 8) + 3, positions - candidate)
    return (prompt, candidate) if candidate else None


def _probe_groups(model: PreTrainedModel, prompt: int, candidate: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Make two groups of two candidates, of different lengths and of tokens spread over the vocabulary."""
    vocab = model.config.get_text_config().vocab_size
    stream = iter(range(1, 2**31))

    def text(length: int) -> list[int]:
        return [next(stream) * 7919 % vocab for _ in range(max(1, length))]

    prompts = [text(prompt), text(prompt // 2)]
    return prompts, [[text(candidate), text(candidate - 1)], [text(candidate - 2), text(candidate)]]


def _shared_states(
    model: PreTrainedModel, body: nn.Module, prompts: list[list[int]], completions: list[list[list[int]]]
) -> Tensor:
    """Compute the hidden states (N, H) float32 that predict the tokens of all candidates, from packed rows."""
    longest = sum(map(len, prompts)) + sum(len(c) for candidates in completions for c in candidates)
    batch = pack_groups(prompts, completions, max_row_tokens=longest)
    device = next(body.parameters()).device
    inputs = tree_inputs(model, batch.tree.to(device))
    hidden = body(input_ids=batch.input_ids.to(device), use_cache=False, return_dict=True, **inputs).last_hidden_state
    rows = [row for group in batch.rows for candidate in group for row in candidate]
    return hidden.flatten(0, -2)[rows].float()


def _separate_states(body: nn.Module, prompts: list[list[int]], completions: list[list[list[int]]]) -> Tensor:
    """Compute the hidden states from one row for each candidate, one candidate at a time."""
    device, states = next(body.parameters()).device, []
    for prompt, candidates in zip(prompts, completions, strict=True):
        for candidate in candidates:
            ids = torch.tensor([[*prompt, *candidate[:-1]]], device=device)
            mask = torch.ones_like(ids)
            hidden = body(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True).last_hidden_state
            states.append(hidden[0, len(prompt) - 1 :].float())
    return torch.cat(states)


@contextmanager
def _short_window(model: PreTrainedModel) -> Iterator[int | None]:
    """Shorten a long sliding window in the configuration, where masks read it, within the context; yield it."""
    config: Any = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is None or window <= MAX_PROBED_WINDOW:
        yield window
        return
    config.sliding_window = SHORT_WINDOW
    try:
        yield SHORT_WINDOW
    finally:
        config.sliding_window = window
