"""The losses of pairs as their papers write them, in probabilities, by no code of ours: what the tests compare with.

Each takes ``logp - ref_logp`` of the chosen and of the rejected answers, beta, label smoothing and discopop's tau. They
are for float64 and moderate numbers, and nothing guards them against overflow or cancellation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def exo_pair(good: Tensor, bad: Tensor, beta: float, flipped: float) -> Tensor:
    """Compute the KL divergence from (1 - flipped, flipped) of the model's probabilities of the two answers."""
    model = torch.stack([beta * good, beta * bad]).softmax(0)
    return (model * (model / torch.tensor([1 - flipped, flipped], dtype=good.dtype).view(2, 1)).log()).sum(0)


def discopop(d: Tensor, tau: float) -> Tensor:
    mix = sigmoid(d / tau)
    return (1 - mix) * torch.log(1 + torch.exp(-d)) + mix * torch.exp(-d)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "plackett_luce": lambda c, r, b, e, t: (
        -(1 - e) * torch.log(sigmoid(b * (c - r))) - e * torch.log(sigmoid(b * (r - c)))
    ),
    "hinge": lambda c, r, b, e, t: torch.clamp(1 - b * (c - r), min=0),
    "ipo": lambda c, r, b, e, t: (c - r - 1 / (2 * b)) ** 2,
    "exo_pair": lambda c, r, b, e, t: exo_pair(c, r, b, e),
    "nca_pair": lambda c, r, b, e, t: (
        -torch.log(sigmoid(b * c)) - torch.log(sigmoid(-b * c)) / 2 - torch.log(sigmoid(-b * r)) / 2
    ),
    "robust": lambda c, r, b, e, t: (
        (e * torch.log(sigmoid(b * (r - c))) - (1 - e) * torch.log(sigmoid(b * (c - r)))) / (1 - 2 * e)
    ),
    "bco_pair": lambda c, r, b, e, t: -torch.log(sigmoid(b * c)) - torch.log(sigmoid(-b * r)),
    "sppo_hard": lambda c, r, b, e, t: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "apo_zero": lambda c, r, b, e, t: 1 - sigmoid(b * c) + sigmoid(b * r),
    "apo_down": lambda c, r, b, e, t: sigmoid(b * c) + 1 - sigmoid(b * (c - r)),
    "discopop": lambda c, r, b, e, t: discopop(b * (c - r), t),
}
SMOOTHED = {"plackett_luce": 0.2, "exo_pair": 0.1, "robust": 0.1}


def loss_of_pairs(
    name: str, good: Tensor, bad: Tensor, beta: float, tau: float = 0.05, smoothing: float | None = None
) -> Tensor:
    """Compute the losses (G,), by default with the label smoothing of :data:`SMOOTHED`."""
    return FORMULAS[name](good, bad, beta, SMOOTHED.get(name, 0.0) if smoothing is None else smoothing, tau)
