"""The loss with all gradients, one pytest-benchmark case for every contestant of every shape.

`pytest benchmarks/bench_loss.py --benchmark-only -k "gpt2-1k-bf16"`; `-k quick` takes seconds. All rounds of one
contestant run before those of the next: a look at one of them. `python -m benchmarks.suite heads` compares them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import shapes
from benchmarks.contestants import OURS, LineUp, asked_of
from benchmarks.measure import Contestant
from benchmarks.peers import BUILDERS
from benchmarks.problem import draw

CASES = {shape.name.replace(" ", "-"): shape for shape in (*shapes.CASES, *shapes.QUICK_CASES)}


@pytest.fixture(scope="module", params=CASES)
def contestants(request: pytest.FixtureRequest) -> Iterator[dict[str, Contestant]]:
    """Everyone who runs on a shape, by name, on tensors that are drawn once."""
    shape = CASES[request.param]
    yield {entry.name: entry for entry in LineUp(draw(shape)).everyone(asked_of(shape))}
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [OURS, *BUILDERS])
def test_loss_and_gradients(benchmark, request, contestants: dict[str, Contestant], name: str) -> None:
    entry = contestants.get(name)
    if entry is None or entry.absent:
        pytest.skip(f"{name} is not timed on this shape" if entry is None else entry.absent)
    benchmark.group = request.node.callspec.params["contestants"]
    result = benchmark.pedantic(entry.build(), rounds=5, warmup_rounds=1)
    if entry.check is not None:
        entry.check(result)
