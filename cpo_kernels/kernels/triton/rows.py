"""Row kernels: one read of a row of logits gives its log-probabilities; one read and one write, its gradient.

A program owns a row; programs share nothing: no atomics, the same bits in every run.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpo_kernels.kernels.device import made_current
from cpo_kernels.kernels.numerics import narrow_view
from cpo_kernels.kernels.transform import fold_transform

from . import tuning
from .blocks import (
    IGNORE,
    any_present,
    block_places,
    contiguous,
    load_bias,
    load_coefs,
    row_address,
    row_lead,
    sum_coefs,
    token_range,
    vector_size,
    wrap,
)
from .transform import exp, transform, transform_slope

# Tensors with one number a row or a token: their slices begin anywhere, which must not compile another kernel.
SMALL = ["targets", "row_starts", "row_maxes", "log_sums", "logps", "coef", "scratch", "scale"]
PROGRAMS = 3  # on a multiprocessor: enough loads under way to keep its memory busy
FIRST, LAST = tl.constexpr(-(2**63)), tl.constexpr(2**63 - 1)  # of all targets
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite, so that LOWEST - LOWEST and -inf - LOWEST are no NaN


@triton.jit
def online_softmax(running_max, running_sum, y):
    """Merge a block (lanes, K) into each lane's maximum and sum of exp(y - maximum).

    It takes one exp for each element and one for each lane.
    """
    new_max = tl.maximum(running_max, tl.max(y, 1))
    running_sum = running_sum * exp(running_max - new_max) + tl.sum(exp(y - new_max[:, None]), 1)
    return new_max, running_sum


@triton.jit
def load_targets(x_row, bias, target, V, HAS_BIAS: tl.constexpr):
    """Return raw logits and bias of targets (any shape), 0 for targets outside [0, V), and which targets are inside."""
    inside = (target >= 0) & (target < V)
    x = tl.load(x_row + target, mask=inside, other=0.0).to(tl.float32)
    return x, load_bias(bias, target, inside, HAS_BIAS), inside


@triton.jit
def target_logits(
    x_row, bias, target, V, mult, cap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr
):
    """Return the logits of targets (any shape); NaN for a target outside [0, V)."""
    x, b, inside = load_targets(x_row, bias, target, V, HAS_BIAS)
    return tl.where(inside, transform(x, b, mult, cap, HAS_BIAS, SOFTCAP, SCALED), float("nan"))


@triton.jit
def row_softmax(
    x_row, x_lead, lead, bias, V, mult, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr,
    SHIFTED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Return the maximum of a row and its sum of exp(y - maximum); EVICTION is what the cache does with the row."""
    running_max = tl.full([BLOCK // K], LOWEST, tl.float32)
    running_sum = tl.zeros([BLOCK // K], tl.float32)
    whole = tl.maximum(V - lead, 0) // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        place = block_places(start, K, BLOCK)
        x = tl.load(x_lead + place, eviction_policy=EVICTION).to(tl.float32)
        b = load_bias(bias, lead + place, None, HAS_BIAS)
        y = transform(x, b, mult, cap, HAS_BIAS, SOFTCAP, SCALED)
        running_max, running_sum = online_softmax(running_max, running_sum, y)
    for start in range(whole, V, BLOCK):
        place = block_places(start, K, BLOCK)
        column, inside = wrap(lead + place, V, SHIFTED), place < V
        x = tl.load(x_row + column, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)
        y = transform(x, load_bias(bias, column, inside, HAS_BIAS), mult, cap, HAS_BIAS, SOFTCAP, SCALED)
        running_max, running_sum = online_softmax(running_max, running_sum, tl.where(inside, y, float("-inf")))
    row_max = tl.max(running_max, 0)
    return row_max, tl.sum(running_sum * exp(running_max - row_max), 0)


@triton.jit
def store_token_logps(
    logps, x_row, targets, row_starts, row, bias, V, row_max, log_sum, mult, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write the log-probabilities of the tokens of a row that may have several; 0 for a target of -100."""
    begin, end = token_range(row_starts, row, True)  # loaded again: kept so long they would spill
    for first in range(begin, end, TOKENS):
        n = first + tl.arange(0, TOKENS)
        target = tl.load(targets + n, mask=n < end, other=IGNORE)
        y = target_logits(x_row, bias, target, V, mult, cap, HAS_BIAS, SOFTCAP, SCALED)
        tl.store(logps + n, tl.where(target == IGNORE, 0.0, y - row_max - log_sum), mask=n < end)


@triton.jit(do_not_specialize=["misaligned"], do_not_specialize_on_alignment=SMALL)
def row_forward_kernel(
    logits,  # (R, V) from `misaligned` elements on
    targets,  # (N,)
    row_starts,  # (R + 1,) or None
    bias,  # (V,) or None
    row_maxes,  # (R,)
    log_sums,  # (R,)
    logps,  # (N,)
    V,
    stride,
    misaligned,
    mult,
    cap,
    HAS_BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    SHIFTED: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Compute the statistics of a row and the log-probabilities of its tokens. Grid: (R,)."""
    row = tl.program_id(0).to(tl.int64)
    offset = row * stride + misaligned if SHIFTED else row * stride
    boundary, lead = row_lead(offset, V, K, SHIFTED)
    x_row = logits + offset
    begin, end = token_range(row_starts, row, SHARED_ROWS)
    if SHARED_ROWS:
        present = any_present(targets, begin, end, TOKENS)
    else:
        # Requested now, so that it arrives during the sum.
        target = tl.load(targets + row)
        y = target_logits(x_row, bias, target, V, mult, cap, HAS_BIAS, SOFTCAP, SCALED)
        present = target != IGNORE

    row_max = 0.0
    total = 1.0
    if present:
        row_max, total = row_softmax(
            x_row, logits + boundary, lead, bias, V, mult, cap, HAS_BIAS, SOFTCAP, SCALED, SHIFTED, K, BLOCK, ""
        )
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


def row_forward(
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    *,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run :func:`cpo_kernels.kernels.ops.row_forward` in one read of the logits; rows without a token are not read.

    Args:
        logits: (R, V) float32, bfloat16 or float16, of unit column stride and any row stride.
        targets: (N,) int64; one outside [0, V) other than -100 is not read and has log-probability NaN.
        row_starts: (R + 1,) int64, or None for one token a row.
        bias: (V,) of any floating-point dtype, or None.
        logit_scale: factor of the logits and the bias.
        softcap: bound of the scaled logits, 0.0 for none.
        temperature: divisor of the capped logits.
        config: BLOCK, TOKENS, num_warps, num_stages; None: those of the table.

    Returns:
        stats (2, R) float32, maximum and log-sum-exp minus maximum, 0 for rows without a token; logps (N,) float32.
    """
    (R, V), K = logits.shape, vector_size(logits)
    stats = torch.empty((2, R), dtype=torch.float32, device=logits.device)
    logps = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    if R == 0:
        return stats, logps
    folded = fold_transform(logit_scale, softcap, temperature)
    address = row_address(logits)
    with made_current(logits.device):
        row_forward_kernel[(R,)](
            address.base, targets.contiguous(), contiguous(row_starts), contiguous(bias), stats[0], stats[1], logps,
            V, address.stride, address.misaligned, folded.mult, folded.cap,
            HAS_BIAS=bias is not None, SHARED_ROWS=row_starts is not None, SHIFTED=address.shifted, K=K, **folded.flags,
            **tuning.LAUNCH, **(config or tuning.config("row_forward", logits.device, V, logits.dtype)),
        )  # fmt: skip
    return stats, logps


@triton.jit
def token_gradients(
    x_row, targets, coef, scratch, bias, begin, end, V, row_max, inverse_sum, slope, mult, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write the gradient at each token's own column to ``scratch``; tokens of equal targets get the same bits.

    It is ``own * (1 - p) - others * p``, exactly 0 where all tokens have the same target and its probability p is 1.
    """
    for first in range(begin, end, TOKENS):
        n = first + tl.arange(0, TOKENS)
        target = tl.load(targets + n, mask=n < end, other=IGNORE)
        own = tl.zeros([TOKENS, TOKENS], tl.float32)
        others = tl.zeros([TOKENS, TOKENS], tl.float32)
        for second in range(begin, end, TOKENS):
            m = second + tl.arange(0, TOKENS)
            equal = target[:, None] == tl.load(targets + m, mask=m < end, other=IGNORE)[None, :]
            c = load_coefs(targets, coef, m, m < end)[None, :]
            own += tl.where(equal, c, 0.0)
            others += tl.where(equal, 0.0, c)
        x, b, inside = load_targets(x_row, bias, target, V, HAS_BIAS)
        p = exp(transform(x, b, mult, cap, HAS_BIAS, SOFTCAP, SCALED) - row_max) * inverse_sum
        grad = (tl.sum(own, 1) * (1.0 - p) - tl.sum(others, 1) * p) * slope
        grad *= transform_slope(x, b, mult, HAS_BIAS, SOFTCAP, SCALED)
        tl.store(scratch + n, grad, mask=inside)


@triton.jit
def store_token_gradients(out_row, targets, scratch, begin, end, V, TOKENS: tl.constexpr):
    """Copy what :func:`token_gradients` wrote to the columns of the targets."""
    for first in range(begin, end, TOKENS):
        n = first + tl.arange(0, TOKENS)
        target = tl.load(targets + n, mask=n < end, other=IGNORE)
        inside = (target >= 0) & (target < V)
        grad = tl.load(scratch + n, mask=inside, other=0.0)
        tl.store(out_row + target, grad.to(out_row.dtype.element_ty), mask=inside)


@triton.jit
def logit_gradient(
    x, bias, hit, row_max, factor, mult, cap, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr
):
    """Return ``(hit + factor * exp(y - row_max)) * slope`` of some columns, ``hit`` being what a target adds."""
    y = transform(x, bias, mult, cap, HAS_BIAS, SOFTCAP, SCALED)
    return (hit + factor * exp(y - row_max)) * transform_slope(x, bias, mult, HAS_BIAS, SOFTCAP, SCALED)


@triton.jit
def store_row_gradient(
    x_row, x_lead, out_row, out_lead, lead, bias, V, target, hit, row_max, factor, mult, cap,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr,
    SHIFTED: tl.constexpr, NARROW: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a row: ``hit`` at the column ``target``, and the softmax everywhere.

    Where NARROW, the gradient lies over its own logits: block b is written over bytes of blocks up to b, never of later
    ones. A barrier between the loads and the stores of each block keeps a warp from overwriting another's input.
    """
    dtype: tl.constexpr = out_row.dtype.element_ty
    whole = tl.maximum(V - lead, 0) // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        place = block_places(start, K, BLOCK)
        x = tl.load(x_lead + place, eviction_policy=EVICTION).to(tl.float32)
        b = load_bias(bias, lead + place, None, HAS_BIAS)
        hits = tl.where(lead + place == target, hit, 0.0)
        grad = logit_gradient(x, b, hits, row_max, factor, mult, cap, HAS_BIAS, SOFTCAP, SCALED)
        if NARROW:
            tl.debug_barrier()
        tl.store(out_lead + place, grad.to(dtype))
    for start in range(whole, V, BLOCK):
        place = block_places(start, K, BLOCK)
        column, inside = wrap(lead + place, V, SHIFTED), place < V
        x = tl.load(x_row + column, mask=inside, other=0.0, eviction_policy=EVICTION).to(tl.float32)
        b = load_bias(bias, column, inside, HAS_BIAS)
        hits = tl.where(column == target, hit, 0.0)
        grad = logit_gradient(x, b, hits, row_max, factor, mult, cap, HAS_BIAS, SOFTCAP, SCALED)
        if NARROW:
            tl.debug_barrier()
        tl.store(out_row + column, grad.to(dtype), mask=inside)


@triton.jit
def store_zero_row(
    out_row, out_lead, lead, V, SHIFTED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write zeros to a row whose logits need not be read."""
    zeros = tl.zeros([BLOCK // K, K], out_row.dtype.element_ty)
    whole = tl.maximum(V - lead, 0) // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        tl.store(out_lead + block_places(start, K, BLOCK), zeros)
    for start in range(whole, V, BLOCK):
        place = block_places(start, K, BLOCK)
        tl.store(out_row + wrap(lead + place, V, SHIFTED), zeros, mask=place < V)


@triton.jit
def target_bounds(targets, begin, end, TOKENS: tl.constexpr):
    """Return the least and the greatest target of a row's tokens that count; LAST and FIRST where none counts."""
    least = tl.full([TOKENS], LAST, tl.int64)
    greatest = tl.full([TOKENS], FIRST, tl.int64)
    for first in range(begin, end, TOKENS):
        n = first + tl.arange(0, TOKENS)
        target = tl.load(targets + n, mask=n < end, other=IGNORE)
        least = tl.minimum(least, tl.where(target == IGNORE, LAST, target))
        greatest = tl.maximum(greatest, tl.where(target == IGNORE, FIRST, target))
    return tl.min(least, 0), tl.max(greatest, 0)


@triton.jit(do_not_specialize=["misaligned"], do_not_specialize_on_alignment=SMALL)
def row_backward_kernel(
    out,  # (R, V), alike ALIKE from `misaligned` elements on
    logits,  # (R, V) from `misaligned` elements on
    targets,  # (N,)
    row_starts,  # (R + 1,) or None
    row_maxes,  # (R,)
    log_sums,  # (R,)
    coef,  # (N,)
    scratch,  # (N,) or None for one token a row
    scale,  # (R,) out: what the products multiply each row by; None where no row holds its unit gradient
    bias,  # (V,) or None
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
    """Compute the gradient of a row of raw logits, rounded once. Grid: (R,)."""
    # The last rows first: the forward left them in the L2 cache, and the products that follow begin at the first rows.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    offset = row * stride + misaligned if SHIFTED else row * stride
    boundary, lead = row_lead(offset, V, K, SHIFTED)
    x_row = logits + offset
    # If logits and gradient are laid out alike, the compiler sees from `boundary` alone that both are aligned.
    out_row = out + (offset if ALIKE else row * out_stride)
    out_lead = out + boundary if ALIKE else out_row + lead
    begin, end = token_range(row_starts, row, SHARED_ROWS)
    if SHARED_ROWS:
        row_coef, active = sum_coefs(targets, coef, begin, end, TOKENS)
    else:
        row_coef = load_coefs(targets, coef, row, row < end)
        active = row_coef != 0.0
    missing = active
    if scale is not None:
        held = True
        if SHARED_ROWS:
            least, greatest = target_bounds(targets, begin, end, TOKENS)
            held = least >= greatest
        tl.store(scale + row, tl.where(held, row_coef, active.to(tl.float32)))
        missing = active & (not held)

    if missing:
        row_max = tl.load(row_maxes + row)
        inverse_sum = exp(-tl.load(log_sums + row))
        target = -1  # none: a row of several tokens gets theirs after the pass over it
        hit = 0.0
        if SHARED_ROWS:
            token_gradients(
                x_row, targets, coef, scratch, bias, begin, end, V, row_max, inverse_sum, slope, mult, cap,
                HAS_BIAS, SOFTCAP, SCALED, TOKENS,
            )  # fmt: skip
            tl.debug_barrier()  # the logits of the targets are read before any is overwritten
        else:
            wide = tl.load(targets + row)
            target = tl.where((wide >= 0) & (wide < V), wide, -1).to(tl.int32)
            hit = row_coef * slope
        store_row_gradient(
            x_row, logits + boundary, out_row, out_lead, lead, bias, V,
            target, hit, row_max, -row_coef * slope * inverse_sum, mult, cap,
            HAS_BIAS, SOFTCAP, SCALED, SHIFTED, NARROW, K, BLOCK, "",
        )  # fmt: skip
        if SHARED_ROWS:
            tl.debug_barrier()  # what other threads wrote to these columns comes first
            begin, end = token_range(row_starts, row, SHARED_ROWS)  # loaded again: kept so long they would spill
            store_token_gradients(out_row, targets, scratch, begin, end, V, TOKENS)
    elif not active:
        store_zero_row(out_row, out_lead, lead, V, SHIFTED, K, BLOCK)


def row_backward_into(
    out: Tensor,
    logits: Tensor,
    targets: Tensor,
    row_starts: Tensor | None,
    stats: Tensor,
    coef: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    *,
    scale: Tensor | None = None,
    config: Mapping[str, int] | None = None,
) -> None:
    """Run :func:`cpo_kernels.kernels.ops.row_backward` into ``out``, rounded once to its dtype.

    Rows whose tokens all have a coef of 0, and tokens of target -100 whatever their coef, give exact zeros and cost no
    read of the logits.

    Args:
        out: (R, V) of unit column stride: apart from the logits; or the logits themselves; or a narrower dtype over
            them, as :func:`cpo_kernels.kernels.numerics.narrow_view` gives it.
        logits: (R, V), as they went into :func:`row_forward`; so too targets, row_starts, bias and what follows it.
        targets: (N,) int64; one outside [0, V) is not written to.
        row_starts: (R + 1,) int64, or None for one token a row.
        stats: (2, R) float32, from :func:`row_forward`.
        coef: (N,) of any floating-point dtype, the derivative of the loss with respect to each log-probability.
        bias: (V,) or None.
        logit_scale: factor of the logits and the bias.
        softcap: bound of the scaled logits, 0.0 for none.
        temperature: divisor of the capped logits.
        scale: (R,) float32, written where ``out`` comes from :func:`~.unit.unit_forward_`: a row that holds its unit
            gradient is left as it is, unless its coefs are all 0, and has the sum of its coefs here; another row has 1.
        config: BLOCK, TOKENS, num_warps, num_stages; None: those of the table.
    """
    (R, V), K = logits.shape, vector_size(logits)
    if R == 0:
        return
    folded = fold_transform(logit_scale, softcap, temperature)
    narrow = out.element_size() < logits.element_size()
    to, source = row_address(out), row_address(logits)
    alike = out.dtype == logits.dtype and to[1:] == source[1:]
    # A shifted row's first columns are read last; a narrow gradient would have been written over them by then.
    shifted = source.shifted and not narrow
    shared = row_starts is not None
    scratch = torch.empty(coef.shape, dtype=torch.float32, device=logits.device) if shared else None
    sizes = config or tuning.config("row_backward", logits.device, V, logits.dtype)
    # Passes over several tokens of a row must not take registers from the pass over its logits.
    launch = tuning.sharing_registers(logits.device, sizes["num_warps"], PROGRAMS) if shared else tuning.LAUNCH
    with made_current(logits.device):
        row_backward_kernel[(R,)](
            to.base if shifted and alike else out, source.base if shifted else logits,
            targets.contiguous(), contiguous(row_starts),
            stats[0], stats[1], coef.contiguous(), scratch, scale, contiguous(bias),
            V, to.stride, source.stride, source.misaligned, folded.slope, folded.mult, folded.cap,
            HAS_BIAS=bias is not None, SHARED_ROWS=shared, SHIFTED=shifted, ALIKE=alike, NARROW=narrow, K=K,
            **folded.flags, **launch, **sizes,
        )  # fmt: skip


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
    *,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """Run :func:`row_backward_into` into a new (R, V) tensor of the logits' dtype."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    head = bias, logit_scale, softcap, temperature
    row_backward_into(grad, logits, targets, row_starts, stats, coef, *head, config=config)
    return grad


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
    *,
    config: Mapping[str, int] | None = None,
) -> None:
    """Run :func:`row_backward_into` into the logits themselves, or into their narrow view of ``grad_dtype``."""
    out = narrow_view(logits, grad_dtype or logits.dtype)
    head = bias, logit_scale, softcap, temperature
    row_backward_into(out, logits, targets, row_starts, stats, coef, *head, config=config)
