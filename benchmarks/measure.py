"""Describes what is compared with what, and measures it: contestants of a case, in turns, checked, with their peaks."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.environment import log
from benchmarks.memory import meter_for
from benchmarks.records import Record
from benchmarks.timing import Call, clock_for, interleave

MIB = 2**20


class ContestantError(Exception):
    """Says that a contestant without which nothing can be compared was not measured."""


class AnotherLossError(Exception):
    """Says that a contestant computes something else, so that its time would mean nothing."""


class NotHereError(Exception):
    """Says that what a case measures is not here, so that it has nothing to say."""


@dataclass(frozen=True)
class Contestant:
    """Takes part in a case.

    Attributes:
        name: in the results.
        build: makes the call that is timed; what it raises is why the contestant is absent.
        check: takes the result of the first timed call, raises where it is wrong, and returns its errors as values.
        warm_up: runs before anything is timed, in place of a call.
        needed: whether nothing can be compared without it, so that its failure ends the case.
        ratios: value and the contestant over whose seconds its own are; in place of the case's.
        conditions: of its record, besides those of the case.
        values: makes more values from its seconds.
        fresh: whether its gradients are new memory, without which it has no peak.
        absent: why it does not run, where that is known beforehand.
    """

    name: str
    build: Callable[[], Call]
    check: Callable[[Any], Mapping[str, float]] | None = None
    warm_up: Call | None = None
    needed: bool = False
    ratios: Mapping[str, str] | None = None
    conditions: Mapping[str, Any] = field(default_factory=dict)
    values: Callable[[float], Mapping[str, float]] = lambda seconds: {}
    fresh: bool = True
    absent: str = ""


def ready(name: str, call: Call, **options: Any) -> Contestant:
    """Describe a contestant whose call is there already and without which nothing can be compared."""
    return Contestant(name, lambda: call, needed=True, **options)


@dataclass(frozen=True)
class Case:
    """Compares contestants with one another.

    Attributes:
        name: in the results.
        contestants: in the order of the results.
        conditions: of all records.
        ratios: value and the contestant over whose seconds those of everyone are.
        speeds: value and the contestant whose seconds are over those of everyone.
        rounds: timed calls of each.
        seconds: after which no further round begins, from the third on.
        before: runs before every call, outside of its time.
        peaks: whether calls return (loss, gradients), beyond which and the inputs the peak of memory is taken.
        note: what a reader must know of the figures.
    """

    name: str
    contestants: Sequence[Contestant]
    conditions: Mapping[str, Any] = field(default_factory=dict)
    ratios: Mapping[str, str] = field(default_factory=dict)
    speeds: Mapping[str, str] = field(default_factory=dict)
    rounds: int = 3
    seconds: float = 120.0
    before: Callable[[], object] = lambda: None
    peaks: bool = False
    note: str = ""


def measure(case: Case, device: torch.device) -> list[Record]:
    """Measure a case; a contestant that is absent, fails or is wrong has a record that says why, and no values.

    Raises:
        ContestantError: from what befell a contestant that is needed.
    """
    return Measurement(case, device).records()


class Measurement:
    """Holds what is found of the contestants of one case."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.contestants = {contestant.name: contestant for contestant in case.contestants}
        self.reasons = {name: own.absent for name, own in self.contestants.items() if own.absent}
        self.found: dict[str, dict[str, float]] = {}  # by the first timed call
        self.meter = meter_for(device)

    def records(self) -> list[Record]:
        """Warm everyone up, time them, and make a record of each."""
        calls = {}
        for name, contestant in self.contestants.items():
            if name not in self.reasons and (call := self.warm_up(contestant)):
                calls[name] = call
        case, clock = self.case, clock_for(self.device)
        watched = {"before": self.before, "after": self.after, "failed": self.failed}
        timings = interleave(calls, case.rounds, case.seconds, clock=clock, **watched)
        seconds = {name: timing.median for name, timing in timings.items()}
        records = []
        for name, own in self.contestants.items():
            conditions = {**case.conditions, **own.conditions}
            values: dict[str, float] = {}
            if name in timings:
                over = case.ratios if own.ratios is None else own.ratios
                values = timings[name].values()
                values |= {ratio: seconds[name] / seconds[other] for ratio, other in over.items() if other in seconds}
                values |= {speed: seconds[o] / seconds[name] for speed, o in case.speeds.items() if o in seconds}
                values |= {**own.values(seconds[name]), **self.found[name]}
            records.append(Record(case.name, name, values, conditions, self.reasons.get(name, case.note)))
        return records

    def warm_up(self, contestant: Contestant) -> Call | None:
        """Build and run it once, to the end, so that its errors are not another's; None where that fails."""
        try:
            call = contestant.build()
            self.case.before()
            (contestant.warm_up or call)()
            synchronize()
            return call
        except Exception as error:  # a contestant may fail in any way of its own
            self.failed(contestant.name, error)
        free_memory()
        return None

    def before(self, name: str) -> None:
        """Prepare a call, and start the meter for the first one."""
        self.case.before()
        if self.case.peaks and name not in self.found:
            self.meter.start()

    def after(self, name: str, result: Any) -> None:
        """Take the peak of a first call and check its result."""
        if name in self.found:
            return
        values: dict[str, float] = {}
        if self.case.peaks and self.contestants[name].fresh:
            beyond = self.meter.growth() - sum(grad.nbytes for grad in result[1])
            values["peak_mib"] = beyond / MIB
        check = self.contestants[name].check
        self.found[name] = values | dict(check(result) if check else {})

    def failed(self, name: str, error: Exception) -> None:
        """Note why a contestant has no values, and let go of what its call held."""
        if self.contestants[name].needed:
            raise ContestantError(f"{name}: {summary(error)}") from error
        self.reasons[name] = summary(error)
        log(f"    without {name}: {self.reasons[name]}")
        error.__traceback__ = None
        free_memory()


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


def each(cases: Mapping[str, Callable[[], Iterator[Record]]]) -> Iterator[Record]:
    """Yield the records of cases one after the other; one that fails does not keep the next from being measured.

    Raises:
        ContestantError: at the end, naming those that failed.
    """
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


def summary(error: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def dtype_name(dtype: torch.dtype) -> str:
    """Return float32 or bfloat16."""
    return str(dtype).removeprefix("torch.")
