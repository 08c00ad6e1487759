"""The numbers that logit_scale, softcap and temperature come down to: what every kernel takes in their place."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Transform(NamedTuple):
    """y = cap * tanh((x + bias) * mult), or (x + bias) * mult where cap is 0; ``slope`` is dy/dx at y = 0."""

    mult: float
    cap: float
    slope: float

    @property
    def flags(self) -> dict[str, bool]:
        """The constexpr arguments ``SOFTCAP`` and ``SCALED`` of Triton's device functions."""
        return {"SOFTCAP": self.cap != 0.0, "SCALED": self.mult != 1.0}


def fold_transform(logit_scale: float, softcap: float, temperature: float) -> Transform:
    """Return the two numbers, and the slope, that logit_scale, softcap (0.0: none) and temperature come down to.

    Raises:
        ValueError: a value that is not finite, a negative softcap, or a temperature that is not positive.
    """
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale is {logit_scale}; expected a finite number")
    if not (math.isfinite(softcap) and softcap >= 0):
        raise ValueError(f"softcap is {softcap}; expected a finite number above 0, or 0 for none")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    slope = logit_scale / temperature
    return Transform(logit_scale / softcap, softcap / temperature, slope) if softcap else Transform(slope, 0.0, slope)


def transform_logits(
    logits: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Turn raw head outputs (..., V) into the logits of the softmax: bias, scale, softcap, temperature, in order."""
    if bias is not None:
        logits = logits + bias.to(logits.dtype)
    logits = logits * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature
