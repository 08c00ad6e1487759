"""Find the body and the head of a Hugging Face causal language model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapters import check_adapters, plain_head
from .quantised import is_quantised
from .sharded import is_sharded
from .tied import find_embedding


def find_body(model: PreTrainedModel) -> nn.Module:
    """Return the module whose ``last_hidden_state`` the head is applied to.

    It is the model's ``base_model`` or, where that is the model itself, the child that contains the token embedding.
    :func:`~.reading.read_head` checks that the head is applied to the output of that module.

    Raises:
        RuntimeError: the model has no body other than itself, or is an encoder-decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise RuntimeError(f"{type(model).__name__} is an encoder-decoder; expected a decoder-only language model")
    body = getattr(model, "base_model", model)
    if body is model:
        embedding = find_embedding(model)
        holds = (child for child in model.children() if any(module is embedding for module in child.modules()))
        body = next((child for child in holds if child is not embedding), None)
    if not isinstance(body, nn.Module):
        raise RuntimeError(
            f"{type(model).__name__} has no recognisable body: expected a causal language model of transformers, a "
            "module that holds the input embeddings and beside it the head"
        )
    return body


def find_head(model: PreTrainedModel) -> nn.Module:
    """Return the output embeddings, possibly wrapped in adapters.

    Raises:
        RuntimeError: the model has no output embeddings.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise RuntimeError(
            f"{type(model).__name__} has no recognisable head: expected a linear layer from get_output_embeddings()"
        )
    return head


def positions_of(config: Any) -> int | None:
    """Return how many positions a model of this configuration has; None where none limits its length."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if positions and positions > 0 else None  # XLNet: -1, no limit


def check_head(head: nn.Module) -> None:
    """Raise ``RuntimeError`` for a head beyond a weight (V, H), a bias (V,) and adapters that can be applied."""
    check_adapters(head)
    plain = plain_head(head)
    if is_quantised(plain):
        return
    kind = type(plain).__name__
    weight = getattr(plain, "weight", None)
    emptied = isinstance(weight, Tensor) and weight.numel() == 0  # by ZeRO-3, which keeps the shape elsewhere
    if not isinstance(weight, Tensor) or (weight.ndim != 2 and not emptied):
        raise RuntimeError(f"the head ({kind}) has no weight of shape (V, H); expected a linear layer")
    known = type(weight) in (nn.Parameter, Tensor) or is_sharded(plain)
    if not weight.is_floating_point() or not known:
        raise RuntimeError(
            f"the head ({kind}, weight {type(weight).__name__} of {weight.dtype}) is quantised in a way that the fused "
            "loss does not read; expected frozen weights in 4 or 8 bits of bitsandbytes, or a head in floating point "
            "(llm_int8_skip_modules=['lm_head'], modules_to_not_convert=['lm_head'])"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model in evaluation mode without gradients within the context; restore its modules' modes after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, training in modes:
            module.training = training
