"""Heads whose parameters FSDP2 or ZeRO gathers by hooks on the head, between which code that reads them must run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def may_be_sharded() -> bool:
    """Tell whether this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(module: nn.Module) -> bool:
    """Tell whether some parameter of ``module`` is incomplete now: a shard, emptied, or on the meta device."""
    return any(_is_shard(p) or p.numel() == 0 or p.is_meta for p in module.parameters())


def is_managed(module: nn.Module) -> bool:
    """Tell whether hooks of ``module`` itself have to run around code that reads its parameters.

    A module that FSDP2 wraps has such hooks even while its weight is complete, gathered by other modules of its group;
    ZeRO-3 marks its parameters with ``ds_id``. A DTensor in a module that FSDP2 does not wrap belongs to tensor
    parallelism, whose hooks gather nothing: they turn inputs and outputs into DTensors.
    """
    if _is_fsdp_module(module):
        return True
    return any(p.numel() == 0 or hasattr(p, "ds_id") for p in module.parameters())


def gathered(value: Any) -> Any:
    """Bring the whole of a parameter that ZeRO-3 has sharded, within the context; all processes have to enter it."""
    if not hasattr(value, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([value])


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of the whole of a tensor, also of one that ZeRO-3 has emptied."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def run_inside(modules: Sequence[nn.Module], compute: Callable[[Tensor], Any], hidden: Tensor) -> Any:
    """Run ``compute(hidden)`` inside a call of each of ``modules`` that needs one, the first outermost.

    Each call runs the module's hooks with ``compute`` in place of its forward; hooks of other modules do not fire.
    """
    if not modules:
        return compute(hidden)
    first, rest = modules[0], modules[1:]
    if not is_managed(first):
        return run_inside(rest, compute, hidden)
    own = first.__dict__.get("forward")
    first.forward = lambda inputs: run_inside(rest, compute, inputs)
    try:
        return first(hidden)
    finally:
        if own is None:
            del first.forward
        else:
            first.forward = own


def _is_shard(parameter: Tensor) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _is_fsdp_module(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)
