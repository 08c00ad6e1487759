"""Losses of one preference, by the names that TRL's and Liger's DPO give them as ``loss_type``.

Each maps log-likelihood ratios ``logp - ref_logp`` (b,) of the better and of the worse sequences to losses (b,).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import logsigmoid


def smoothed_sigmoid(difference: Tensor, label_smoothing: float) -> Tensor:
    """``-log sigmoid(d)``, with probability ``label_smoothing`` that the pair is the wrong way round."""
    return -(1 - label_smoothing) * logsigmoid(difference) - label_smoothing * logsigmoid(-difference)


def dpo(good: Tensor, bad: Tensor, *, beta: float, label_smoothing: float, tau: float) -> Tensor:
    """Rafailov et al. 2023, arXiv 2305.18290, equation 7; ``label_smoothing`` has no part in it."""
    return -logsigmoid(beta * (good - bad))


def hinge(good: Tensor, bad: Tensor, *, beta: float, label_smoothing: float, tau: float) -> Tensor:
    """SLiC, Zhao et al. 2023, arXiv 2305.10425, on DPO's scores."""
    return (1 - beta * (good - bad)).relu()


def robust(good: Tensor, bad: Tensor, *, beta: float, label_smoothing: float, tau: float) -> Tensor:
    """Ray Chowdhury et al. 2024, arXiv 2403.00409: unbiased under labels flipped with that probability."""
    difference = beta * (good - bad)
    clean, flipped = -logsigmoid(difference), -logsigmoid(-difference)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_pair(good: Tensor, bad: Tensor, *, beta: float, label_smoothing: float, tau: float) -> Tensor:
    """Ji et al. 2024, arXiv 2402.00856, equation 16: the reverse KL divergence from smoothed labels."""
    difference = beta * (good - bad)
    wins = difference.sigmoid() * (logsigmoid(difference) - math.log1p(-label_smoothing))
    return wins + (-difference).sigmoid() * (logsigmoid(-difference) - math.log(label_smoothing))


def nca_pair(good: Tensor, bad: Tensor, *, beta: float, label_smoothing: float, tau: float) -> Tensor:
    """Chen et al. 2024, arXiv 2402.05369: ``losses.nca`` of two candidates, the better with all of the reward."""
    return -logsigmoid(beta * good) - 0.5 * (logsigmoid(-beta * good) + logsigmoid(-beta * bad))


def bco_pair(good: Tensor, bad: Tensor, *, beta: float, label_smoothing: float, tau: float) -> Tensor:
    """Jung et al. 2024, arXiv 2404.04656: a classifier of single sequences, without the shift of the rewards."""
    return -logsigmoid(beta * good) - logsigmoid(-beta * bad)


def sppo_hard(good: Tensor, bad: Tensor, *, beta: float, label_smoothing: float, tau: float) -> Tensor:
    """Wu et al. 2024, arXiv 2405.00675, equation 4.7 for a certain preference."""
    return (good - 0.5 / beta).square() + (bad + 0.5 / beta).square()


def apo_zero(good: Tensor, bad: Tensor, *, beta: float, label_smoothing: float, tau: float) -> Tensor:
    """D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7: good answers up, bad ones down."""
    return (-beta * good).sigmoid() + (beta * bad).sigmoid()


def apo_down(good: Tensor, bad: Tensor, *, beta: float, label_smoothing: float, tau: float) -> Tensor:
    """The same, equation 8: both down, bad ones further."""
    return (beta * good).sigmoid() + (-beta * (good - bad)).sigmoid()


def discopop(good: Tensor, bad: Tensor, *, beta: float, label_smoothing: float, tau: float) -> Tensor:
    """Lu et al. 2024, arXiv 2406.08414, equation 5: logistic and exponential loss, mixed by ``sigmoid(d / tau)``."""
    difference = beta * (good - bad)
    mix = (difference / tau).sigmoid()
    return -logsigmoid(difference) * (1 - mix) + (-difference).exp() * mix


PairLoss = Callable[..., Tensor]
PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": dpo,
    "hinge": hinge,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
