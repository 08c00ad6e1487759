"""The losses of a contrast: one row for each, with its formula, its slopes and the kernels that have it.

All other modules read this table: the objective and its checks, the trainer's choices, the adapters
for TRL and Liger, and the codes of the kernels. A new loss of pairs is one formula and one row of
:data:`LOSSES`; the recipe is the last section of CONTRIBUTING.md. This module imports nothing of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

DISCOPOP_TAU = 0.05


class Pair(NamedTuple):
    """The scores of pairs of a better and a worse candidate, and the numbers that a loss of them may need.

    A score is ``beta * (logp - ref_logp)``; that of the worse candidate has the margin added.

    Attributes:
        chosen: scores (G,) of the better candidates.
        rejected: scores (G,) of the worse candidates.
        difference: ``chosen - rejected`` (G,), which the caller may compute more exactly than from the two scores.
        beta: the factor in the scores.
        label_smoothing: the probability that a pair is the wrong way round.
        tau: the temperature of discopop's mixture.
    """

    chosen: Tensor
    rejected: Tensor
    difference: Tensor
    beta: float
    label_smoothing: float = 0.0
    tau: float = DISCOPOP_TAU

    @classmethod
    def of_ratios(cls, better: Tensor, worse: Tensor, beta: float, margin: float = 0.0, **options: float) -> Pair:
        """Make pairs from ``logp - ref_logp`` (G,) of the better and of the worse candidates."""
        return cls(beta * better, beta * worse + margin, beta * (better - worse) - margin, beta, **options)


class PairLoss(NamedTuple):
    """The losses (G,) of pairs, and their derivatives (G,) with respect to the chosen and the rejected scores."""

    loss: Tensor
    chosen_slope: Tensor
    rejected_slope: Tensor


def of_difference(loss: Tensor, slope: Tensor) -> PairLoss:
    """Return a loss of the difference alone, whose derivative with respect to the difference is ``slope``."""
    return PairLoss(loss, slope, -slope)


def softplus(x: Tensor) -> Tensor:
    """Compute ``log(1 + exp(x))`` to the last bit for any x; torch's softplus is x itself above 20, 2e-9 off."""
    return -logsigmoid(-x)


def logistic(pair: Pair) -> PairLoss:
    """Compute the loss of DPO, Rafailov et al. 2023, arXiv 2305.18290, equation 7.

    Label smoothing makes it the conservative DPO of Mitchell 2023, https://ericmitchell.ai/cdpo.pdf.
    """
    d, flipped = pair.difference, pair.label_smoothing
    loss = (1 - flipped) * softplus(-d) + flipped * softplus(d)
    return of_difference(loss, flipped * d.sigmoid() - (1 - flipped) * (-d).sigmoid())


def hinge(pair: Pair) -> PairLoss:
    """Compute the loss of SLiC, Zhao et al. 2023, arXiv 2305.10425, of DPO's scores."""
    d = pair.difference
    return of_difference(relu(1 - d), -(d < 1).to(d.dtype))


def ipo(pair: Pair) -> PairLoss:
    """Compute the loss of IPO, Azar et al. 2023, arXiv 2310.12036, equation 17; beta is the paper's tau."""
    residual = (pair.difference - 0.5) / pair.beta
    return of_difference(residual.square(), 2 * residual / pair.beta)


def robust(pair: Pair) -> PairLoss:
    """Compute the loss of robust DPO, Ray Chowdhury et al. 2024, arXiv 2403.00409.

    It is unbiased where labels are flipped with the probability ``label_smoothing``.
    """
    d, flipped = pair.difference, pair.label_smoothing
    loss = ((1 - flipped) * softplus(-d) - flipped * softplus(d)) / (1 - 2 * flipped)
    return of_difference(loss, -((1 - flipped) * (-d).sigmoid() + flipped * d.sigmoid()) / (1 - 2 * flipped))


def exo_pair(pair: Pair) -> PairLoss:
    """Compute the loss of EXO, Ji et al. 2024, arXiv 2402.00856, equation 16.

    It is the reverse KL divergence from smoothed labels.
    """
    d, flipped = pair.difference, pair.label_smoothing
    log_right, log_wrong = math.log1p(-flipped), math.log(flipped)
    loss = d.sigmoid() * (logsigmoid(d) - log_right) + (-d).sigmoid() * (logsigmoid(-d) - log_wrong)
    return of_difference(loss, sigmoid_slope(d) * (d - log_right + log_wrong))


def nca_pair(pair: Pair) -> PairLoss:
    """Compute the loss of NCA, Chen et al. 2024, arXiv 2402.05369, for two candidates.

    The better one has all of the reward. ``cpo_kernels.integrations.losses.nca`` is the loss of any rewards.
    """
    chosen, rejected = pair.chosen, pair.rejected
    loss = -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))
    return PairLoss(loss, 0.5 * chosen.sigmoid() - (-chosen).sigmoid(), 0.5 * rejected.sigmoid())


def bco_pair(pair: Pair) -> PairLoss:
    """Compute the loss of BCO, Jung et al. 2024, arXiv 2404.04656, without its shift of the rewards.

    It is that of a classifier of single answers.
    """
    loss = -logsigmoid(pair.chosen) - logsigmoid(-pair.rejected)
    return PairLoss(loss, -(-pair.chosen).sigmoid(), pair.rejected.sigmoid())


def sppo_hard(pair: Pair) -> PairLoss:
    """Compute the loss of SPPO, Wu et al. 2024, arXiv 2405.00675, equation 4.7, for a preference that is certain."""
    chosen = (pair.chosen - 0.5) / pair.beta
    rejected = (pair.rejected + 0.5) / pair.beta
    return PairLoss(chosen.square() + rejected.square(), 2 * chosen / pair.beta, 2 * rejected / pair.beta)


def apo_zero(pair: Pair) -> PairLoss:
    """Compute the loss of APO-zero, D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7.

    It drives good answers up and bad ones down.
    """
    loss = (-pair.chosen).sigmoid() + pair.rejected.sigmoid()
    return PairLoss(loss, -sigmoid_slope(pair.chosen), sigmoid_slope(pair.rejected))


def apo_down(pair: Pair) -> PairLoss:
    """Compute the loss of APO-down, D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8.

    It drives both answers down, and the bad one further.
    """
    apart = sigmoid_slope(pair.difference)
    loss = pair.chosen.sigmoid() + (-pair.difference).sigmoid()
    return PairLoss(loss, sigmoid_slope(pair.chosen) - apart, apart)


def discopop(pair: Pair) -> PairLoss:
    """Compute the loss of DiscoPOP, Lu et al. 2024, arXiv 2406.08414, equation 5.

    It mixes the logistic and the exponential loss by the sigmoid of ``difference / tau``.
    """
    d = pair.difference
    logistic_share, logistic_loss = (-d / pair.tau).sigmoid(), softplus(-d)
    # exp(-d) would overflow before its product with the share does, so logarithms are added.
    exponential = (logsigmoid(d / pair.tau) - d).exp()
    loss = logistic_loss * logistic_share + exponential
    mixed = exponential * logistic_share - logistic_loss * sigmoid_slope(d / pair.tau)
    return of_difference(loss, mixed / pair.tau - (-d).sigmoid() * logistic_share - exponential)


def sigmoid_slope(x: Tensor) -> Tensor:
    """Compute the derivative of the sigmoid at x."""
    return x.sigmoid() * (-x).sigmoid()


@dataclass(frozen=True)
class Loss:
    """A row of the table of losses.

    Attributes:
        formula: computes the loss of pairs, with its slopes.
        of_groups: whether :mod:`cpo_kernels.objective` extends the loss to groups with any number of negatives; else a
            group may have one only (K = 1).
        smoothing: whether the loss takes ``label_smoothing``: never, optionally, or only above 0.
        kernel_code: the loss's code in csrc/common/preference.h, which has its slope; Triton's contrast has the slope
            under the loss's name. None where the kernels lack the loss, so that plain torch computes it.
    """

    formula: Callable[[Pair], PairLoss]
    of_groups: bool = False
    smoothing: Literal["none", "optional", "required"] = "none"
    kernel_code: int | None = None


LOSSES: dict[str, Loss] = {
    "plackett_luce": Loss(logistic, of_groups=True, smoothing="optional", kernel_code=0),
    "hinge": Loss(hinge, kernel_code=1),
    "ipo": Loss(ipo, kernel_code=2),
    "exo_pair": Loss(exo_pair, smoothing="required"),
    "nca_pair": Loss(nca_pair),
    "robust": Loss(robust, smoothing="optional"),
    "bco_pair": Loss(bco_pair),
    "sppo_hard": Loss(sppo_hard),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "discopop": Loss(discopop),
}
LOSS_TYPES = tuple(LOSSES)
# The codes of the losses that the kernels compute in one launch, by name.
KERNEL_CODES = {name: loss.kernel_code for name, loss in LOSSES.items() if loss.kernel_code is not None}
# The names that TRL's DPO gives to plackett_luce, and whether that loss is of means per token.
TRL_LOGISTIC = {"sigmoid": False, "sigmoid_norm": True}
TRL_NAMES = (*TRL_LOGISTIC, *(name for name, loss in LOSSES.items() if not loss.of_groups))


def trl_options(name: str, label_smoothing: float = 0.0) -> dict[str, Any]:
    """Return the objective's options for the loss that TRL's DPO calls ``name``.

    TRL computes ipo from means per token, and its logistic losses ignore ``label_smoothing``.

    Raises:
        ValueError: a name that is not one of :data:`TRL_NAMES`.
    """
    if name not in TRL_NAMES:
        raise ValueError(f"loss_type must be one of {TRL_NAMES}, got {name!r}")
    if name in TRL_LOGISTIC:
        return {"loss_type": "plackett_luce", "length_normalized": TRL_LOGISTIC[name], "label_smoothing": 0.0}
    smoothing = 0.0 if LOSSES[name].smoothing == "none" else label_smoothing
    return {"loss_type": name, "length_normalized": name == "ipo", "label_smoothing": smoothing}
