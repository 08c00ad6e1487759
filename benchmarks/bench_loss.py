"""The loss with all gradients, one pytest-benchmark case for every contestant of every shape.

`pytest benchmarks/bench_loss.py --benchmark-only -k "gpt2-1k-bf16"`; `-k quick` takes seconds. Every round is preceded
by a timed call of the floor, so that a drift of the machine hits both, and `extra_info` has the ratio of the two.
`python -m benchmarks.suite heads` is the comparison of all contestants, whose rounds take turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import pytest

from benchmarks import shapes
from benchmarks.contestants import (
    FLOOR,
    FLOOR_REUSED,
    FLOORS,
    OURS,
    OURS_DPO,
    OURS_FP32_LOGITS,
    OURS_PAIRS,
    Contestant,
    forget_compiled,
    line_up,
)
from benchmarks.peers import BUILDERS, asked_of, does, installed
from benchmarks.problem import Problem, draw
from benchmarks.timing import clock_for

CASES = {shape.name.replace(" ", "-"): shape for shape in (*shapes.CASES, *shapes.WIDE, *shapes.QUICK)}


@pytest.fixture(scope="module", params=CASES)
def problem(request: pytest.FixtureRequest) -> Iterator[Problem]:
    """The tensors of one shape, drawn once for all contestants."""
    yield draw(CASES[request.param])
    forget_compiled()


EVERYONE = [OURS, OURS_FP32_LOGITS, OURS_PAIRS, OURS_DPO, *BUILDERS]


def entries_of(problem: Problem) -> dict[str, Contestant]:
    """Everyone who runs on a shape, by name."""
    there, shape = installed()[0], problem.shape
    peers = [name for name in asked_of(shape) if name in there and does(name, shape)]
    return {entry.name: entry for entry in line_up(problem, peers) if entry.name != FLOOR_REUSED}


@pytest.mark.parametrize("name", EVERYONE)
def test_loss_and_gradients(benchmark, problem: Problem, name: str) -> None:
    entries = entries_of(problem)
    if name not in entries:
        pytest.skip(f"{name} is not timed on {problem.shape.name}: see shapes.py")
    benchmark.group = problem.shape.name
    entry, floor = entries[name], entries[FLOORS[entries[name].work]]
    floor.warm_up()
    entry.warm_up()
    clock, floors = clock_for(problem.hidden.device), []

    def setup() -> None:
        floors.append(clock(floor.call)[0])

    benchmark.pedantic(entry.call, setup=setup, rounds=problem.shape.rounds, iterations=1)
    if benchmark.stats is not None:  # None with --benchmark-disable
        seconds = benchmark.stats.stats.data
        benchmark.extra_info[FLOOR] = min(floors)
        benchmark.extra_info["x floor"] = min(seconds) / min(floors)
        ratios = [mine / its for mine, its in zip(seconds, floors, strict=True)]
        benchmark.extra_info["x floor, median of the rounds"] = statistics.median(ratios)
