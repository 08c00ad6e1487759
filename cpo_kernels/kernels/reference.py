"""Section 1 of the design in plain PyTorch: the oracle of every test, and the bodies the operators fall back on.

Everything here is written for reading, in the dtype it is given (float64 included), with dense logits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of every reduction over values stored as ``dtype``: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def transform_logits(
    logits: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Raw head outputs (..., V) to the logits of the softmax: bias, scale, softcap, temperature, in that order."""
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    logits = logits * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def token_logps(logits: Tensor, targets: Tensor, **transform: Any) -> Tensor:
    """Dense log softmax(logits)[target]: (..., V), (...) -> (...); 0 where the target is -100."""
    y = transform_logits(logits.to(accumulate_dtype(logits.dtype)), **transform)
    present = targets != IGNORE_INDEX
    picked = torch.log_softmax(y, -1).gather(-1, targets.where(present, 0).unsqueeze(-1)).squeeze(-1)
    return torch.where(present, picked, torch.zeros_like(picked))


def contrastive_loss(scores: Tensor, ranks: Tensor, present: Tensor) -> Tensor:
    """Loss of one group, by the definition: scores, ranks, present are (C,); returns a scalar.

    ``sum_i [logsumexp({s_i} + {s_j : rank_j > rank_i}) - s_i]`` over the present candidates i that have a strictly
    lower-ranked present candidate (Plackett-Luce with ties left out).
    """
    loss = scores.new_zeros(())
    for i in range(scores.numel()):
        lower = [j for j in range(scores.numel()) if present[j] and ranks[j] > ranks[i]]
        if present[i] and lower:
            loss = loss + torch.logsumexp(scores[[i, *lower]], 0) - scores[i]
    return loss


def cpo_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    ref_logps: Tensor | None = None,
    ranks: Tensor | None = None,
    beta: float = 0.1,
    margin: float = 0.0,
    length_normalized: bool = False,
    contrast_weight: float = 1.0,
    mle_weight: float = 0.0,
    **transform: Any,
) -> Tensor:
    """The whole objective from dense logits: (G, C, T, V), (G, C, T) -> scalar, differentiable."""
    groups, candidates, _ = targets.shape
    present_tokens = targets != IGNORE_INDEX
    lengths = present_tokens.sum(-1)
    sums = token_logps(logits, targets, **transform).sum(-1)
    logps = sums / lengths.clamp(min=1) if length_normalized else sums
    if ranks is None:
        ranks = torch.tensor([0] + [1] * (candidates - 1), device=targets.device).expand(groups, candidates)
    rewards = beta * (logps if ref_logps is None else logps - ref_logps.to(logps.dtype))
    scores = rewards + margin * (ranks > 0).to(logps.dtype)  # a bare bool would round the margin to float32
    contrast = sum(contrastive_loss(scores[g], ranks[g], lengths[g] > 0) for g in range(groups)) / groups
    best = (ranks == 0) & (lengths > 0)
    nll = -(sums * best).sum() / (lengths * best).sum()
    return contrast_weight * contrast + mle_weight * nll


# The bodies of the row operators. Tokens are grouped by row; `row_starts` is their prefix count, or None for one a row.


def token_rows(targets: Tensor, row_starts: Tensor | None) -> Tensor:
    """Row of each token (N,) from the prefix counts of tokens per row (R + 1,)."""
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
    """Statistics (2, R) of the rows (max, log-sum-exp minus max) and the log-probability (N,) of each token.

    The statistics of rows without a token mean nothing.
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
    """Gradient (R, V) of ``sum_n coef_n * logp_n`` with respect to the raw logits; rows without one are exactly 0."""
    x = logits.to(stats.dtype)
    y = transform_logits(x, bias, logit_scale, softcap, temperature)
    rows, present = token_rows(targets, row_starts), targets != IGNORE_INDEX
    coef = torch.where(present, coef, torch.zeros_like(coef))
    row_coef = x.new_zeros(x.shape[0]).index_add_(0, rows, coef)
    # The words of a row first, summed as row_coef is: where one has all the probability, the difference is exactly 0.
    grad = torch.zeros_like(x).index_put_((rows, targets.where(present, 0)), coef, accumulate=True)
    grad = grad - row_coef[:, None] * (y - stats[0][:, None] - stats[1][:, None]).exp()
    if softcap:
        capped = y * temperature / softcap
        grad = grad * (1 - capped * capped)
    grad = grad * (logit_scale / temperature)
    active = x.new_zeros(x.shape[0]).index_add_(0, rows, coef.abs()) != 0
    return torch.where(active[:, None], grad, torch.zeros_like(grad)).to(logits.dtype)


def narrow_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The (R, V) gradient of ``dtype`` at the front of each row of the memory of ``logits`` (R, V)."""
    return logits if dtype == logits.dtype else logits.view(dtype)[:, : logits.shape[1]]


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
    """:func:`row_backward` of ``grad_dtype`` (default: that of the logits), written over the logits."""
    grad = row_backward(logits, targets, row_starts, stats, coef, bias, logit_scale, softcap, temperature)
    narrow_view(logits, grad_dtype or logits.dtype).copy_(grad)


def column_stats(grad: Tensor) -> Tensor:
    """Largest absolute value and absolute sum of each column: (r, V) -> (2, V); NaN is in the sum at least."""
    stats = grad.new_zeros((2, grad.shape[1]), dtype=accumulate_dtype(grad.dtype))
    for tile in long_slices(grad.shape[0], grad.shape[1], tile_elements(grad.device)):
        size = grad[tile].abs().to(stats.dtype)
        torch.maximum(stats[0], size.amax(0), out=stats[0])
        stats[1] += size.sum(0)
    return stats


def take_columns(grad: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(k, c + 1): some columns (c,) of some rows (k,) of (r, V), and behind them the sum of each row's others."""
    whole = grad.index_select(0, rows)
    part = whole.index_select(1, columns)
    dtype = accumulate_dtype(grad.dtype)
    others = whole.sum(1, dtype=dtype) - part.sum(1, dtype=dtype)
    return torch.cat([part, others.to(grad.dtype).unsqueeze(1)], 1)


def scale_(tensor: Tensor, factor: Tensor) -> None:
    """``tensor *= factor``, a scalar; a factor of 1 costs nothing where reading it waits for no device."""
    if factor.device.type != "cpu" or float(factor) != 1.0:
        tensor.mul_(factor)


# Elements of a matrix converted for a product at a time: a tile of that size stays in a shared cache.
TILE_ELEMENTS = 2**21


def tile_elements(device: torch.device) -> int:
    """Elements moved or accumulated at a time: little beside a budget of logits, and much beside a launch."""
    return 2**19 if device.type == "cpu" else 2**22


def long_slices(length: int, width: int, elements: int = TILE_ELEMENTS) -> list[slice]:
    """Slices of a long dimension of a (length, width) matrix, of about so many elements each."""
    step = max(1, elements // max(1, width))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def gemm_(a: Tensor, b: Tensor, out: Tensor, accumulate: bool) -> None:
    """``out[:] = a @ b``, or ``out += a @ b``; (m, k), (k, n), (m, n), multiplied in the widest of their dtypes."""
    if a.dtype == b.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
        return
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), out.dtype)
    if out.dtype == torch.float32 and a.dtype == b.dtype and a.is_cuda and torch.version.hip is None:
        widening_gemm_(a, b, out, accumulate)
        return
    (m, k), n = a.shape, b.shape[1]
    if not accumulate:
        out.zero_()
    # Along the longest dimension, so that no converted copy is as large as the vocabulary's.
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
    """:func:`gemm_` of half precision into float32 on CUDA: cuBLAS writes and adds up its float32 accumulators."""
    if not accumulate:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif adds_to_float32(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        for tile in long_slices(out.shape[0], out.shape[1], 8 * TILE_ELEMENTS):
            out[tile] += torch.mm(a[tile], b, out_dtype=torch.float32)


@cache
def adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of ``dtype`` to float32; its first versions with ``out_dtype`` refuse to."""
    total, one = torch.ones((1, 1), device=device), torch.ones((1, 1), device=device, dtype=dtype)
    try:
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def accumulate_pair_(high: Tensor, low: Tensor, term: Tensor) -> None:
    """Add ``term`` to the sum held as ``high + low``: two tensors of a half-precision dtype, 16 more bits than one.

    ``high`` alone is at all times the sum rounded to its dtype, so it is the result and costs no conversion.
    """
    total = term.float().add_(low).add_(high)
    high.copy_(total)
    low.copy_(total.sub_(high))


def gemm_pair_(a: Tensor, b: Tensor, high: Tensor, low: Tensor, accumulate: bool) -> None:
    """``high + low = a @ b``, or ``+= a @ b``, a tile of rows at a time."""
    wide = torch.promote_types(a.dtype, b.dtype)
    if not accumulate:
        high.zero_()
        low.zero_()
    for tile in long_slices(*high.shape):
        accumulate_pair_(high[tile], low[tile], a[tile].to(wide) @ b.to(wide))


def row_entropy(logits: Tensor, stats: Tensor, bias: Tensor | None, *transform: float) -> Tensor:
    """Entropy (R,) in nats of the softmax of each row, from its statistics (2, R)."""
    parts = []
    for tile in long_slices(*logits.shape):
        log_p = transform_logits(logits[tile].to(stats.dtype), bias, *transform) - stats[:, tile].sum(0)[:, None]
        p = log_p.exp()
        parts.append(-torch.where(p == 0, 0.0, p * log_p).sum(-1))
    return torch.cat(parts) if parts else stats[0]


def row_samples(logits: Tensor, stats: Tensor, uniforms: Tensor, bias: Tensor | None, *transform: float) -> Tensor:
    """K words (R, K) of each row, drawn from its softmax by inverse distribution function at ``uniforms`` (R, K).

    ``uniforms`` are float64 in [0, 1). A word of probability 0 is never drawn, and -100 stands for a row that has no
    distribution (NaN, or nothing but -inf).
    """
    parts = []
    for tile in long_slices(*logits.shape):
        y = transform_logits(logits[tile].to(stats.dtype), bias, *transform)
        parts.append(words_at((y - stats[0, tile, None]).exp_(), uniforms[tile]))
    return torch.cat(parts) if parts else uniforms.long()


def words_at(masses: Tensor, uniforms: Tensor) -> Tensor:
    """Words (R, K) where the running sums of masses (R, V), in float64, pass the shares (R, K) of their totals.

    Looked for among chunks of about sqrt(V) words first: a running sum over all words takes longer than all the rest.
    """
    rows, vocab = masses.shape
    width = 2 ** (vocab.bit_length() // 2)
    chunks = torch.nn.functional.pad(masses, (0, -vocab % width)).view(rows, -1, width)
    below = chunks.sum(-1, dtype=torch.float64).cumsum(-1)
    threshold = under(uniforms * below[:, -1:], below[:, -1:])
    chunk = torch.searchsorted(below, threshold, right=True).clamp_(max=chunks.shape[1] - 1)
    threshold = threshold - torch.where(chunk > 0, below.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    within = chunks[torch.arange(rows, device=masses.device)[:, None], chunk].cumsum(-1, dtype=torch.float64)
    threshold = under(threshold[..., None], within[..., -1:])
    words = chunk * width + torch.searchsorted(within, threshold, right=True).squeeze(-1)
    return words.where(below[:, -1:].isfinite(), IGNORE_INDEX)


def under(values: Tensor, bound: Tensor) -> Tensor:
    """Values below the bound even where rounding has taken them there, so that what lies behind it is not found."""
    return torch.minimum(values, torch.nextafter(bound, torch.zeros_like(bound)))
