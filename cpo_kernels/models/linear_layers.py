"""Linear layers of a model on a CPU by the float32 product of this package, forward and backward.

torch's own product takes longer for the rows of a training batch, and several times as long for the few rows of a token
that is generated, where the machine's units are wider than it uses.
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

    A layer runs as it is on another device than a CPU, in another dtype than float32, under autocast, for a weight that
    is small or sharded, where its forward has been replaced, inside of what torch.compile has compiled, where something
    watches torch's operators, and where somebody else keeps its activations, as checkpointing does: it compares those
    of the forward with those of a second run, which may come after the context.
    """
    first = None if torch.compiler.is_compiling() else next(model.parameters(), None)
    modules = () if first is None or first.device.type != "cpu" else model.modules()
    kinds = [(layer, type(layer)) for layer in modules]  # looked at once: another thread may run the same model
    layers = [(layer, kind) for layer, kind in kinds if kind in CLASSES]
    # Classes, not forwards, are replaced: torch.compile compiles once for a class, and anew for each other function.
    try:
        for layer, kind in layers:
            layer.__class__ = CLASSES[kind]
        yield
    finally:
        for layer, kind in layers:
            if type(layer) is CLASSES[kind]:
                layer.__class__ = kind


class _CopiedAsItsBase:
    """A copy or a pickle that is made within the context is of torch's class."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _make, (BASES[type(self)],), *object.__reduce_ex__(self, max(2, int(protocol)))[2:]


def _make(kind: type) -> Any:
    return object.__new__(kind)


class _Linear(_CopiedAsItsBase, nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if not _takes(input, self.weight, self.bias):
            return nn.Linear.forward(self, input)
        out: Tensor = _Product.apply(input, self.weight, self.bias, False)
        return out


class _Conv1D(_CopiedAsItsBase, Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        if not _takes(x, self.weight, self.bias):
            return Conv1D.forward(self, x)
        out: Tensor = _Product.apply(x, self.weight, self.bias, True)
        return out


CLASSES: dict[type, Any] = {nn.Linear: _Linear, Conv1D: _Conv1D}
BASES: dict[type, Any] = {ours: base for base, ours in CLASSES.items()}


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return False
    plain = type(x) is Tensor and type(weight) is nn.Parameter and weight.device.type == x.device.type == "cpu"
    alike = plain and x.dtype == weight.dtype == torch.float32 and (bias is None or bias.dtype == x.dtype)
    if not alike or not weight.layout == x.layout == torch.strided or weight.is_neg() or x.is_neg():
        return False
    if x.numel() == 0 or weight.numel() < LEAST_WEIGHTS or not gemm_supported(x.dtype, x.dtype):
        return False
    watched = torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
    if watched or torch.autograd.forward_ad._current_level >= 0 or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is None


class _Product(torch.autograd.Function):
    """``x @ weight.T + bias``, or ``x @ weight + bias`` for a weight (inputs, outputs), as Conv1D keeps its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, inputs_first: bool) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.inputs_first = inputs_first
        factor = weight if inputs_first else weight.t()
        out = x.new_empty(*x.shape[:-1], factor.shape[1])
        gemm(_rows(x), factor, _rows(out))
        if bias is not None:
            out += bias
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = _rows(grad.resolve_neg())
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            factor = weight.t() if ctx.inputs_first else weight
            of_x = grad.new_empty(*grad.shape[:-1], factor.shape[1])
            gemm(rows, factor, _rows(of_x))
        if ctx.needs_input_grad[1]:
            left, right = (_rows(x), rows) if ctx.inputs_first else (rows, _rows(x))
            of_weight = grad.new_empty(left.shape[1], right.shape[1])
            gemm(left.t(), right, of_weight)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
