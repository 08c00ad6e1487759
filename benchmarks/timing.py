"""Times calls in turns: every contestant once a round, so that a drift of the machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
Clock = Callable[[Call], tuple[float, Any]]  # runs a call; its seconds and its result

FLUSH_BYTES = 2**30  # many times any L2, and longer to read than a launch takes
LEAST_ROUNDS = 3  # before the time may be up


def host_clock(call: Call) -> tuple[float, Any]:
    """Run a call between two looks at the host's clock."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


class DeviceClock:
    """Runs a call between two events on a GPU's stream, with nothing of its operands left in the L2 cache.

    The cache is emptied by reading, which leaves no dirty lines to be written back during the call; while that goes
    on, the host is already launching the call, so that the time of a short kernel is not that of its launch.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.zeros(FLUSH_BYTES // 4, device=device)
        self.begin, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> tuple[float, Any]:
        """Run one call."""
        torch.cuda.synchronize()
        self.buffer.sum()
        self.begin.record()
        result = call()
        self.end.record()
        torch.cuda.synchronize()
        return self.begin.elapsed_time(self.end) / 1e3, result


def clock_for(device: torch.device) -> Clock:
    """Return the clock that sees the work of a device."""
    return DeviceClock(device) if device.type == "cuda" else host_clock


@dataclass(frozen=True)
class Timing:
    """Holds the seconds of a contestant's timed calls, one a round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median over the rounds, which is what is reported."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Return the distance between the quartiles as a share of the median; 0 of a single round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median if self.median else 0.0

    def values(self) -> dict[str, float]:
        """Return what a record says of it."""
        return {"seconds": self.median, "spread": self.spread, "rounds": float(len(self.seconds))}


def interleave(
    calls: Mapping[str, Call],
    rounds: int,
    seconds: float = float("inf"),
    *,
    clock: Clock = host_clock,
    before: Callable[[str], object] = lambda name: None,
    after: Callable[[str, Any], object] = lambda name, result: None,
    failed: Callable[[str, Exception], object] | None = None,
) -> dict[str, Timing]:
    """Time every call the same number of rounds, each round starting with another one.

    Args:
        calls: by the name of the contestant.
        rounds: timed calls of each; from the third on only while `seconds` have not passed.
        seconds: of all rounds together.
        clock: see :func:`clock_for`.
        before: called with the name before each call, outside of the time.
        after: called with the name and each result, outside of the time.
        failed: called with the name and what a call or `after` raised, whose contestant then leaves the turns; without
            it the exception is raised.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    started = time.monotonic()
    for index in range(rounds):
        if index >= LEAST_ROUNDS and time.monotonic() - started > seconds:
            break
        names = list(times)
        first = index % max(1, len(names))
        for name in names[first:] + names[:first]:
            result = None  # or the next call would run beside the last one's gradients
            before(name)
            try:
                elapsed, result = clock(calls[name])
                times[name].append(elapsed)
                after(name, result)
            except Exception as error:  # a contestant may fail in any way of its own
                if failed is None:
                    raise
                failed(name, error)
                del times[name]
    return {name: Timing(tuple(own)) for name, own in times.items()}
