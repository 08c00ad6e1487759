"""Error of sequence log-likelihoods against fp64 on the same bf16 inputs: rounding of the logits adds up over a sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.contestants import OURS, OURS_FP32_LOGITS
from benchmarks.oracle import Dense
from benchmarks.peers import BUILDERS, Peer, ours
from benchmarks.problem import Problem, draw
from benchmarks.shapes import CPO, Shape


@dataclass(frozen=True)
class LogpError:
    """Largest and mean absolute error over the sequences, in nats."""

    contestant: str
    largest: float
    mean: float


def contestants(peers: Sequence[str] | None = None) -> dict[str, Callable[[], Peer]]:
    """Ours, with the default and with fp32 logits, and the peers (None: every peer)."""
    return {
        OURS: partial(ours, OURS),
        OURS_FP32_LOGITS: partial(ours, OURS_FP32_LOGITS, logits_dtype=torch.float32),
        **{name: build for name, build in BUILDERS.items() if peers is None or name in peers},
    }


def exact_logps(problem: Problem) -> Tensor:
    """Log-likelihoods in fp64, (sequences,)."""
    return Dense.of(problem).sequence_logps(problem).flatten()


def error_of(name: str, peer: Peer, problem: Problem, exact: Tensor) -> LogpError:
    """One contestant's; a peer that knows only pairs reads the sequences two by two."""
    view = problem if peer.work == CPO else problem.as_pairs()
    with torch.no_grad():
        logps = peer.sequence_logps(view.hidden, view.weight, view.targets)  # type: ignore[misc]
    error = (logps.flatten().double() - exact).abs()
    return LogpError(name, error.max().item(), error.mean().item())


def measure(shape: Shape, device: torch.device | str = "cpu", peers: Sequence[str] | None = None) -> list[LogpError]:
    """Errors of all contestants."""
    problem = draw(shape, device=device)
    exact = exact_logps(problem)
    return [error_of(name, build(), problem, exact) for name, build in contestants(peers).items()]
