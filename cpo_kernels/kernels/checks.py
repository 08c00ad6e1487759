"""Checks of a tensor before a compiled kernel takes its address, and comparisons of the memory of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from . import numerics

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BIAS_DTYPES = (*DTYPE_CODES, torch.float64)  # kernels get it in float32
CPU = torch.device("cpu")


def check(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device = CPU,
) -> None:
    """Raise ``ValueError`` unless a tensor is on the device and has one of the dtypes and the shape.

    None in the shape stands for any size.
    """
    if tensor.device != device:
        expected = "a CPU tensor" if device == CPU else f"a tensor on {device}"
        raise ValueError(f"{name} is on {tensor.device}; expected {expected}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")
    if len(tensor.shape) != len(shape) or any(e not in (None, s) for s, e in zip(tensor.shape, shape, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected ({expected})")


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Tell whether the address ranges of two tensors overlap."""

    def address_range(tensor: Tensor) -> tuple[int, int]:
        begin, last = tensor.data_ptr(), 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            last += (size - 1) * stride
        return begin, begin + (last + 1) * tensor.element_size()

    if x.numel() == 0 or y.numel() == 0:
        return False
    (x_begin, x_end), (y_begin, y_end) = address_range(x), address_range(y)
    return x_begin < y_end and y_begin < x_end


def front_halves(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the front half of each float32 row's memory as an (R, V) tensor of a half-precision dtype."""
    if logits.dtype != torch.float32 or dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"logits have dtype {logits.dtype} and grad_dtype is {dtype}; expected the same dtype, or torch.bfloat16 "
            f"or torch.float16 for torch.float32 logits"
        )
    check("logits", logits, (None, None), (torch.float32,), logits.device)
    if logits.stride(1) != 1:  # even of a single column, which a view of another dtype needs
        raise ValueError(f"logits have strides {logits.stride()}; expected a column stride of 1")
    return numerics.narrow_view(logits.detach(), dtype)
