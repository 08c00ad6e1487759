"""Losses of pairs of sequences, the first half of a batch chosen and the second rejected, as Liger returns them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from cpo_kernels.functional import linear_sequence_logps, linear_sequence_loss
from cpo_kernels.integrations.logit_sums import mean_logits
from cpo_kernels.integrations.targets import without_ignored
from cpo_kernels.kernels.numerics import IGNORE_INDEX
from cpo_kernels.layout import CandidateLayout

Output = tuple[Tensor, tuple[Tensor, ...]]


class Settings(Protocol):
    """The settings that the loss modules share, by Liger's names."""

    ignore_index: int
    beta: float
    alpha: float
    compute_nll_loss: bool
    average_log_prob: bool


def run_pairs(
    settings: Settings,
    losses: Callable[[Tensor, Tensor], Tensor],
    weight: Tensor,
    _input: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ref: tuple[Tensor, Tensor, Tensor | None] | None = None,
    nll_target: Tensor | None = None,
) -> Output:
    """Compute the mean of ``losses`` over pairs and ``alpha`` times the NLL, with Liger's other outputs.

    Args:
        settings: the loss module.
        losses: maps log-likelihoods (b,) of chosen and of rejected sequences, less the reference's, to losses (b,).
        weight: (V, H).
        _input: (2B, T, H), the B chosen sequences and then the B rejected ones.
        target: (2B, T) integers, aligned with _input.
        bias: (V,) or None.
        ref: ref_input, ref_weight and ref_bias, or None.
        nll_target: (2B, T) integers, the targets of the NLL if they are not ``target``, or None.

    Returns:
        The loss, a scalar, and a tuple without gradients: log-likelihoods (B,) of the chosen and of the rejected
        sequences, the mean logit of either (over all T positions and the vocabulary, ignored positions too, as in
        Liger), the NLL per chosen token (0 with ``compute_nll_loss=False``), and the rewards
        ``beta * (logp - ref_logp)`` (B,) of either. All are float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, an odd number of sequences, or a -100 that is not the ``ignore_index``.
    """
    pairs = count_pairs(_input, target)
    targets = by_pairs(without_ignored(target, settings.ignore_index), pairs)
    lengths = (targets != IGNORE_INDEX).sum(-1)
    ref_logps = torch.zeros(lengths.shape, device=_input.device)
    if ref is not None:
        with torch.no_grad():
            ref_logps = linear_sequence_logps(by_pairs(ref[0], pairs), ref[1], targets, bias=ref[2])
    if ref is not None and settings.average_log_prob:
        ref_logps = ref_logps / lengths
    nll_weight = settings.alpha if settings.compute_nll_loss else 0.0
    nll_targets, nll_column = None, 0
    if nll_target is not None and settings.compute_nll_loss:
        nll_targets, nll_column = chosen_targets(nll_target, settings.ignore_index, target.shape), 2
    nll_tokens = (lengths[:, 0] if nll_targets is None else nll_targets != IGNORE_INDEX).sum()
    seen: list[Tensor] = []

    def loss_fn(sums: Tensor, groups: range) -> Tensor:
        sums, here = sums.view(len(groups), -1), slice(groups.start, groups.stop)
        seen.append(sums.detach())
        logps = sums[:, :2]
        ratios = (logps / lengths[here] if settings.average_log_prob else logps) - ref_logps[here]
        loss = losses(ratios[:, 0], ratios[:, 1]).sum() / pairs
        return loss - nll_weight * sums[:, nll_column].sum() / nll_tokens if nll_weight else loss

    if nll_targets is None:
        loss = linear_sequence_loss(by_pairs(_input, pairs), weight, targets, loss_fn, bias=bias)
    else:
        # A row that predicts a token of the pair and one of the NLL enters the products once.
        layout = layout_of_three(pairs, target.shape[1], _input.device)
        packed = torch.cat([targets, nll_targets[:, None]], 1).flatten()
        loss = linear_sequence_loss(_input.flatten(0, 1), weight, packed, loss_fn, layout=layout, bias=bias)
    sums = torch.cat(seen)
    logps = sums[:, :2] / lengths if settings.average_log_prob else sums[:, :2]
    rewards = settings.beta * (logps - ref_logps)
    nll = -sums[:, nll_column].sum() / nll_tokens if settings.compute_nll_loss else sums.new_zeros(())
    return loss, (*logps.unbind(1), *mean_logits(_input.chunk(2), weight, bias), nll, *rewards.unbind(1))


def count_pairs(_input: Tensor, target: Tensor) -> int:
    """Count the pairs, B; raise ``ValueError`` for shapes that are not (2B, T, H) and (2B, T)."""
    if _input.dim() != 3 or target.shape != _input.shape[:2]:
        raise ValueError(
            f"_input must be (2B, T, H) and target (2B, T), got {tuple(_input.shape)} and {tuple(target.shape)}"
        )
    if len(target) % 2 or len(target) == 0:
        raise ValueError(
            f"the batch must be as many chosen as rejected sequences, an even number, got {len(target)} sequences"
        )
    return len(target) // 2


def by_pairs(stacked: Tensor, pairs: int) -> Tensor:
    """Rearrange (2B, ...), all chosen sequences before all rejected ones, to (B, 2, ...)."""
    return stacked.unflatten(0, (2, pairs)).transpose(0, 1)


def chosen_targets(nll_target: Tensor, ignore_index: int, shape: torch.Size) -> Tensor:
    """Return the targets (B, T) of the NLL from those of all 2B sequences, whose ``shape`` is that of the target."""
    if nll_target.shape != shape:
        raise ValueError(f"nll_target must have the shape of target, {tuple(shape)}, got {tuple(nll_target.shape)}")
    return without_ignored(nll_target, ignore_index).chunk(2)[0]


def layout_of_three(pairs: int, length: int, device: torch.device) -> CandidateLayout:
    """Lay out three segments of T tokens for each pair: chosen, rejected, and the rows of chosen again."""
    chosen, rejected = torch.arange(2 * pairs * length, device=device).view(2, pairs, length)
    rows = torch.stack([chosen, rejected, chosen], 1).flatten()
    cu_tokens = [segment * length for segment in range(3 * pairs + 1)]
    return CandidateLayout(cu_tokens, [3 * pair for pair in range(pairs + 1)], rows=rows)
