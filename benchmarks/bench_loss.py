"""The loss with all gradients, a pytest-benchmark case for every contestant of every shape, one after the other.

`pytest benchmarks/bench_loss.py --benchmark-only -k "gpt2-1k-bf16"`; `-k quick` takes seconds. It is a look at one of
them: `python -m benchmarks.suite heads` compares them, in turns.
"""

import pytest

from benchmarks import shapes
from benchmarks.contestants import OURS, LineUp, asked_of
from benchmarks.peers import BUILDERS
from benchmarks.problem import draw


@pytest.mark.parametrize("name", [OURS, *BUILDERS])
@pytest.mark.parametrize("shape", [*shapes.CASES, *shapes.QUICK_CASES], ids=lambda shape: shape.name.replace(" ", "-"))
def test_loss_and_gradients(benchmark, shape, name):
    entry = {entry.name: entry for entry in LineUp(draw(shape)).everyone(asked_of(shape))}.get(name)
    if entry is None or entry.absent:
        pytest.skip(f"{name} is not timed on this shape" if entry is None else entry.absent)
    result = benchmark.pedantic(entry.build(), rounds=5, warmup_rounds=1)
    if entry.check is not None:
        entry.check(result)
