"""The kernels of the backend "torch": what every operator does on devices for which no kernel was compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from cpo_kernels.kernels.device import adds_to_float32
from cpo_kernels.kernels.numerics import (
    IGNORE_INDEX,
    TILE_ELEMENTS,
    accumulate_dtype,
    accumulate_pair_,
    long_slices,
    narrow_view,
    tile_elements,
)
from cpo_kernels.kernels.transform import transform_logits

from .device import float32_sums, is_host


def token_rows(targets: Tensor, row_starts: Tensor | None) -> Tensor:
    """Return the row of each token (N,) from the prefix counts of tokens per row (R + 1,)."""
    if row_starts is None:
        return torch.arange(targets.numel(), device=targets.device)
    counts = row_starts.diff()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=targets.device), counts)


def row_forward(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Compute the statistics (2, R) of rows, max and log-sum-exp minus max, and each token's log-probability (N,).

    The statistics of rows without a token are undefined.
    """
    rows, present = token_rows(targets, row_starts), targets != IGNORE_INDEX
    x = logits.to(accumulate_dtype(logits.dtype))
    # A row that predicts nothing has gradient 0 even where it holds NaN, which 0 * NaN would not give.
    silent = x.new_zeros(x.shape[0]).index_add_(0, rows, present.to(x.dtype)) == 0
    y = transform_logits(x.masked_fill(silent[:, None], 0.0), bias, logit_scale, softcap, temperature)
    row_max = y.detach().amax(-1)
    log_sum = (y - row_max[:, None]).exp().sum(-1).log()
    logps = y[rows, targets.where(present, 0)] - row_max[rows] - log_sum[rows]
    return torch.stack([row_max, log_sum]), torch.where(present, logps, torch.zeros_like(logps))


def row_backward(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    stats: Tensor,
    coef: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
) -> Tensor:
    """Compute the gradient (R, V) of ``sum_n coef_n * logp_n`` by the raw logits; exactly 0 in rows without tokens."""
    x = logits.to(stats.dtype)
    y = transform_logits(x, bias, logit_scale, softcap, temperature)
    rows, present = token_rows(targets, row_starts), targets != IGNORE_INDEX
    coef = torch.where(present, coef, torch.zeros_like(coef))
    row_coef = x.new_zeros(x.shape[0]).index_add_(0, rows, coef)
    # One-hot terms are summed as row_coef is: for a word of probability 1, their difference is then exactly 0.
    grad = torch.zeros_like(x).index_put_((rows, targets.where(present, 0)), coef, accumulate=True)
    grad = grad - row_coef[:, None] * (y - stats[0][:, None] - stats[1][:, None]).exp()
    if softcap:
        capped = y * temperature / softcap
        grad = grad * (1 - capped * capped)
    grad = grad * (logit_scale / temperature)
    active = x.new_zeros(x.shape[0]).index_add_(0, rows, coef.abs()) != 0
    return torch.where(active[:, None], grad, torch.zeros_like(grad)).to(logits.dtype)


def row_backward_(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    stats: Tensor,
    coef: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    grad_dtype: torch.dtype | None = None,
) -> None:
    """Write :func:`row_backward` over the logits, in ``grad_dtype`` (default: that of the logits)."""
    grad = row_backward(logits, targets, row_starts, stats, coef, bias, logit_scale, softcap, temperature)
    narrow_view(logits, grad_dtype or logits.dtype).copy_(grad)


def column_stats(grad: Tensor) -> Tensor:
    """Return the largest absolute value and the absolute sum of each column: (r, V) -> (2, V).

    A NaN in a column is at least in its sum.
    """
    stats = grad.new_zeros((2, grad.shape[1]), dtype=accumulate_dtype(grad.dtype))
    for tile in long_slices(grad.shape[0], grad.shape[1], tile_elements(grad.device)):
        size = grad[tile].abs().to(stats.dtype)
        torch.maximum(stats[0], size.amax(0), out=stats[0])
        stats[1] += size.sum(0)
    return stats


def take_columns(grad: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return some columns (c,) of some rows (k,) of (r, V), and behind them each row's sum of the rest: (k, c + 1)."""
    whole = grad.index_select(0, rows)
    part = whole.index_select(1, columns)
    dtype = accumulate_dtype(grad.dtype)
    others = whole.sum(1, dtype=dtype) - part.sum(1, dtype=dtype)
    return torch.cat([part, others.to(grad.dtype).unsqueeze(1)], 1)


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """Multiply a tensor by a scalar in place; a factor of 1 costs nothing where reading it waits for no device."""
    if not is_host(factor.device) or float(factor) != 1.0:
        tensor.mul_(factor)


def scale_rows_(grad: Tensor, rows: Tensor | None, targets: Tensor, coef: Tensor) -> None:
    """Multiply the row of ``grad`` (R, H) that each slot has to itself by the slot's coefficient (n,), in place.

    The row becomes exactly 0, whatever it holds, where the coefficient is 0 or the target (n,) is -100. ``rows`` (n,)
    are those of the slots, None if slot n has row n; other rows must be 0.
    """
    coef = coef.masked_fill(targets == IGNORE_INDEX, 0.0)
    per_row = coef if rows is None else coef.new_zeros(grad.shape[0]).index_copy_(0, rows, coef)
    grad.mul_(per_row[:, None]).masked_fill_(per_row[:, None] == 0, 0.0)


def gemm_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Write or add ``a @ b`` to ``out``; (m, k), (k, n), (m, n), multiplied in the widest of their dtypes."""
    if a.dtype == b.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
        return
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), out.dtype)
    if out.dtype == torch.float32 and a.dtype == b.dtype and float32_sums(a.device):
        widening_gemm_(a, b, out, accumulate)
        return
    (m, k), n = a.shape, b.shape[1]
    if not accumulate:
        out.zero_()
    # Tiles run along the longest dimension, so that no converted copy is as large as the whole vocabulary.
    if n == max(m, k, n):
        for tile in long_slices(n, k):
            out[:, tile] += a.to(wide) @ b[:, tile].to(wide)
    elif m == max(m, k, n):
        for tile in long_slices(m, k):
            out[tile] += a[tile].to(wide) @ b.to(wide)
    else:
        for tile in long_slices(k, m + n):
            out += a[:, tile].to(wide) @ b[tile].to(wide)


def widening_gemm_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """Run :func:`gemm_` of half precision into float32 on CUDA: cuBLAS writes and adds its float32 accumulators."""
    if not accumulate:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif adds_to_float32(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        for tile in long_slices(out.shape[0], out.shape[1], 8 * TILE_ELEMENTS):
            out[tile] += torch.mm(a[tile], b, out_dtype=torch.float32)


def gemm_pair_(a: Tensor, b: Tensor, high: Tensor, low: Tensor, accumulate: bool) -> None:
    """Write or add ``a @ b`` to the sum ``high + low``, a tile of rows at a time."""
    wide = torch.promote_types(a.dtype, b.dtype)
    if not accumulate:
        high.zero_()
        low.zero_()
    for tile in long_slices(*high.shape):
        accumulate_pair_(high[tile], low[tile], a[tile].to(wide) @ b.to(wide))
