"""Round-robin timing: one call of every contestant per round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

Call = Callable[[], object]


class Observer(Protocol):
    """What happens around a timed call."""

    def before(self, name: str) -> None:
        """Called before each call."""

    def after(self, name: str, result: object) -> None:
        """Called with each result."""


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
    """How often a contestant is timed, from its best time so far compared with the reference's.

    A peer that needs several times the floor does not come closer by being timed more often, and would take most of
    the run. The number of rounds is in the results.
    """

    rounds: int = 5
    seconds: float = 15.0  # per contestant: calls that take long get fewer rounds, but no fewer than three
    far: float = 1.5  # from here on two rounds
    very_far: float = 2.5  # from here on one round

    def again(self, times: Sequence[float], reference: Sequence[float], *, always: bool) -> bool:
        """Whether a contestant with these times runs in the next round; `always`: however far it is."""
        if not times:
            return True
        if len(times) >= min(self.rounds, max(3, int(self.seconds / min(times)))):
            return False
        return always or min(times) < (self.very_far if len(times) == 1 else self.far) * min(reference)


def round_robin(
    calls: Mapping[str, Call],
    effort: Effort,
    *,
    reference: str,
    always: Collection[str] = (),
    observer: Observer | None = None,
) -> dict[str, Timing]:
    """Time every call, one after the other in every round, each round starting with another one.

    `reference` names the call the others are compared with and `always` those that run however far they are from it
    (see :class:`Effort`). The observer acts outside the timed region.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    always = {reference, *always}
    for round_index in range(effort.rounds):
        names = [n for n in calls if effort.again(seconds[n], seconds[reference], always=n in always)]
        start = round_index % max(1, len(names))
        for name in names[start:] + names[:start]:
            if observer is not None:
                observer.before(name)
            begin = time.perf_counter()
            result = calls[name]()
            seconds[name].append(time.perf_counter() - begin)
            if observer is not None:
                observer.after(name, result)
            del result  # or the next call would run beside this one's gradients
    return {name: Timing(tuple(times)) for name, times in seconds.items()}
