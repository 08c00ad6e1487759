"""Linear layers of a model on a CPU by the products of this package, where nothing is differentiated.

torch's own product takes up to three times as long in float32 for the few rows of a token that is generated, and longer
for as many rows as a batch has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cpo_kernels.kernels.cpu.gemm import gemm, gemm_supported

LINEAR = (nn.Linear, Conv1D)
# Below so many weights, what surrounds a product takes longer than the product.
LEAST_WEIGHTS = 2**18


@contextmanager
def by_our_products(model: nn.Module) -> Iterator[None]:
    """Run the linear layers of a model by the compiled product, within the context.

    A layer runs as it is on another device than a CPU, where gradients are recorded, under autocast, for a weight that
    is small, sharded or of another dtype than its input, and where its forward has been replaced.
    """
    replaced = [layer for layer in model.modules() if type(layer) in LINEAR and "forward" not in vars(layer)]
    for layer in replaced:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in replaced:
            del layer.forward


def _forward(layer: Any, x: Tensor) -> Tensor:
    weight = layer.weight
    if not _takes(x, weight, layer.bias):
        return type(layer).forward(layer, x)
    factor = weight.t() if type(layer) is nn.Linear else weight  # (K, N); Conv1D keeps its weight that way
    out = x.new_empty(x.numel() // x.shape[-1], factor.shape[1])
    gemm(x.reshape(out.shape[0], -1), factor, out)
    if layer.bias is not None:
        out += layer.bias
    return out.view(*x.shape[:-1], -1)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    recorded = torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()
    plain = type(x) is Tensor and type(weight) is nn.Parameter and weight.device.type == x.device.type == "cpu"
    alike = plain and x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    large = x.numel() > 0 and weight.numel() >= LEAST_WEIGHTS
    return not recorded and alike and large and gemm_supported(x.dtype, x.dtype)
