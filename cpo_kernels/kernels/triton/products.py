"""A tile of hidden (R, H) times weight (V, H), in float32 on the tensor cores, by descriptors or by pointers."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def product_of_blocks(
    hidden, weight, first_row, first_column, H, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Return hidden @ weight.T (BLOCK_R, BLOCK_V), read through descriptors, which give 0 outside the matrices."""
    acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        x = hidden.load([first_row, start])  # (BLOCK_R, BLOCK_H)
        w = weight.load([first_column, start])  # (BLOCK_V, BLOCK_H)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    return acc


@triton.jit
def product_of_pointers(
    hidden,
    weight,
    row,
    column,
    H,
    hidden_strides,
    weight_strides,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN_H: tl.constexpr,
):
    """Return hidden @ weight.T (BLOCK_R, BLOCK_V) for any strides; ``row`` and ``column`` are inside the matrices."""
    unit = tl.arange(0, BLOCK_H)
    x_at = hidden + row[:, None].to(tl.int64) * hidden_strides[0] + unit[None, :] * hidden_strides[1]
    w_at = weight + column[None, :].to(tl.int64) * weight_strides[0] + unit[:, None] * weight_strides[1]
    acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, H, BLOCK_H):
        if EVEN_H:
            x = tl.load(x_at)  # (BLOCK_R, BLOCK_H)
            w = tl.load(w_at)  # (BLOCK_H, BLOCK_V)
        else:
            x = tl.load(x_at, mask=start + unit[None, :] < H, other=0.0)
            w = tl.load(w_at, mask=start + unit[:, None] < H, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_at += BLOCK_H * hidden_strides[1]
        w_at += BLOCK_H * weight_strides[1]
    return acc


def has_descriptor(matrix: Tensor) -> bool:
    """Tell whether Hopper's copy engine can address the matrix: unit columns, rows at multiples of 16 bytes."""
    row_stride, column_stride = matrix.stride()
    size = matrix.element_size()
    aligned = matrix.storage_offset() * size % 16 == 0 and row_stride * size % 16 == 0
    return column_stride == 1 and row_stride >= matrix.shape[1] > 0 and aligned
