"""One shape, measured: every contestant checked against the oracle and timed against the floor."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch

from benchmarks.contestants import (
    FLOOR,
    FLOORS,
    OURS_ON,
    Contestant,
    forget_compiled,
    line_up,
    smallest_budget,
)
from benchmarks.environment import log
from benchmarks.floor import plan_of
from benchmarks.memory import meter_for
from benchmarks.oracle import Dense, Errors, Oracle
from benchmarks.problem import Problem, draw
from benchmarks.shapes import Shape
from benchmarks.timing import Call, Effort, Timing, clock_for, round_robin
from cpo_kernels.engine.plan import Plan

T = TypeVar("T")

# Beyond this a contestant computes another loss; its rounding errors, which are printed, are half of it at most.
SAME_LOSS = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


class ContestantError(Exception):
    """A contestant could not be measured: ``contestant`` says which, ``reason`` why."""

    def __init__(self, contestant: str, reason: str) -> None:
        super().__init__(f"{contestant} {reason}")
        self.contestant, self.reason = contestant, reason


class AnotherLossError(ContestantError):
    """A contestant's loss or gradient is not that of the others, so its time would mean nothing."""


@dataclass(frozen=True)
class Row:
    """One contestant on one shape. `errors` is None for the floor, which computes no loss."""

    contestant: str
    work: str
    timing: Timing
    errors: Errors | None
    peak: int | None  # bytes beyond inputs and gradients, in this process; None where outputs are reused


@dataclass(frozen=True)
class CaseResult:
    """One shape: its rows, the plan of our call, and why peers that were asked for have no row."""

    shape: Shape
    rows: tuple[Row, ...]
    plan: Plan
    failed: Mapping[str, str] = field(default_factory=dict)

    def best(self, contestant: str) -> float | None:
        """Fewest seconds of a contestant, None where it did not run."""
        return next((row.timing.best for row in self.rows if row.contestant == contestant), None)

    def seconds(self, contestant: str) -> float:
        """The same of one that is always there."""
        return next(row.timing.best for row in self.rows if row.contestant == contestant)

    def over_floor(self, contestant: str, floor: str = FLOOR) -> float | None:
        """Time as a multiple of the floor's."""
        best, base = self.best(contestant), self.best(floor)
        return None if best is None or base is None else best / base


def measure_case(
    shape: Shape,
    peer_names: Sequence[str],
    effort: Effort,
    device: torch.device | str = "cpu",
    *,
    drop_failing: bool = False,
) -> CaseResult:
    """Draw the shape on a device, then time everyone on it; the first timed result of each is checked against fp64.

    With `drop_failing` a peer whose warm-up fails, by lack of memory for instance, is left out and the others go on.

    Raises:
        AnotherLossError: a contestant is further from the oracle than rounding explains.
        ContestantError: a contestant's call failed, from that error.
    """
    forget_compiled()
    problem = draw(shape, device=device)
    entries = {entry.name: entry for entry in line_up(problem, peer_names)}
    inspection = Inspection(problem, entries)
    failed = warm_up(entries, optional=peer_names if drop_failing else ())
    timings = round_robin(
        {name: named(name, entry.call) for name, entry in entries.items()},
        effort,
        reference=FLOOR,
        always={*FLOORS.values(), *OURS_ON.values()},
        observer=inspection,
        clock=clock_for(problem.hidden.device),
    )
    rows = tuple(
        Row(name, entry.work, timings[name], inspection.errors.get(name), inspection.peaks.get(name))
        for name, entry in entries.items()
    )
    budget = smallest_budget(problem) if shape.smallest_budget else None
    return CaseResult(shape, rows, plan_of(problem, budget), failed)


def measure_those_that_run(
    shape: Shape, peer_names: Sequence[str], effort: Effort, device: torch.device | str = "cpu"
) -> CaseResult:
    """The case without those peers that compute another loss or fail; `failed` says why each of them has no row.

    Raises:
        ContestantError: the floor or ours failed.
    """
    failed: dict[str, str] = {}
    while True:
        left = [name for name in peer_names if name not in failed]
        try:
            result = measure_case(shape, left, effort, device, drop_failing=True)
            return replace(result, failed=failed | result.failed)
        except ContestantError as error:
            if error.contestant not in left:
                raise
            failed[error.contestant] = error.reason
            log(f"  once more without {error}")
        free_memory()  # after the handler: until there the error holds the tensors of the call


def warm_up(entries: dict[str, Contestant], optional: Sequence[str]) -> dict[str, str]:
    """Run everyone once; of those in `optional`, take out of `entries` who fails, and return why."""
    failed = {}
    for name, entry in list(entries.items()):
        try:
            named(name, partial(run_to_the_end, entry.warm_up))()
        except ContestantError as error:
            if name not in optional:
                raise
            failed[name] = error.reason
            del entries[name]
        if name in failed:  # after the handler: until there the error holds the tensors of the call
            free_memory()
    return failed


def run_to_the_end(call: Call) -> None:
    """Until the device is done with it too, so that its errors are not another's."""
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Hand back what a failed call held."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def named(contestant: str, call: Callable[[], T]) -> Callable[[], T]:
    """The call with its errors under the contestant's name."""

    def run() -> T:
        try:
            return call()
        except Exception as error:  # a contestant may fail in any way of its own
            raise ContestantError(contestant, f"failed with {summary(error)}") from error

    return run


def summary(error: Exception) -> str:
    """Its type and first line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


class Inspection:
    """Holds the first result of every contestant against the oracle of its loss, and takes the peak of that call."""

    def __init__(self, problem: Problem, entries: Mapping[str, Contestant]) -> None:
        dense, works = Dense.of(problem), {entry.work for entry in entries.values()}
        self.oracles = {work: Oracle(problem.as_work(work), dense) for work in works}
        self.shape = problem.shape
        self.entries = entries
        self.meter = meter_for(problem.hidden.device)
        self.seen: set[str] = set()
        self.errors: dict[str, Errors] = {}
        self.peaks: dict[str, int] = {}

    def before(self, name: str) -> None:
        """Start the meter for a first call."""
        if name not in self.seen:
            self.meter.start()

    def after(self, name: str, result: object) -> None:
        """Record peak and errors of a first call."""
        if name in self.seen:
            return
        self.seen.add(name)
        growth, entry = self.meter.growth(), self.entries[name]
        loss, grads = result  # type: ignore[misc]
        if entry.fresh:
            self.peaks[name] = growth - sum(grad.nbytes for grad in grads)
        if loss is None:
            return
        errors = named(name, lambda: self.oracles[entry.work].errors(loss, grads))()
        bound = SAME_LOSS[self.shape.dtype]
        if not errors.worst() <= bound:  # not `>`: NaN is another loss too
            raise AnotherLossError(name, f"on {self.shape.name}: {errors}, expected at most {bound}")
        self.errors[name] = errors
