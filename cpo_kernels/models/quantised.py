"""Layers that bitsandbytes has quantised: the weight of a head as the fused loss reads it, and bodies that train.

Nothing here imports bitsandbytes; a model that has its layers has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 4096  # of an 8-bit weight that are in float32 at once


def is_quantised(module: nn.Module) -> bool:
    """Tell whether a layer's frozen weight is in 4 or 8 bits of bitsandbytes."""
    layer: Any = module
    return _is(module, "Linear4bit") or (_is(module, "Linear8bitLt") and not layer.state.has_fp16_weights)


def head_weight(head: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the weight (V, H) of a plain head; of a quantised one a new tensor of ``dtype``, which has no gradient.

    It is what bitsandbytes multiplies by in 4 bits (Dettmers et al. 2023, QLoRA, equation 5). In 8 bits it also rounds
    each hidden state to 8 bits (Dettmers et al. 2022, LLM.int8(), equation 3), which is left out here.
    """
    layer: Any = head
    if not is_quantised(head):
        return layer.weight
    functional = sys.modules["bitsandbytes.functional"]
    if _is(head, "Linear4bit"):
        return functional.dequantize_4bit(layer.weight.data, _state(head)).detach().to(dtype)
    # Until its first call the layer keeps its numbers at its weight.
    codes = layer.weight.data if layer.state.CB is None else layer.state.CB
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows, some, scale in zip(weight.split(ROWS), codes.split(ROWS), scales.split(ROWS), strict=True):
        rows.copy_(functional.int8_vectorwise_dequant(some, scale))  # of float32
    return weight


def rounds_by_batch(model: nn.Module) -> bool:
    """Tell whether a layer rounds a hidden state in a way that depends on those beside it, as LLM.int8() does.

    A column of the hidden states with a large number in any row, an outlier, is left in 16 bits in all rows.
    """
    layers: Any = model.modules()
    return any(_is(module, "Linear8bitLt") and module.state.threshold > 0 for module in layers)


def keep_trainable(model: nn.Module) -> None:
    """Keep the 4-bit layers of a model in the form whose products have gradients.

    On CPUs with AVX512-BF16, bitsandbytes 0.49 puts a layer that is called in evaluation mode without gradients into
    another form for good: rounded scales, and products through which no gradient goes.

    Raises:
        RuntimeError: a layer was called before and has that form.
    """
    for name, module in model.named_modules():
        if not _is(module, "Linear4bit"):
            continue
        if getattr(_state(module), "packing_format_for_cpu", False):
            raise RuntimeError(
                f"{name} was called in evaluation mode on a CPU, where bitsandbytes puts 4-bit weights into a form "
                "without gradients; load the model anew and attach the loss before its first call"
            )
        layer: Any = module
        layer.support_avx512bf16_for_cpu = False


def _state(module: nn.Module) -> Any:
    layer: Any = module
    return getattr(layer.weight, "quant_state", None) or layer.quant_state


def _is(module: nn.Module, kind: str) -> bool:
    source = sys.modules.get("bitsandbytes.nn")
    return source is not None and isinstance(module, getattr(source, kind))
