"""Entropies, their gradients and samples of rows of logits, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpo_kernels.kernels.numerics import IGNORE_INDEX, long_slices, narrow_view, tile_elements

from .device import is_host
from .transform import transform_logits

# Float32 tiles that are held at once, of as many numbers as are converted at a time.
TILES = 6


def scratch_bytes(rows: int, vocab: int, device: torch.device) -> int:
    """Count the bytes that entropies and samples of logits (R, V) take besides them."""
    return 4 * TILES * min(max(tile_elements(device), vocab), rows * vocab)


def elements_within(scratch: int, device: torch.device) -> int:
    """Return how many elements of logits to take at a time, so that ``scratch`` bytes suffice if they do for a row."""
    return min(tile_elements(device), scratch // (4 * TILES))


def row_entropy(
    logits: Tensor, stats: Tensor, bias: Tensor | None, *transform: float, elements: int | None = None
) -> Tensor:
    """Return the entropy (R,) in nats of the softmax of each row, from the row statistics (2, R).

    So many ``elements`` of logits are taken at a time, at least a row; None: as many as suit the device.
    """
    parts = []
    for tile in long_slices(logits.shape[0], logits.shape[1], elements or tile_elements(logits.device)):
        y = transform_logits(logits[tile].to(stats.dtype), bias, *transform)
        # The maximum is subtracted first: added to it, the small logarithm would be rounded to the size of the logits.
        log_p = (y - stats[0, tile, None]).sub_(stats[1, tile, None])
        p = log_p.exp()
        parts.append(-p.mul_(log_p.masked_fill_(p == 0, 0.0)).sum(-1))
    return torch.cat(parts) if parts else stats[0]


def row_entropy_backward_(
    logits: Tensor,
    targets: Tensor,
    stats: Tensor,
    coef: Tensor,
    entropy: Tensor,
    entropy_coef: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    temperature: float,
    grad_dtype: torch.dtype | None = None,
    *,
    elements: int | None = None,
) -> None:
    """Write the gradient of ``sum_r coef_r * logp_r + entropy_coef_r * H_r`` over the logits (R, V), in ``grad_dtype``.

    With p the softmax of the transformed logits y, dlogp/dy = onehot - p and dH/dy = -p * (log p + H). A row is exactly
    0 where both coefficients are, whatever it holds.

    Args:
        logits: (R, V), raw.
        targets: (R,) columns of ``logits``; -100 where the target is another process's word: no one-hot term.
        stats: (2, R), of the whole vocabulary, in the dtype of the computation.
        coef: (R,), in the dtype of the statistics.
        entropy: (R,), H of the whole vocabulary.
        entropy_coef: (R,), in the dtype of the statistics.
        bias: (V,) or None.
        logit_scale: as in :class:`cpo_kernels.options.Head`, like softcap and temperature.
        softcap: 0 for none.
        temperature: as in :class:`cpo_kernels.options.Head`.
        grad_dtype: of the gradient, no wider than the logits; None: that of the logits.
        elements: as for :func:`row_entropy`.
    """
    grad = narrow_view(logits, grad_dtype or logits.dtype)
    silent = (coef == 0) & (entropy_coef == 0)
    own = coef.where(targets != IGNORE_INDEX, 0.0)
    columns = targets.where(targets != IGNORE_INDEX, 0)
    for tile in long_slices(logits.shape[0], logits.shape[1], elements or tile_elements(logits.device)):
        y = transform_logits(logits[tile].to(stats.dtype), bias, logit_scale, softcap, temperature)
        dy = (y - stats[0, tile, None]).sub_(stats[1, tile, None])  # log p
        p = dy.exp()
        dy.masked_fill_(p == 0, 0.0).add_(entropy[tile, None]).mul_(entropy_coef[tile, None]).add_(coef[tile, None])
        dy.mul_(p).neg_()
        dy.scatter_add_(1, columns[tile, None], own[tile, None])
        if softcap:
            dy.mul_(1 - (y * (temperature / softcap)) ** 2)
        dy.mul_(logit_scale / temperature).masked_fill_(silent[tile, None], 0.0)
        grad[tile].copy_(dy)


def row_samples(
    logits: Tensor,
    stats: Tensor,
    uniforms: Tensor,
    wanted: Tensor | None,
    bias: Tensor | None,
    *transform: float,
    elements: int | None = None,
) -> Tensor:
    """Draw K words (R, K) of each row from its softmax, by inverse distribution function at ``uniforms`` (R, K).

    ``uniforms`` are float64 in [0, 1). A word of probability 0 is never drawn, and -100 stands for a row that has no
    distribution (NaN, or nothing but -inf), and for a sample that ``wanted`` (R, K) bool, where given, leaves out.
    ``elements`` is as for :func:`row_entropy`.
    """
    samples = torch.full_like(uniforms, IGNORE_INDEX, dtype=torch.int64)
    for tile in row_tiles(logits, wanted, elements or tile_elements(logits.device)):
        y = transform_logits(logits[tile].to(stats.dtype), bias, *transform)
        samples[tile] = words_at((y - stats[0, tile, None]).exp_(), uniforms[tile])
    return samples if wanted is None else samples.masked_fill_(~wanted, IGNORE_INDEX)


def row_tiles(logits: Tensor, wanted: Tensor | None, elements: int) -> list[Any]:
    """Return the rows to draw from, some at a time; on a host, which waits for nothing, those that want a sample."""
    if wanted is None or not is_host(logits.device):
        return long_slices(logits.shape[0], logits.shape[1], elements)
    rows = wanted.any(1).nonzero().squeeze(1)
    return [rows[tile] for tile in long_slices(len(rows), logits.shape[1], elements)]


def words_at(masses: Tensor, uniforms: Tensor) -> Tensor:
    """Find the words (R, K) where float64 running sums of masses (R, V) pass shares (R, K) of their totals.

    The search is first among chunks of about sqrt(V) words: a running sum over all words would take most of the time.
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
    """Return the values, those that rounding has taken to the bound moved just below it.

    A search for them then finds nothing that lies behind the bound.
    """
    return torch.minimum(values, torch.nextafter(bound, torch.zeros_like(bound)))
