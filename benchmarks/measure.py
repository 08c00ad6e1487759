"""Describes what is compared with what, and measures it: contestants of a case, in turns, checked, with their peaks.

Every contestant is timed once a round, as often as all others, and each round begins with another one, so that a drift
of the machine hits all alike. What is told is the median over the rounds, with the spread between the quartiles.
"""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.environment import log
from benchmarks.meters import Call, Clock, PeakMeter, clock_for
from benchmarks.processes import summary
from benchmarks.records import Record

MIB = 2**20
LEAST_ROUNDS = 3  # before the time may be up


class ContestantError(Exception):
    """Says that a contestant without which nothing can be compared was not measured."""


class AnotherLossError(Exception):
    """Says that a contestant computes something else, so that its time would mean nothing."""


class NotHereError(Exception):
    """Says that what a case measures is not here, so that it has nothing to say."""


@dataclass(frozen=True)
class Contestant:
    """Takes part in a case."""

    name: str  # in the results
    build: Callable[[], Call]  # makes the call that is timed; what it raises is why the contestant is absent
    check: Callable[[Any], Mapping[str, float]] | None = None  # returns errors of the first timed result, or raises
    warm_up: Call | None = None  # runs before anything is timed, in place of a call
    needed: bool = False  # whether nothing can be compared without it, so that its failure ends the case
    ratios: Mapping[str, str] | None = None  # in place of the case's
    conditions: Mapping[str, Any] = field(default_factory=dict)  # of its record, besides those of the case
    values: Callable[[float], Mapping[str, float]] = lambda seconds: {}  # makes more values from its seconds
    absent: str = ""  # why it does not run, where that is known beforehand
    steps: int = 1  # that a call takes, and by which its seconds are divided


def ready(name: str, call: Call, **options: Any) -> Contestant:
    """Describe a contestant whose call is there already and without which nothing can be compared."""
    return Contestant(name, lambda: call, needed=True, **options)


def not_here(name: str, why: str) -> Contestant:
    """Describe one that does not run."""
    return Contestant(name, lambda: lambda: None, absent=why)


@dataclass(frozen=True)
class Case:
    """Compares contestants with one another."""

    name: str  # in the results
    contestants: Sequence[Contestant]  # in the order of the results
    conditions: Mapping[str, Any] = field(default_factory=dict)  # of all records
    ratios: Mapping[str, str] = field(default_factory=dict)  # value: over whose seconds those of everyone are
    speeds: Mapping[str, str] = field(default_factory=dict)  # value: whose seconds are over those of everyone
    rounds: int = 3  # timed calls of each
    seconds: float = 120.0  # after which no further round begins, from the third on
    before: Callable[[], object] = lambda: None  # runs before every call, outside of its time
    peaks: bool = False  # whether calls return (loss, gradients), beyond which the peak of memory is taken
    note: str = ""  # what a reader must know of the figures


def measure(case: Case, device: torch.device, clock: Clock | None = None) -> list[Record]:
    """Measure a case: who is absent, fails or is wrong has a note and no values; raise ContestantError if needed."""
    measurement = Measurement(case, device, clock or clock_for(device))
    measurement.warm_up()
    measurement.take_turns()
    return [measurement.record(contestant) for contestant in case.contestants]


class Measurement:
    """Holds what is found of the contestants of one case: calls, seconds of each round, errors, why one has left."""

    def __init__(self, case: Case, device: torch.device, clock: Clock) -> None:
        self.case, self.clock, self.meter = case, clock, PeakMeter(device)
        self.reasons = {own.name: own.absent for own in case.contestants if own.absent}
        self.contestants = {own.name: own for own in case.contestants if not own.absent}
        self.calls: dict[str, Call] = {}
        self.times: dict[str, list[float]] = {}
        self.found: dict[str, dict[str, float]] = {}  # by the first timed call

    def warm_up(self) -> None:
        """Build everyone and runs each once, to the end, so that the errors of one are not another's."""
        for name, contestant in self.contestants.items():
            try:
                call = contestant.build()
                self.case.before()
                (contestant.warm_up or call)()
                synchronize()
                self.calls[name], self.times[name] = call, []
            except Exception as error:  # a contestant may fail in any way of its own
                self.failed(name, error)

    def take_turns(self) -> None:
        """Time every call once a round; who fails leaves the turns."""
        started = time.monotonic()
        for index in range(self.case.rounds):
            if index >= LEAST_ROUNDS and time.monotonic() - started > self.case.seconds:
                break
            names = list(self.calls)
            first = index % max(1, len(names))
            for name in names[first:] + names[:first]:
                try:
                    self.run(name)
                except Exception as error:  # as above
                    self.failed(name, error)
                    del self.calls[name], self.times[name]

    def run(self, name: str) -> None:
        """Time a call; the first one has its peak of memory taken and its result checked, outside of the time."""
        self.case.before()
        first, values = name not in self.found, dict[str, float]()
        if first and self.case.peaks:
            self.meter.start()
        seconds, result = self.clock(self.calls[name])
        self.times[name].append(seconds / self.contestants[name].steps)
        if not first:
            return
        contestant = self.contestants[name]
        if self.case.peaks:
            values["peak_mib"] = (self.meter.growth() - sum(grad.nbytes for grad in result[1])) / MIB
        self.found[name] = values | dict(contestant.check(result) if contestant.check else {})

    def failed(self, name: str, error: Exception) -> None:
        """Note why a contestant has no values, and lets go of what its call held."""
        if self.contestants[name].needed:
            raise ContestantError(f"{name}: {summary(error)}") from error
        self.reasons[name] = summary(error)
        log(f"    without {name}: {self.reasons[name]}")
        error.__traceback__ = None
        free_memory()

    def record(self, own: Contestant) -> Record:
        """Return what there is to say of a contestant."""
        case, name, values = self.case, own.name, dict[str, float]()
        if name in self.times:
            medians = {who: statistics.median(times) for who, times in self.times.items()}
            over = case.ratios if own.ratios is None else own.ratios
            values = in_rounds(self.times[name])
            values |= {ratio: medians[name] / medians[other] for ratio, other in over.items() if other in medians}
            values |= {
                speed: medians[other] / medians[name] for speed, other in case.speeds.items() if other in medians
            }
            values |= {**own.values(medians[name]), **self.found[name]}
        return Record(case.name, name, values, {**case.conditions, **own.conditions}, self.reasons.get(name, case.note))


def in_rounds(times: Sequence[float]) -> dict[str, float]:
    """Return the median of some rounds, and the distance between their quartiles as a share of it."""
    median, spread = statistics.median(times), 0.0
    if len(times) > 1:
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        spread = (high - low) / median if median else 0.0
    return {"seconds": median, "spread": spread, "rounds": float(len(times))}


class Agreement:
    """Holds every result of a case against the first: some tensors or numbers of it, up to a share of their norms."""

    def __init__(self, tolerance: float, of: Callable[[Any], Iterable[Any]]) -> None:
        self.tolerance, self.of = tolerance, of
        self.expected: list[torch.Tensor] = []

    def __call__(self, result: Any) -> dict[str, float]:
        """Raise :class:`AnotherLossError` unless the result is that of the first."""
        own = [torch.as_tensor(part).detach().double() for part in self.of(result)]
        self.expected = self.expected or own
        for found, wanted in zip(own, self.expected, strict=True):
            distance, norm = (found - wanted).norm().item(), wanted.norm().item()
            if not distance <= self.tolerance * norm:  # not `>`: NaN is another loss too
                raise AnotherLossError(f"differs from the first by {distance:.2g}, whose norm is {norm:.2g}")
        return {}


def each(cases: Mapping[str, Callable[[], Iterable[Record]]]) -> Iterator[Record]:
    """Yield the records of cases one after the other; at the end raise ContestantError naming those that failed."""
    errors = []
    for name, case in cases.items():
        log(f"  {name} ...")
        try:
            yield from case()
        except NotHereError as error:
            yield Record(name, "", note=str(error))
        except Exception as error:  # the other cases still have something to say
            log(traceback.format_exc())
            errors.append(f"{name}: {summary(error)}")
        free_memory()
    if errors:
        raise ContestantError("; ".join(errors))


def synchronize() -> None:
    """Wait until a GPU that is in use is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Hand back what calls have held."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def dtype_name(dtype: torch.dtype) -> str:
    """Return float32 or bfloat16."""
    return str(dtype).removeprefix("torch.")
