"""The unit gradient of rows: one read of a row of logits and one write, before any coefficient is known.

Where all tokens of a row have one target, the gradient is a number times ``(onehot - softmax) * slope``. The forward
writes that over the logits in the pass that reads them; the engine multiplies by the number around the products. A
program makes two passes over a row, the second of which finds it in the L2 cache: so only as many rows are under way at
a time as the cache holds.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpo_kernels.kernels.device import made_current, multiprocessors_and_cache
from cpo_kernels.kernels.numerics import narrow_view
from cpo_kernels.kernels.transform import fold_transform

from . import tuning
from .blocks import IGNORE, contiguous, row_address, row_lead, token_range, vector_size
from .rows import (
    PROGRAMS,
    SMALL,
    row_backward_into,
    row_softmax,
    store_row_gradient,
    store_token_logps,
    store_zero_row,
    target_bounds,
    target_logits,
)
from .transform import exp

# The share of the L2 cache that rows may fill between their two passes: what is written passes through the rest.
CACHE_SHARE = 0.7


@triton.jit(do_not_specialize=["misaligned", "R"], do_not_specialize_on_alignment=SMALL)
def unit_forward_kernel(
    out,  # (R, V), alike ALIKE from `misaligned` elements on
    logits,  # (R, V) from `misaligned` elements on
    targets,  # (N,)
    row_starts,  # (R + 1,) or None
    bias,  # (V,) or None
    row_maxes,  # (R,)
    log_sums,  # (R,)
    logps,  # (N,)
    R,
    V,
    out_stride,
    stride,
    misaligned,
    slope,
    mult,
    cap,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    SHIFTED: tl.constexpr,
    ALIKE: tl.constexpr,
    NARROW: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Compute statistics and log-probabilities of rows, and their unit gradients. Grid: any number of programs."""
    for row in range(tl.program_id(0).to(tl.int64), R, tl.num_programs(0)):
        offset = row * stride + misaligned if SHIFTED else row * stride
        boundary, lead = row_lead(offset, V, K, SHIFTED)
        x_row = logits + offset
        out_row = out + (offset if ALIKE else row * out_stride)
        out_lead = out + boundary if ALIKE else out_row + lead
        if SHARED_ROWS:
            begin, end = token_range(row_starts, row, SHARED_ROWS)
            least, target = target_bounds(targets, begin, end, TOKENS)
            present, same = least <= target, least == target
        else:
            # Requested now, so that it arrives during the sum.
            target = tl.load(targets + row)
            y = target_logits(x_row, bias, target, V, mult, cap, HAS_BIAS, SOFTCAP, SCALED)
            present, same = target != IGNORE, target != IGNORE

        row_max = 0.0
        total = 1.0
        if present:
            row_max, total = row_softmax(
                x_row, logits + boundary, lead, bias, V, mult, cap,
                HAS_BIAS, SOFTCAP, SCALED, SHIFTED, K, BLOCK, "evict_last",
            )  # fmt: skip
        log_sum = tl.log(total)
        tl.store(row_maxes + row, row_max)
        tl.store(log_sums + row, log_sum)
        if SHARED_ROWS:
            store_token_logps(
                logps, x_row, targets, row_starts, row, bias, V, row_max, log_sum, mult, cap,
                HAS_BIAS, SOFTCAP, SCALED, TOKENS,
            )  # fmt: skip
        else:
            tl.store(logps + row, tl.where(present, y - row_max - log_sum, 0.0))

        tl.debug_barrier()  # all have read the row before any overwrites it
        if same:
            column = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
            store_row_gradient(
                x_row, logits + boundary, out_row, out_lead, lead, bias, V,
                column, slope, row_max, -slope * exp(-log_sum), mult, cap,
                HAS_BIAS, SOFTCAP, SCALED, SHIFTED, NARROW, K, BLOCK, "evict_first",
            )  # fmt: skip
        elif not present:
            store_zero_row(out_row, out_lead, lead, V, SHIFTED, K, BLOCK)


def rows_under_way(row_bytes: int, multiprocessors: int, cache_bytes: int) -> int:
    """Return how many rows to work on at a time: up to PROGRAMS on a multiprocessor, if the L2 cache holds them."""
    cached = int(CACHE_SHARE * cache_bytes) // row_bytes
    return multiprocessors * min(max(cached // multiprocessors, 1), PROGRAMS)


def unit_forward_(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    grad_dtype: torch.dtype | None = None,
    *,
    programs: int | None = None,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities, and write the unit gradient over the logits of every row of one target.

    That is ``(onehot - softmax) * slope`` for a row whose tokens that count all have the same target, and exact zeros,
    without a read, for a row without such a token. A row of several targets keeps its logits.

    Args:
        logits: (R, V) float32, bfloat16 or float16, of unit column stride and any row stride.
        targets: (N,) int64; one outside [0, V) other than -100 is not read and has log-probability NaN.
        row_starts: (R + 1,) int64, or None for one token a row.
        bias: (V,) of any floating-point dtype, or None.
        logit_scale: factor of the logits and the bias.
        softcap: bound of the scaled logits, 0.0 for none.
        temperature: divisor of the capped logits.
        grad_dtype: dtype of the gradients, at the front of each row; None: that of the logits.
        programs: how many rows are under way at a time; None: what the device's cache holds.
        config: BLOCK, TOKENS, num_warps, num_stages; None: those of the table.

    Returns:
        stats (2, R) float32, maximum and log-sum-exp minus maximum, 0 for rows without a token; logps (N,) float32.
    """
    (R, V), K, device = logits.shape, vector_size(logits), logits.device
    stats = torch.empty((2, R), dtype=torch.float32, device=device)
    logps = torch.empty(targets.shape, dtype=torch.float32, device=device)
    if R == 0:
        return stats, logps
    out = narrow_view(logits, grad_dtype or logits.dtype)
    folded, narrow = fold_transform(logit_scale, softcap, temperature), out.element_size() < logits.element_size()
    to, source = row_address(out), row_address(logits)
    alike = out.dtype == logits.dtype
    # A shifted row's first columns are read last; a narrow gradient would have been written over them by then.
    shifted = source.shifted and not narrow
    programs = programs or rows_under_way(V * logits.element_size(), *multiprocessors_and_cache(device))
    sizes = dict(config or tuning.config("unit_forward", device, V, logits.dtype))
    if row_starts is not None:
        sizes["BLOCK"] //= 2  # passes over the tokens of a row take registers from the passes over its logits
    # So few rows are under way that their programs may have all registers.
    launch = tuning.sharing_registers(device, sizes["num_warps"])
    with made_current(device):
        unit_forward_kernel[(min(R, programs),)](
            to.base if shifted and alike else out, source.base if shifted else logits,
            targets.contiguous(), contiguous(row_starts), contiguous(bias), stats[0], stats[1], logps,
            R, V, to.stride, source.stride, source.misaligned, folded.slope, folded.mult, folded.cap,
            HAS_BIAS=bias is not None, SHARED_ROWS=row_starts is not None, SHIFTED=shifted, ALIKE=alike, NARROW=narrow,
            K=K, **folded.flags, **launch, **sizes,
        )  # fmt: skip
    return stats, logps


def unit_finish_(
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
    *,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """Return what the products multiply each row by, and finish the rows that :func:`unit_forward_` could not.

    A row that holds its unit gradient keeps it, and its number is the sum of its coefs. A row of several targets gets
    ``sum_n coef_n * dlogp_n`` and the number 1. A row all of whose coefs are 0 becomes exact zeros, whatever it holds.

    Args:
        logits: (R, V), as :func:`unit_forward_` left them; other arguments are those that went into it.
        stats: (2, R) float32, from :func:`unit_forward_`.
        coef: (N,) of any floating-point dtype, the derivative of the loss with respect to each log-probability.

    Returns:
        (R,) float32.
    """
    scale = torch.empty(logits.shape[:1], dtype=torch.float32, device=logits.device)
    out = narrow_view(logits, grad_dtype or logits.dtype)
    head = bias, logit_scale, softcap, temperature
    row_backward_into(out, logits, targets, row_starts, stats, coef, *head, scale=scale, config=config)
    return scale
