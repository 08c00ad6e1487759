"""One shape, measured: every contestant checked against the oracle and timed against the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.contestants import (
    FLOOR,
    FLOOR_REUSED,
    OURS,
    OURS_PAIRS,
    Contestant,
    forget_compiled,
    line_up,
    smallest_budget,
)
from benchmarks.floor import plan_of
from benchmarks.problem import Dense, Errors, Oracle, Problem, draw
from benchmarks.shapes import Shape
from benchmarks.timing import Effort, Timing, round_robin
from cpo_kernels.planning import Plan

# Beyond this a contestant computes another loss; its rounding errors, which are printed, are far below.
SAME_LOSS = {torch.float32: 1e-3, torch.bfloat16: 1e-1}


class AnotherLossError(Exception):
    """A contestant's loss or gradient is not that of the others, so its time would mean nothing."""


@dataclass(frozen=True)
class Row:
    """One contestant on one shape. `errors` is None for the floor, which computes no loss."""

    contestant: str
    pairs: bool  # its loss is K = 1
    timing: Timing
    errors: Errors | None


@dataclass(frozen=True)
class CaseResult:
    """One shape: its rows, and the plan of our call."""

    shape: Shape
    rows: tuple[Row, ...]
    plan: Plan

    def best(self, contestant: str) -> float | None:
        """Fewest seconds of a contestant, None where it did not run."""
        return next((row.timing.best for row in self.rows if row.contestant == contestant), None)

    def over_floor(self, contestant: str, floor: str = FLOOR) -> float | None:
        """Time as a multiple of the floor's."""
        best, base = self.best(contestant), self.best(floor)
        return None if best is None or base is None else best / base


def measure_case(shape: Shape, peer_names: Sequence[str], effort: Effort) -> CaseResult:
    """Draw the shape, then time everyone on it; the first timed result of each is checked against fp64.

    Raises:
        AnotherLossError: a contestant is further from the oracle than rounding explains.
    """
    forget_compiled()
    problem = draw(shape)
    entries = {entry.name: entry for entry in line_up(problem, peer_names)}
    check = Check(problem, entries)
    for entry in entries.values():
        entry.warm_up()
    timings = round_robin(
        {name: entry.call for name, entry in entries.items()},
        effort,
        reference=FLOOR,
        always=(FLOOR_REUSED, OURS, OURS_PAIRS),
        after=check,
    )
    rows = tuple(
        Row(name, entry.problem is not None and entry.problem is not problem, timings[name], check.errors.get(name))
        for name, entry in entries.items()
    )
    budget = smallest_budget(problem) if shape.smallest_budget else None
    return CaseResult(shape, rows, plan_of(problem, budget))


class Check:
    """Compares the first result of every contestant with the oracle of the loss that it computes."""

    def __init__(self, problem: Problem, entries: Mapping[str, Contestant]) -> None:
        dense = Dense.of(problem)
        self.oracle, self.pairs_oracle = Oracle(problem, dense), Oracle(problem.as_pairs(), dense)
        self.entries, self.problem = entries, problem
        self.errors: dict[str, Errors] = {}

    def __call__(self, name: str, result: object) -> None:
        """Record the errors of a contestant's first result; the floor has none."""
        computed = self.entries[name].problem
        if computed is None or name in self.errors:
            return
        loss, grads = result  # type: ignore[misc]
        oracle = self.oracle if computed is self.problem else self.pairs_oracle
        errors = oracle.errors(loss, *grads)
        bound = SAME_LOSS[self.problem.shape.dtype]
        # not <=: NaN is another loss too
        if not errors.worst() <= bound:
            raise AnotherLossError(f"{name} on {self.problem.shape.name}: {errors}, expected at most {bound}")
        self.errors[name] = errors
