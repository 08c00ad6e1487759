"""Differences of the arms from the first, paired by seed, with 95 % intervals and the share of false discoveries."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from protocol import GREEDY, PLAIN, Protocol
from scipy import stats

from cpo_kernels.trainer import win_rate
from cpo_kernels.trainer.verdicts import WinRate

Record = Mapping[str, Any]


def sample(run: Record, temperature: float = PLAIN) -> Record:
    """Return the measures of a run's samples at a temperature."""
    return run["samples"][str(temperature)]


def above_curve(run: Record, other: Record) -> float:
    """Return how much better samples at temperature 1 are than those of another run at the same entropy.

    A lower temperature makes samples better and less varied. The other run's quality is interpolated between its
    temperatures; beyond them it is that of the nearest.
    """
    points = sorted((own["entropy"], own["quality"]) for own in other["samples"].values())
    own = sample(run)
    return own["quality"] - float(np.interp(own["entropy"], *zip(*points, strict=True)))


@dataclass(frozen=True)
class Difference:
    """The mean of differences paired by seed, its 95 % interval (Student's t), and the two-sided p-value."""

    mean: float
    low: float
    high: float
    p: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> Difference:
        """Summarize the differences of some seeds; without any variation the interval is a point."""
        mean = statistics.fmean(differences)
        if len(set(differences)) == 1:
            return cls(mean, mean, mean, 1.0 if mean == 0 else 0.0)
        test = stats.ttest_1samp(differences, 0.0)
        low, high = test.confidence_interval(0.95)
        return cls(mean, float(low), float(high), float(test.pvalue))

    @property
    def seen(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


# What is compared, by name: of a run and of the run of the first arm with the same seed.
MEASURES: dict[str, Callable[[Record, Record], float]] = {
    "at equal entropy": above_curve,
    "quality": lambda run, first: sample(run)["quality"] - sample(first)["quality"],
    "greedy": lambda run, first: sample(run, GREEDY)["quality"] - sample(first, GREEDY)["quality"],
    "entropy": lambda run, first: sample(run)["entropy"] - sample(first)["entropy"],
    "loss": lambda run, first: run["nll"] - first["nll"],
}
PRIMARY = "at equal entropy"


@dataclass(frozen=True)
class Comparison:
    """An arm beside the first in one regime of one task.

    Attributes:
        quality: mean over seeds, at temperature 1.
        differences: by measure.
        q: the p-value of the primary measure, adjusted for the arms of this regime (Benjamini and Hochberg 1995).
        cost: median of the ratios of seconds of the processor; None for an arm that is not trained.
        wins: how often its samples are better than the first arm's behind the same prompts, all seeds together.
        samples: means of length, repetition and distinct pairs of tokens.
    """

    quality: float
    differences: dict[str, Difference]
    q: float
    cost: float | None
    wins: WinRate
    samples: dict[str, float]


def compare(protocol: Protocol, runs: Mapping[Any, Record], task: str, regime: str) -> dict[str, Comparison]:
    """Compare every arm but the first with the first, in one regime of one task."""
    first, *others = (arm.name for arm in protocol.arms)
    by_arm = {name: [runs[task, regime, name, seed] for seed in protocol.seeds] for name in (first, *others)}
    differences = {
        name: {
            measure: Difference.of([of(run, base) for run, base in zip(by_arm[name], by_arm[first], strict=True)])
            for measure, of in MEASURES.items()
        }
        for name in others
    }
    adjusted = stats.false_discovery_control([differences[name][PRIMARY].p for name in others])
    return {
        name: _comparison(by_arm[name], by_arm[first], differences[name], float(q))
        for name, q in zip(others, adjusted, strict=True)
    }


def _comparison(
    runs: Sequence[Record], firsts: Sequence[Record], differences: dict[str, Difference], q: float
) -> Comparison:
    ratios = [run["seconds"] / first["seconds"] for run, first in zip(runs, firsts, strict=True)]
    verdicts = [
        (1.0 if mine > theirs else 0.0) if mine != theirs else 0.5
        for run, first in zip(runs, firsts, strict=True)
        for mine, theirs in zip(sample(run)["each"], sample(first)["each"], strict=True)
    ]
    means = {
        name: statistics.fmean(sample(run)[name] for run in runs)
        for name in ("length", "repetition", "distinct", "entropy")
    }
    return Comparison(
        quality=statistics.fmean(sample(run)["quality"] for run in runs),
        differences=differences,
        q=q,
        cost=statistics.median(ratios) or None,
        wins=win_rate(verdicts),
        samples=means,
    )
