"""How to switch dropout off, by which a model would differ from its reference before it has learned anything."""

from __future__ import annotations

import torch
from torch import nn
from transformers.utils import logging

from cpo_kernels.models.head import positions_of

logger = logging.get_logger(__name__)


def disable_dropout(model: nn.Module) -> None:
    """Switch off all dropout in a model, that of its adapters included, and the dropping of whole layers.

    Dropout layers get the probability 0, and so does every other probability that a module keeps as an attribute with
    "drop" in its name. The configuration is not changed. A test run finds a model that reads a probability from its
    configuration in every forward, and a warning names the probability.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name.lower():
                setattr(module, name, 0.0)
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    left = {name: value for name, value in vars(config).items() if "drop" in name.lower() and _is_probability(value)}
    if left and _is_random(model):
        logger.warning(
            f"disable_dropout: {type(model).__name__} is random in training though its dropout layers are switched "
            f"off; it reads its configuration while it runs. Set to 0 there: {', '.join(sorted(left))}"
        )


def _is_probability(value: object) -> bool:
    return isinstance(value, float) and 0 < value <= 1


def _is_random(model: nn.Module) -> bool:
    """Tell whether two passes in training mode over the same tokens differ; False if weights are sharded or on meta."""
    parameters = list(model.parameters())
    if any(parameter.is_meta or not parameter.numel() for parameter in parameters):
        return False
    device, was_training = parameters[0].device, model.training
    tokens = torch.zeros(1, min(16, positions_of(model.config) or 16), dtype=torch.int64, device=device)
    model.train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            first, second = (model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits for _ in range(2))
    finally:
        model.train(was_training)
    return not torch.equal(first, second)
