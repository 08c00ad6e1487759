"""The loss with all gradients, one pytest-benchmark case for every contestant of every shape.

`pytest benchmarks/bench_loss.py --benchmark-only -k gpt2-1k-bf16`; report.py is the comparison whose rounds take turns.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import shapes
from benchmarks.contestants import FLOOR, OURS, OURS_PAIRS, forget_compiled, line_up
from benchmarks.peers import BUILDERS, ours
from benchmarks.problem import Problem, draw
from benchmarks.report import peers_of
from benchmarks.shapes import Shape


@pytest.fixture(scope="module", params=shapes.CASES, ids=lambda shape: shape.name.replace(" ", "-"))
def problem(request: pytest.FixtureRequest) -> Iterator[Problem]:
    """The tensors of one shape, drawn once for all contestants."""
    yield draw(request.param)
    forget_compiled()


def applicable(name: str, shape: Shape) -> bool:
    """Whether a contestant is timed on this shape."""
    return name not in BUILDERS or name in peers_of(shape)


@pytest.mark.parametrize("name", [FLOOR, OURS, OURS_PAIRS, *BUILDERS])
def test_loss_and_gradients(benchmark, problem: Problem, name: str) -> None:
    if not applicable(name, problem.shape):
        pytest.skip(f"{name} is not timed on {problem.shape.name}: see shapes.py")
    benchmark.group = problem.shape.name
    needed = ["Liger CPO"] if name == OURS_PAIRS else [name] if name in BUILDERS else []
    entry = next(entry for entry in line_up(problem, needed) if entry.name == name)
    entry.warm_up()
    benchmark.pedantic(entry.call, rounds=3, iterations=1)


@pytest.mark.parametrize("name", ["one torch.mm", OURS])
def test_logps_without_gradients(benchmark, problem: Problem, name: str) -> None:
    benchmark.group = f"{problem.shape.name}, log-likelihoods only"
    hidden = problem.hidden.detach()[problem.targets != -100]
    weight = problem.weight.detach()

    def one_gemm() -> torch.Tensor:
        return torch.mm(hidden, weight.T)

    def logps() -> torch.Tensor:
        with torch.no_grad():
            return ours(OURS).sequence_logps(problem.hidden, problem.weight, problem.targets)

    benchmark.pedantic(logps if name == OURS else one_gemm, rounds=3, iterations=1, warmup_rounds=1)
