"""Linear layers of a model on a CPU by the products of this package, forward and backward.

torch's own products take longer: 1.1 times as long and more for the rows of a training batch in float32, and up to
three times for the few rows of a token that is generated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from cpo_kernels.kernels.cpu.gemm import gemm, gemm_supported

# Below so many weights, what surrounds a product takes longer than the product.
LEAST_WEIGHTS = 2**18


@contextmanager
def by_our_products(model: nn.Module) -> Iterator[None]:
    """Run the linear layers of a model by the compiled product, within the context.

    A layer runs as it is on another device than a CPU, under autocast, for a weight that is small, sharded or of
    another dtype than its input, where its forward has been replaced, inside of what torch.compile has compiled, and
    where somebody else keeps its activations, as checkpointing does: it compares those of the forward with those of a
    second run, which may come after the context.
    """
    # Classes, not forwards, are replaced: torch.compile compiles once for a class, and anew for each other function.
    first = None if torch.compiler.is_compiling() else next(model.parameters(), None)
    modules = () if first is None or first.device.type != "cpu" else model.modules()
    layers = [(layer, type(layer)) for layer in modules if type(layer) in CLASSES]
    for layer, kind in layers:
        layer.__class__ = CLASSES[kind]
    try:
        yield
    finally:
        for layer, kind in layers:
            layer.__class__ = kind


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _product_of(self, x) if _takes(x, self.weight, self.bias) else super().forward(x)


class _Conv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return _product_of(self, x) if _takes(x, self.weight, self.bias) else super().forward(x)


CLASSES: dict[type, Any] = {nn.Linear: _Linear, Conv1D: _Conv1D}


def _product_of(layer: Any, x: Tensor) -> Tensor:
    out: Tensor = _Product.apply(x, layer.weight, layer.bias, isinstance(layer, Conv1D))
    return out


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    plain = type(x) is Tensor and type(weight) is nn.Parameter and weight.device.type == x.device.type == "cpu"
    alike = plain and x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    large = alike and x.numel() > 0 and weight.numel() >= LEAST_WEIGHTS and gemm_supported(x.dtype, x.dtype)
    if not large or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is None


class _Product(torch.autograd.Function):
    """``x @ weight.T + bias``, or ``x @ weight + bias`` for a weight (inputs, outputs), as Conv1D keeps its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, inputs_first: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.inputs_first = inputs_first
        out = _multiplied(_rows(x), weight if inputs_first else weight.t())
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, of_rows = _rows(grad), _rows(x)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = _multiplied(rows, weight.t() if ctx.inputs_first else weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            of_weight = _multiplied(of_rows.t(), rows) if ctx.inputs_first else _multiplied(rows.t(), of_rows)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _multiplied(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    gemm(a, b, out)
    return out
