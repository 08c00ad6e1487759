"""Sums from which logged metrics are computed; they stay on the device until they are logged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor


class MetricSums:
    """Weighted sums of named scalars; a metric is its sum divided by its total weight."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}
        self.nonfinite: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: float) -> None:
        """Add ``value``, a mean over ``weight`` items, to the metric ``name``."""
        value = value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)
        zero = value.new_zeros(())
        self.values[name] = self.values.get(name, zero) + value * weight
        self.weights[name] = self.weights.get(name, 0.0) + weight
        self.nonfinite[name] = self.nonfinite.get(name, zero) + ~torch.isfinite(value)

    def means(self, reduce: Callable[[Tensor], Tensor]) -> tuple[dict[str, float], dict[str, int]]:
        """Return the metrics that have any weight, and by name how many of their values were NaN or Inf.

        Args:
            reduce: sums a tensor over processes, all of which must have added the same names, if with weight 0.
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
        means = {name: v / w for name, v, w in zip(names, values, weights, strict=True) if w}
        return means, {name: int(n) for name, n in zip(names, nonfinite, strict=True) if n}


def contrast_metrics(
    rewards: Tensor, cu_groups: Sequence[int], ranks: Sequence[int], kinds: Sequence[str], known: Sequence[str]
) -> dict[str, tuple[Tensor, int]]:
    """Compare the candidates of rank 0 with all others, and with each kind of negative.

    Args:
        rewards: (S,) ``beta * (logp - ref_logp)``.
        cu_groups: (G + 1,) segments of each group.
        ranks: (S,) ranks of the candidates, 0 is best.
        kinds: (S,) kinds of the candidates.
        known: kinds to report, whether or not this batch holds any.

    Returns:
        For ``rewards/chosen, rewards/rejected, margin, accuracy`` and ``accuracy/KIND`` the mean over the groups that
        have such candidates, and the number of these groups. An accuracy is the share of groups whose candidates of
        rank 0 all have a higher reward than all others (of that kind).
    """
    # Index tensors are made on the host, so that nothing waits for the device.
    group_of = [group for group, (start, end) in enumerate(pairwise(cu_groups)) for _ in range(start, end)]

    def reduce(chosen: Sequence[bool], how: str, start: float) -> Tensor:
        segments = torch.tensor([i for i, mine in enumerate(chosen) if mine], dtype=torch.int64).to(rewards.device)
        groups = torch.tensor([g for g, mine in zip(group_of, chosen, strict=True) if mine], dtype=torch.int64)
        values = rewards.new_full((len(cu_groups) - 1,), start)
        return values.scatter_reduce(0, groups.to(rewards.device), rewards[segments], how, include_self=how != "mean")

    def over_groups(values: Tensor, chosen: Sequence[bool]) -> tuple[Tensor, int]:
        present = [group for group, (start, end) in enumerate(pairwise(cu_groups)) if any(chosen[start:end])]
        mine = values[torch.tensor(present, dtype=torch.int64).to(values.device)]
        return mine.sum() / max(len(present), 1), len(present)

    best = [rank == 0 for rank in ranks]
    others = [not mine for mine in best]
    chosen, rejected = reduce(best, "mean", 0.0), reduce(others, "mean", 0.0)
    weakest = reduce(best, "amin", torch.inf)
    metrics = {
        "rewards/chosen": over_groups(chosen, others),
        "rewards/rejected": over_groups(rejected, others),
        "margin": over_groups(chosen - rejected, others),
    }
    for name, kind in (("accuracy", None), *((f"accuracy/{kind}", kind) for kind in known)):
        mine = [other and kind in (None, own) for other, own in zip(others, kinds, strict=True)]
        won = weakest > reduce(mine, "amax", -torch.inf)
        metrics[name] = over_groups(won.to(rewards.dtype), mine)
    return metrics
