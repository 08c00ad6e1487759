"""The keywords with which the body of a model runs on a prefix tree: restarted positions, and attention masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .attention import with_blocks
from .blocks import block_pairs, find_segments, make_blocks, make_gather
from .tree import PrefixTree

IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
FULL, SLIDING = "full_attention", "sliding_attention"


def tree_inputs(model: PreTrainedModel, tree: PrefixTree) -> dict[str, Any]:
    """Make the keywords with which the body of a model runs packed rows: ``position_ids`` and ``attention_mask``.

    A query sees the keys of its own branch and of its group's prompt, up to itself; in a layer with a sliding window it
    sees only keys whose position, not index, is inside the window. Padded positions see each other, so that no
    row of a mask is empty. As everywhere in ``transformers``, a configuration with ``layer_types`` says that the body
    takes a mask per type, and one with only a ``sliding_window`` that all its layers have it.

    Args:
        model: a causal language model, or its body.
        tree: the tree of the packed rows, on the device of the body's input.

    Returns:
        ``position_ids`` (B, L) int64; ``attention_mask``, one mask or a mapping of layer types to masks, each in the
        format of the model's attention implementation: sdpa (B, 1, L, L) bool, eager (B, 1, L, L) in the model's
        dtype and additive, flex attention a ``BlockMask``.

    Raises:
        RuntimeError: an attention implementation or a layer type for which no tree mask can be made.
    """
    windows = layer_windows(model.config.get_text_config())
    masks = _make_masks(model, tree, set(windows.values()))
    by_type = {name: masks[window] for name, window in windows.items() if name is not None}
    return {"position_ids": tree.positions, "attention_mask": by_type or masks[windows[None]]}


def with_prefix_tree(model: PreTrainedModel, tree: PrefixTree, keywords: dict[str, Any]) -> dict[str, Any]:
    """Join keywords of a forward pass with those of :func:`tree_inputs`.

    Raises:
        ValueError: ``attention_mask`` or ``position_ids`` is given as well.
    """
    given = [name for name in ("attention_mask", "position_ids") if keywords.get(name) is not None]
    if given:
        raise ValueError(f"prefix_tree brings its own attention_mask and position_ids; got {' and '.join(given)} too")
    return keywords | tree_inputs(model, tree)


def layer_windows(config: Any) -> dict[str | None, int | None]:
    """Return the window of each layer type, None for full attention; one type None for all layers alike.

    Raises:
        RuntimeError: a layer type other than full and sliding attention.
    """
    window = getattr(config, "sliding_window", None)
    if not hasattr(config, "layer_types"):
        if getattr(config, "attention_chunk_size", None) is not None:
            raise RuntimeError("chunked attention cannot share prefixes; expected full or sliding attention")
        return {None: window}
    # A type that no layer has needs no mask: bodies look up the types of their layers.
    types = sorted(set(config.layer_types))
    unknown = [name for name in types if name not in (FULL, SLIDING)]
    if unknown:
        raise RuntimeError(f"layers of type {', '.join(unknown)} cannot share prefixes; expected {FULL} or {SLIDING}")
    return {name: window if name == SLIDING else None for name in types}


def _make_masks(model: PreTrainedModel, tree: PrefixTree, windows: set[int | None]) -> dict[int | None, Any]:
    implementation = model.config.get_text_config()._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        raise RuntimeError(
            f"the attention implementation {implementation!r} takes no mask that shares prefixes; expected one of "
            f"{', '.join(IMPLEMENTATIONS)} (attn_implementation=... of from_pretrained)"
        )
    masks = {window: _make_mask(implementation, tree, window, model.dtype) for window in windows}
    if implementation == "sdpa" and not torch.compiler.is_compiling():
        _add_blocks(masks, tree)
    return masks


def _make_mask(implementation: str, tree: PrefixTree, window: int | None, dtype: torch.dtype) -> Any:
    batch, length = tree.groups.shape
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=batch,
        q_length=length,
        kv_length=length,
        mask_function=tree_mask_function(tree, window),
        allow_is_causal_skip=False,
        dtype=dtype,
        device=tree.groups.device,
    )


def tree_mask_function(tree: PrefixTree, window: int | None) -> Callable[..., Tensor]:
    """Make a mask function of ``transformers``: whether a query sees a key, by indices of row, head, query and key."""
    # Group and branch as one number, and the number of the group's prompt: two comparisons instead of three.
    prompt = tree.groups.long() << 32
    path, positions = prompt | tree.branches, tree.positions

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= q) & ((path[b, k] == prompt[b, q]) | (path[b, k] == path[b, q]))
        return seen if window is None else seen & (positions[b, q] - positions[b, k] < window)

    return allowed


def _add_blocks(masks: dict[int | None, Any], tree: PrefixTree) -> None:
    """Let sdpa compute branch by branch where that is less work than whole rows."""
    segments = find_segments(tree)
    batch, length = tree.groups.shape
    if segments is None or block_pairs(segments) >= batch * length * length:
        return
    device = tree.groups.device
    gather = make_gather(segments, device)
    for window, mask in masks.items():
        masks[window] = with_blocks(mask, make_blocks(segments, gather, window, device))
