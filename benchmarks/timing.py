"""Round-robin timing: one call of every contestant per round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant's timed calls."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        """Minimum over the rounds."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Effort:
    """How many rounds a contestant gets, from what its first timed call took compared with the reference's.

    A peer that needs several times the floor does not come closer by being timed more often, and would take most of
    the run. The number of rounds is in the results.
    """

    rounds: int = 5
    seconds: float = 20.0  # per contestant: calls that take long get fewer rounds, but no fewer than three
    far: float = 1.4  # from here on two rounds
    very_far: float = 2.5  # from here on one round

    def rounds_for(self, first: float, reference: float) -> int:
        """Rounds of a contestant whose first timed call took `first` seconds."""
        if first >= self.very_far * reference:
            return min(1, self.rounds)
        if first >= self.far * reference:
            return min(2, self.rounds)
        return min(self.rounds, max(3, int(self.seconds / first)))


def round_robin(
    calls: Mapping[str, Call], effort: Effort, reference: str, after: Callable[[str, object], None] | None = None
) -> dict[str, Timing]:
    """Time every call, all of them in every round, each round starting with another one.

    `reference` names the call the others are measured against (see :class:`Effort`). `after(name, result)` gets each
    result, outside the timed region.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    wanted = dict.fromkeys(names, 1)
    for round_index in range(effort.rounds):
        start = round_index % len(names)
        for name in names[start:] + names[:start]:
            if len(seconds[name]) >= wanted[name]:
                continue
            begin = time.perf_counter()
            result = calls[name]()
            seconds[name].append(time.perf_counter() - begin)
            if after is not None:
                after(name, result)
            del result  # or the next call would run beside this one's gradients
        if round_index == 0:
            baseline = seconds[reference][0]
            wanted = {name: effort.rounds_for(first, baseline) for name, (first,) in seconds.items()}
    return {name: Timing(tuple(times)) for name, times in seconds.items()}
