"""Round-robin timing: one call of every contestant per round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]
Clock = Callable[[Call], tuple[float, object]]  # runs a call; its seconds and its result

FOREVER = float("inf")  # seconds, or times the floor
FLUSH_BYTES = 2**30  # many times any L2, and longer to read than a launch takes


def host_clock(call: Call) -> tuple[float, object]:
    """Seconds on the host's clock."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


class DeviceClock:
    """Seconds between two events on a GPU's stream, with nothing of the call's operands left in the L2 cache.

    The cache is emptied by reading, which leaves no dirty lines to be written back during the call; while that goes
    on, the host is already launching the call, so that the time of a short kernel is not that of its launch.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.zeros(FLUSH_BYTES // 4, device=device)
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> tuple[float, object]:
        """Run one call."""
        torch.cuda.synchronize()
        self.buffer.sum()
        self.begin.record()
        result = call()
        self.end.record()
        torch.cuda.synchronize()
        return self.begin.elapsed_time(self.end) / 1e3, result


def clock_for(device: torch.device) -> Clock:
    """The clock that sees the work of a device."""
    return DeviceClock(device) if device.type == "cuda" else host_clock


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
    seconds: float = 15.0  # per contestant: of those near the reference, long calls get fewer rounds, but three
    far: float = 1.5  # from here on two rounds
    very_far: float = 2.5  # from here on one round
    short: float = 1.0  # seconds; a shorter call has three rounds however far, lest one bad moment decides

    def again(self, times: Sequence[float], reference: Sequence[float], *, always: bool) -> bool:
        """Whether a contestant with these times runs in the next round; `always`: however far it is."""
        if not times:
            return True
        if len(times) >= min(self.rounds, max(3, int(self.seconds / min(times)))):
            return False
        if min(times) < self.short and len(times) < 3:
            return True
        return always or min(times) < (self.very_far if len(times) == 1 else self.far) * min(reference)


def round_robin(
    calls: Mapping[str, Call],
    effort: Effort,
    *,
    reference: str,
    always: Collection[str] = (),
    observer: Observer | None = None,
    clock: Clock = host_clock,
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
            elapsed, result = clock(calls[name])
            seconds[name].append(elapsed)
            if observer is not None:
                observer.after(name, result)
            del result  # or the next call would run beside this one's gradients
    return {name: Timing(tuple(times)) for name, times in seconds.items()}
