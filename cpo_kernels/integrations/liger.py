"""The paired losses of ``liger_kernel.chunked_loss`` with their names, signatures and return values, on our kernels.

Each takes ``(lin_weight, _input, target, bias=None, ...)``: _input (2B, T, H), the B chosen sequences and then the B
rejected ones, aligned with target (2B, T). It returns the loss, a scalar, and a tuple without gradients:
log-likelihoods (B,) of the chosen and of the rejected sequences, the mean logit of either (over all T positions and the
vocabulary, ignored positions too, as in Liger), the NLL per chosen token (0 with ``compute_nll_loss=False``), and the
rewards ``beta * (logp - ref_logp)`` (B,) of either. All are float32 (float64 for float64 inputs).

The differences from Liger: an odd number of sequences raises, where Liger returns a loss of wrong pairs; rows that
predict nothing enter no product; logits fill a budget of bytes, so that ``chunk_size`` has no effect, and ``compiled``
has none either. Liger itself is not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from cpo_kernels.functional import linear_sequence_logps, linear_sequence_loss
from cpo_kernels.kernels.numerics import IGNORE_INDEX, accumulate_dtype
from cpo_kernels.loss_table import LOSSES, TRL_NAMES, Pair, trl_options
from cpo_kernels.options import suggests_arguments

Output = tuple[Tensor, tuple[Tensor, ...]]
# Liger's DPO has TRL's names, but neither ipo nor sigmoid_norm, which is ``average_log_prob`` in Liger.
DPO_LOSS_TYPES = tuple(name for name in TRL_NAMES if not trl_options(name)["length_normalized"])
# Rows of a weight that are summed at a time, so that no float32 copy of a whole half-precision weight is made.
ROWS_SUMMED = 4096


class Settings(Protocol):
    """The settings that the loss modules share, by Liger's names."""

    ignore_index: int
    beta: float
    alpha: float
    compute_nll_loss: bool
    average_log_prob: bool


@suggests_arguments
class LigerFusedLinearCPOLoss(nn.Module):
    """CPO of Xu et al. 2024 (arXiv 2401.08417): no reference, ``alpha`` weighs the NLL of the chosen sequences."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.compiled = compute_nll_loss, compiled
        self.average_log_prob, self.chunk_size = average_log_prob, chunk_size

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Output:
        """Return the outputs that the module's docstring lists; raise ``ValueError`` for an odd number of sequences."""

        def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
            pair = Pair.of_ratios(chosen, rejected, self.beta, label_smoothing=self.label_smoothing)
            return LOSSES["plackett_luce"].formula(pair).loss

        return run_pairs(self, losses, lin_weight, _input, target, bias)


@suggests_arguments
class LigerFusedLinearSimPOLoss(nn.Module):
    """SimPO of Meng et al. 2024 (arXiv 2405.14734): means over tokens, and ``gamma`` as the margin of the scores."""

    average_log_prob = True

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.compiled = compute_nll_loss, compiled
        self.gamma, self.chunk_size = gamma, chunk_size

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Output:
        """Return the outputs that the module's docstring lists; raise ``ValueError`` for an odd number of sequences."""

        def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
            pair = Pair.of_ratios(chosen, rejected, self.beta, self.gamma, label_smoothing=self.label_smoothing)
            return LOSSES["plackett_luce"].formula(pair).loss

        return run_pairs(self, losses, lin_weight, _input, target, bias)


@suggests_arguments
class LigerFusedLinearDPOLoss(nn.Module):
    """DPO of Rafailov et al. 2023 (arXiv 2305.18290) and its variants, by Liger's and TRL's names of ``loss_type``."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        if loss_type not in DPO_LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {DPO_LOSS_TYPES}, got {loss_type!r}")
        smoothing = LOSSES[loss_type].smoothing if loss_type in LOSSES else "none"
        if smoothing == "required" and not 0 < label_smoothing < 1:
            raise ValueError(f"loss_type={loss_type!r} needs label_smoothing in (0, 1), got {label_smoothing}")
        if smoothing == "optional" and not 0 <= label_smoothing < 0.5:
            raise ValueError(f"loss_type={loss_type!r} needs label_smoothing in [0, 0.5), got {label_smoothing}")
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.compiled, self.use_ref_model, self.average_log_prob = compiled, use_ref_model, average_log_prob
        self.chunk_size, self.loss_type = chunk_size, loss_type
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> Output:
        """Return the outputs that the module's docstring lists.

        ref_input (2B, T, H') and ref_weight (V, H') are the hidden states and the head of the reference.

        Raises:
            ValueError: an odd number of sequences, or ``use_ref_model`` without ref_input or ref_weight.
        """
        options = trl_options(self.loss_type, self.label_smoothing)
        numbers = {"label_smoothing": options["label_smoothing"], "tau": self.discopop_tau}

        def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
            pair = Pair.of_ratios(chosen, rejected, self.beta, **numbers)
            return LOSSES[options["loss_type"]].formula(pair).loss

        ref = None
        if self.use_ref_model:
            if ref_input is None or ref_weight is None:
                raise ValueError("use_ref_model=True needs ref_input and ref_weight, got None")
            ref = ref_input, ref_weight, ref_bias
        return run_pairs(self, losses, lin_weight, _input, target, bias, ref)


def run_pairs(
    settings: Settings,
    losses: Callable[[Tensor, Tensor], Tensor],
    weight: Tensor,
    _input: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ref: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> Output:
    """Compute the mean of ``losses`` over pairs and ``alpha`` times the NLL, with Liger's other outputs.

    Args:
        settings: the loss module.
        losses: maps log-likelihoods (b,) of chosen and of rejected sequences, less the reference's, to losses (b,).
        weight: (V, H).
        _input: (2B, T, H).
        target: (2B, T).
        bias: (V,) or None.
        ref: ref_input, ref_weight and ref_bias, or None.
    """
    pairs = count_pairs(_input, target)
    targets = by_pairs(target.masked_fill(target == settings.ignore_index, IGNORE_INDEX), pairs)
    lengths = (targets != IGNORE_INDEX).sum(-1)
    ref_logps = torch.zeros(lengths.shape, device=_input.device)
    if ref is not None:
        with torch.no_grad():
            ref_logps = linear_sequence_logps(by_pairs(ref[0], pairs), ref[1], targets, bias=ref[2])
    if ref is not None and settings.average_log_prob:
        ref_logps = ref_logps / lengths
    nll_weight = settings.alpha if settings.compute_nll_loss else 0.0
    seen: list[Tensor] = []

    def loss_fn(sums: Tensor, groups: range) -> Tensor:
        here = slice(groups.start, groups.stop)
        seen.append(sums.detach())
        ratios = (sums / lengths[here] if settings.average_log_prob else sums) - ref_logps[here]
        loss = losses(ratios[:, 0], ratios[:, 1]).sum() / pairs
        return loss - nll_weight * sums[:, 0].sum() / lengths[:, 0].sum() if nll_weight else loss

    loss = linear_sequence_loss(by_pairs(_input, pairs), weight, targets, loss_fn, bias=bias)
    sums = torch.cat(seen)
    logps = sums / lengths if settings.average_log_prob else sums
    rewards = settings.beta * (logps - ref_logps)
    nll = -sums[:, 0].sum() / lengths[:, 0].sum() if settings.compute_nll_loss else sums.new_zeros(())
    return loss, (*logps.unbind(1), *mean_logits(_input, weight, bias), nll, *rewards.unbind(1))


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


def mean_logits(_input: Tensor, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Compute the mean logits of chosen and of rejected sequences, two scalars, from mean rows of input and weight."""
    dtype = accumulate_dtype(_input.dtype)
    column_sums = torch.stack([part.sum(0, dtype=dtype) for part in weight.detach().split(ROWS_SUMMED)]).sum(0)
    shift = 0.0 if bias is None else bias.detach().mean(dtype=dtype)
    halves = [half.mean((0, 1), dtype=dtype) for half in _input.detach().chunk(2)]
    return [(half * column_sums).sum() / weight.shape[0] + shift for half in halves]
