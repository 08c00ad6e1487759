"""Models that run as DeepSpeed runs the trained one, which under ZeRO-3 is sharded; the trained one is Trainer's."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers.integrations import deepspeed as of_transformers

from cpo_kernels.models.sharded import gathered


def under_deepspeed(accelerator: Accelerator) -> bool:
    """Tell whether DeepSpeed runs the trained model."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def shards_parameters(accelerator: Accelerator) -> bool:
    """Tell whether every process holds a part of each parameter: FSDP and ZeRO-3, not ZeRO-1 and ZeRO-2."""
    if under_deepspeed(accelerator):
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def serve(model: nn.Module, accelerator: Accelerator) -> Any:
    """Move a model to where DeepSpeed runs the trained one, in its dtype, and shard it if that is sharded.

    Returns:
        The engine, without which a sharded model does not run: its hooks bring parameters. ``destroy()`` removes them.
    """
    import deepspeed

    return deepspeed.initialize(model=model, config=_without_training(accelerator))[0]


@contextmanager
def serving(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Let a model run before training as :func:`serve` does, within the context; nothing without DeepSpeed."""
    if not under_deepspeed(accelerator):
        yield
        return
    engine = serve(model, accelerator)
    try:
        yield
    finally:
        engine.destroy()


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model; of one that transformers has sharded as it loaded it, every process copies its part."""
    frozen = copy.deepcopy(model)
    # A copy of an emptied parameter is empty and no part of ZeRO-3, so each is filled and then sharded in turn.
    for own, copied in zip(model.parameters(), frozen.parameters(), strict=True):
        if hasattr(own, "ds_id"):
            with gathered(own):
                copied.data = own.detach().clone()
            own.convert_to_zero_parameters(param_list=[copied])  # type: ignore[attr-defined]
    return frozen


@contextmanager
def loading_whole() -> Iterator[None]:
    """Let transformers load models whole within the context, where under ZeRO-3 it would shard them."""
    kept = of_transformers._hf_deepspeed_config_weak_ref
    of_transformers.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        of_transformers._hf_deepspeed_config_weak_ref = kept


def _without_training(accelerator: Accelerator) -> dict[str, Any]:
    """Return the configuration of DeepSpeed for a model that is not trained: sharded as the trained one, or whole."""
    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    zero = config["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if zero["stage"] != 3:
        zero["stage"] = 0
    return _decided(config)


def _decided(config: dict[str, Any]) -> dict[str, Any]:
    """Leave out what Trainer decides when training begins, so that the defaults of DeepSpeed hold."""
    decided = {name: _decided(value) if isinstance(value, dict) else value for name, value in config.items()}
    return {name: value for name, value in decided.items() if value != "auto"}
