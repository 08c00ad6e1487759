"""Tiny models that bitsandbytes has quantised, as `from_pretrained` loads them, and with their weights written out."""

from __future__ import annotations

import copy
import tempfile
from functools import cache
from importlib.metadata import distributions

import pytest
import tiny_models
import torch
import transformers
from torch import nn

needs_bitsandbytes = pytest.mark.skipif(
    not any(distributions(name="bitsandbytes")), reason="bitsandbytes is not installed: make check-quantized"
)
# Blocks of 64 numbers have one scale.
WIDE = {"hidden_size": 64, "intermediate_size": 128}
BITS = {
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "4bit, nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "8bit": {"load_in_8bit": True},
}
HEAD_TOO = {"llm_int8_skip_modules": ["none of them"]}  # without names the head is left out


@cache
def folder_of(kind: str) -> tempfile.TemporaryDirectory:
    """Save a model, which is there until the process ends."""
    folder = tempfile.TemporaryDirectory()
    model = tiny_models.llama(**WIDE) if kind == "llama" else tiny_models.gpt2(n_embd=64)
    if kind == "llama":  # not a multiple of what its neighbours have, so that a wrong scale shows
        with torch.no_grad():
            model.lm_head.weight *= torch.linspace(0.5, 2.0, tiny_models.VOCAB)[:, None]
    model.save_pretrained(folder.name)
    return folder


def quantised(bits: str = "4bit", kind: str = "llama", dtype: torch.dtype = torch.float32, **options):
    """Load a model whose body is quantised; `**HEAD_TOO` for its head as well."""
    config = BITS[bits] | options
    if "load_in_4bit" in config:
        config["bnb_4bit_compute_dtype"] = dtype
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder_of(kind).name, dtype=dtype, quantization_config=transformers.BitsAndBytesConfig(**config)
    )


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight that a quantised layer multiplies by, from its codes and scales."""
    if hasattr(layer, "state"):
        codes = layer.weight.data if layer.state.CB is None else layer.state.CB
        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return codes.double() * scales.double()[:, None] / 127
    state, packed = layer.weight.quant_state, layer.weight.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    absmax = state.absmax
    if state.nested:
        inner = state.state2
        absmax = inner.code[absmax.long()] * inner.absmax.repeat_interleave(inner.blocksize)[: len(absmax)]
        absmax = absmax + state.offset
    values = state.code[codes].double() * absmax.double().repeat_interleave(state.blocksize)[: len(codes)]
    return values.view(state.shape)


def written_out(model: nn.Module) -> nn.Module:
    """A copy of a model, or of one with adapters, whose quantised layers are ordinary ones of the same weights."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ in ("Linear4bit", "Linear8bitLt") and "bitsandbytes" in type(child).__module__:
                plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                with torch.no_grad():
                    plain.weight.copy_(weight_of(child))
                    if child.bias is not None:
                        plain.bias.copy_(child.bias)
                setattr(module, name, plain.requires_grad_(False))
    return model
