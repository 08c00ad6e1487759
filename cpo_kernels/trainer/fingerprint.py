"""The fingerprint of a model: a digest of its contents by which caches and checkpoints tell models apart."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from cpo_kernels.models.sharded import gathered

SCHEME = "xxh3-128"  # Begins every fingerprint: fingerprints of other schemes cannot be compared.
# Keys of configurations that do not affect the computation.
CHANGING = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
}
CHUNK_BYTES = 1 << 26  # Bytes copied from a device at a time.


def fingerprint(model: nn.Module, frozen_only: bool = False, as_they_were: Mapping[str, Tensor] | None = None) -> str:
    """Digest every byte of a model's parameters, buffers and extra state, with their names, shapes and dtypes.

    The configuration is digested too, as far as it affects the computation. The fingerprint is of the model at this
    moment, so it is to be taken anew wherever the model may have changed. It does not depend on device, strides or
    ties: two names of one tensor count as two equal tensors, read once.
    Sharded parameters are gathered one at a time and give the digest of the whole model; all processes that hold
    shards have to call this together.

    Args:
        model: a model on any device, in any dtype, quantised or not.
        frozen_only: leave out the parameters that are trained.
        as_they_were: by name, values of parameters to digest in place of their present ones.

    Raises:
        ValueError: a parameter or buffer without values, such as one on the meta device; the message names it.
    """
    whole = xxhash.xxh3_128()
    known: dict[int, str] = {}
    whole.update(json.dumps(architecture(model, adapters=not frozen_only), sort_keys=True, default=str).encode())
    earlier = as_they_were or {}
    contents = _contents(model)
    for name in sorted(contents):
        value = earlier.get(name, contents[name])
        if frozen_only and name not in earlier and isinstance(value, Tensor) and value.requires_grad:
            continue
        if id(value) not in known:
            known[id(value)] = _digest(value, name)
        whole.update(repr((name, known[id(value)])).encode())
    return f"{SCHEME}:{whole.hexdigest()}"


def architecture(model: nn.Module, adapters: bool = True) -> dict[str, Any]:
    """Return the configurations of a model and its adapters, but for names, places and special tokens."""
    configs: dict[str, Any] = {"model": getattr(model, "config", None)}
    if adapters:
        configs |= getattr(model, "peft_config", None) or {}
    return {name: _lasting(own.to_dict()) for name, own in configs.items() if hasattr(own, "to_dict")}


def _lasting(value: Any) -> Any:
    """Remove keys that change when a model is saved, loaded or trained, at any depth, and sort sets."""
    if isinstance(value, dict):
        kept = {str(k): v for k, v in value.items() if k not in CHANGING and not str(k).startswith("_")}
        return {k: _lasting(v) for k, v in kept.items() if not k.endswith("token_id")}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return [_lasting(item) for item in value] if isinstance(value, (list, tuple)) else value


def _contents(model: nn.Module) -> dict[str, Any]:
    """Return all that a model saves, with the extra state of quantised layers, and its other buffers."""
    saved = model.state_dict(keep_vars=True)
    return dict(model.named_buffers(remove_duplicate=False)) | saved


def _digest(value: Any, name: str) -> str:
    state = xxhash.xxh3_128()
    with gathered(value):
        for part in _parts(value, name):
            if not isinstance(part, Tensor):
                state.update(pickle.dumps(part))
                continue
            state.update(f"{part.dtype} {tuple(part.shape)}".encode())
            values = part.contiguous().reshape(-1).view(torch.uint8)
            for start in range(0, len(values), CHUNK_BYTES):
                state.update(values[start : start + CHUNK_BYTES].cpu().numpy().data)
    return state.hexdigest()


def _parts(value: Any, name: str) -> Iterator[Any]:
    """Yield dense tensors with the values of a tensor of any kind, and facts that are needed to read them."""
    if isinstance(value, (tuple, list)):
        yield len(value)
        for item in value:
            yield from _parts(item, name)
        return
    if not isinstance(value, Tensor):
        yield value
        return
    if nn.parameter.is_lazy(value) or value.is_meta:
        raise ValueError(f"expected a model with values to take a fingerprint of, but {name!r} has none yet")
    tensor = value.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if hasattr(tensor, "__tensor_flatten__"):
        inner, about = tensor.__tensor_flatten__()
        yield type(tensor).__name__, about
        for attribute in inner:
            yield attribute
            yield from _parts(getattr(tensor, attribute), name)
    elif tensor.is_quantized:
        per_channel = tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
        yield str(tensor.dtype), str(tensor.qscheme())
        yield tensor.int_repr()
        if per_channel:
            yield tensor.q_per_channel_axis()
            yield from (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points())
        else:
            yield tensor.q_scale(), tensor.q_zero_point()
    else:
        dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
        yield dense.resolve_conj().resolve_neg()
