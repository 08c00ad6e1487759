"""Kernels on finished gradients: the statistics by which columns are filtered, and an upstream gradient's scale."""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpo_kernels.kernels.device import made_current

from . import tuning
from .blocks import IGNORE, contiguous

ROW_BLOCK = 2048  # columns of a hidden vector at a time


@triton.jit
def add_rows(largest, total, grad, row, last_row, column, stride, V, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """Merge ROWS rows of some columns into the columns' maxima and sums of absolute values."""
    n = row + tl.arange(0, ROWS)
    places = grad + n.to(tl.int64)[:, None] * stride + column[None, :]  # (ROWS, BLOCK)
    inside = (n < last_row)[:, None] & (column < V)[None, :]
    g = tl.load(places, mask=inside, other=0.0) if MASKED else tl.load(places)
    size = tl.abs(g.to(tl.float32))
    return tl.maximum(largest, tl.max(size, 0)), total + tl.sum(size, 0)


@triton.jit(do_not_specialize=["R"])
def column_stats_kernel(
    grad,  # (R, V)
    stats,  # (splits, 2, V)
    R,
    V,
    stride,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
):
    """Compute maximum and sum of absolute values over some rows of a block of columns. Grid: (blocks, splits)."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1) * ROWS_PER_PROGRAM
    last = tl.minimum(first + ROWS_PER_PROGRAM, R)
    whole = tl.where((tl.program_id(0) + 1) * BLOCK <= V, (last - first) // ROWS * ROWS, 0)
    largest = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(first, first + whole, ROWS):
        largest, total = add_rows(largest, total, grad, row, last, column, stride, V, ROWS, MASKED=False)
    for row in range(first + whole, last, ROWS):
        largest, total = add_rows(largest, total, grad, row, last, column, stride, V, ROWS, MASKED=True)
    out = stats + tl.program_id(1).to(tl.int64) * 2 * V
    tl.store(out + column, largest, mask=column < V)
    tl.store(out + V + column, total, mask=column < V)


@triton.jit(do_not_specialize=["splits"])
def merge_column_stats_kernel(parts, stats, splits, V, BLOCK: tl.constexpr):
    """Merge statistics (splits, 2, V) into (2, V), in the order of the splits. Grid: (blocks,)."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, splits):
        largest = tl.maximum(largest, tl.load(parts + column, mask=column < V, other=0.0))
        total += tl.load(parts + V + column, mask=column < V, other=0.0)
        parts += 2 * V
    tl.store(stats + column, largest, mask=column < V)
    tl.store(stats + V + column, total, mask=column < V)


def column_stats(grad: Tensor, *, config: Mapping[str, int] | None = None) -> Tensor:
    """Return the largest absolute value and the sum of absolute values of each column, in one read.

    Args:
        grad: (r, V) float32, bfloat16 or float16, of unit column stride and any row stride.
        config: BLOCK (columns), ROWS, ROWS_PER_PROGRAM, num_warps, num_stages; None: those of the table.

    Returns:
        (2, V) float32: maxima, sums. A NaN in a column is in its sum; whether it is in its maximum is left open.
    """
    r, V = grad.shape
    if r == 0:
        return torch.zeros((2, V), dtype=torch.float32, device=grad.device)
    sizes = config or tuning.config("column_stats", grad.device, V, grad.dtype)
    splits = triton.cdiv(r, sizes["ROWS_PER_PROGRAM"])
    blocks = triton.cdiv(V, sizes["BLOCK"])
    parts = torch.empty((splits, 2, V), dtype=torch.float32, device=grad.device)
    with made_current(grad.device):
        column_stats_kernel[(blocks, splits)](grad, parts, r, V, grad.stride(0), **sizes, **tuning.LAUNCH)
        if splits == 1:
            return parts[0]
        stats = torch.empty((2, V), dtype=torch.float32, device=grad.device)
        merge_column_stats_kernel[(blocks,)](parts, stats, splits, V, BLOCK=sizes["BLOCK"], **tuning.LAUNCH)
    return stats


@triton.jit(do_not_specialize_on_alignment=["rows", "targets", "coef"])
def scale_rows_kernel(grad, rows, targets, coef, stride, H, BLOCK: tl.constexpr):
    """Multiply the row of a slot by its coefficient; where that is 0, write zeros. Grid: (slots,)."""
    slot = tl.program_id(0).to(tl.int64)
    row = slot
    if rows is not None:
        row = tl.load(rows + slot)
    c = tl.load(coef + slot).to(tl.float32)
    c = tl.where(tl.load(targets + slot) == IGNORE, 0.0, c)
    for start in range(0, H, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(grad + row * stride + column, mask=column < H, other=0.0).to(tl.float32)
        y = tl.where(c == 0.0, 0.0, x * c)
        tl.store(grad + row * stride + column, y.to(grad.dtype.element_ty), mask=column < H)


def scale_rows_(grad: Tensor, rows: Tensor | None, targets: Tensor, coef: Tensor) -> None:
    """Run :func:`cpo_kernels.kernels.plain.scale_rows_` in one launch.

    Args:
        grad: (R, H) of a floating-point dtype up to float32 and unit column stride.
        rows: (n,) int64, different from each other, or None.
        targets: (n,) int64.
        coef: (n,) of any floating-point dtype.
    """
    H = grad.shape[1]
    if targets.numel() == 0:
        return
    with made_current(grad.device):
        scale_rows_kernel[(targets.numel(),)](
            grad,
            contiguous(rows),
            targets.contiguous(),
            coef.contiguous(),
            grad.stride(0),
            H,
            BLOCK=min(triton.next_power_of_2(H), ROW_BLOCK),
            num_warps=4,
            **tuning.LAUNCH,
        )


@triton.jit
def scale_kernel(tensor, factor, size, gain, BLOCK: tl.constexpr):
    """Multiply by ``factor / gain``; where that is 1, only the factor is read. Grid: any number of programs."""
    scale = tl.div_rn(tl.load(factor).to(tl.float32), gain)
    if scale != 1.0:
        whole = size // BLOCK * BLOCK
        first = tl.program_id(0).to(tl.int64) * BLOCK
        step = tl.num_programs(0) * BLOCK
        for start in range(first, whole, step):
            places = tensor + start + tl.arange(0, BLOCK)
            tl.store(places, (tl.load(places).to(tl.float32) * scale).to(tensor.dtype.element_ty))
        if tl.program_id(0) == 0:
            rest = whole + tl.arange(0, BLOCK)
            x = tl.load(tensor + rest, mask=rest < size, other=0.0).to(tl.float32)
            tl.store(tensor + rest, (x * scale).to(tensor.dtype.element_ty), mask=rest < size)


def scale_(tensor: Tensor, factor: Tensor, gain: float = 1.0, *, config: Mapping[str, int] | None = None) -> None:
    """Multiply a tensor by ``factor / gain`` in place, in float32, rounded once; no traffic where that is 1.

    Args:
        tensor: contiguous, of a floating-point dtype up to float32.
        factor: one element of any floating-point dtype, on the same device; the host does not read it.
        gain: what the tensor has been multiplied by before.
        config: BLOCK, PROGRAMS, num_warps, num_stages; None: those of the table.
    """
    size = tensor.numel()
    if size == 0:
        return
    sizes = dict(config or tuning.config("scale", tensor.device, size, tensor.dtype))
    programs = min(sizes.pop("PROGRAMS"), triton.cdiv(size, sizes["BLOCK"]))
    with made_current(tensor.device):
        scale_kernel[(programs,)](tensor, factor, size, gain, **sizes, **tuning.LAUNCH)
