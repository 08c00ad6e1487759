"""Sums behind the logged metrics, kept on the device and read when they are logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class MetricSums:
    """Weighted sums of named scalars; a metric is its sum divided by its total weight."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}
        self.nonfinite: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: float) -> None:
        """Add ``value``, a mean over ``weight`` items."""
        value = value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
        zero = value.new_zeros(())
        self.values[name] = self.values.get(name, zero) + value * weight
        self.weights[name] = self.weights.get(name, 0.0) + weight
        self.nonfinite[name] = self.nonfinite.get(name, zero) + ~torch.isfinite(value)

    def means(self, reduce: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], dict[str, int]]:
        """The metrics, and how many of the values added were NaN or Inf, by name where any were.

        Args:
            reduce: sums a tensor over processes.
        """
        if not self.values:
            return {}, {}
        names = list(self.values)
        rows = [
            torch.stack([self.values[name] for name in names]),
            self.values[names[0]].new_tensor([self.weights[name] for name in names]),
            torch.stack([self.nonfinite[name] for name in names]),
        ]
        values, weights, nonfinite = reduce(torch.stack(rows)).tolist()
        means = {name: v / w if w else math.nan for name, v, w in zip(names, values, weights, strict=True)}
        return means, {name: int(n) for name, n in zip(names, nonfinite, strict=True) if n}


def group_rewards(rewards: Tensor, cu_groups: Sequence[int]) -> dict[str, Tensor]:
    """Means over groups of the ground truth's reward and of the mean reward of its negatives.

    Args:
        rewards: (S,), the ground truth first in every group, with at least one negative each.
        cu_groups: (G + 1,) segments of each group.
    """
    starts = torch.tensor(cu_groups, device=rewards.device)
    sizes = starts.diff()
    groups = torch.arange(sizes.numel(), device=rewards.device).repeat_interleave(sizes)
    chosen = rewards[starts[:-1]]
    totals = torch.zeros_like(chosen).index_add_(0, groups, rewards)
    return {"rewards/chosen": chosen.mean(), "rewards/rejected": ((totals - chosen) / (sizes - 1)).mean()}
