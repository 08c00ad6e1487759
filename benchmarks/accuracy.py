"""Error of sequence log-likelihoods against fp64 on the same bf16 inputs: rounding of the logits adds up over a sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.contestants import OURS, OURS_FP32_LOGITS
from benchmarks.peers import BUILDERS, Peer, ours
from benchmarks.problem import Dense, draw
from benchmarks.shapes import Shape


@dataclass(frozen=True)
class LogpError:
    """Largest and mean absolute error over the sequences, in nats."""

    contestant: str
    largest: float
    mean: float


def measure(shape: Shape, device: torch.device | str = "cpu", peers: Sequence[str] | None = None) -> list[LogpError]:
    """Errors of ours, with the default and with fp32 logits, and of the peers (None: of every peer)."""
    problem = draw(shape, device=device)
    exact = Dense.of(problem).sequence_logps(problem).flatten()
    entries: list[tuple[str, Peer]] = [
        (OURS, ours(OURS)),
        (OURS_FP32_LOGITS, ours(OURS_FP32_LOGITS, logits_dtype=torch.float32)),
        *((name, build()) for name, build in BUILDERS.items() if peers is None or name in peers),
    ]
    errors = []
    for name, peer in entries:
        view = problem.as_pairs() if peer.pairs_only else problem
        with torch.no_grad():
            logps = peer.sequence_logps(view.hidden, view.weight, view.targets)
        error = (logps.flatten().double() - exact).abs()
        errors.append(LogpError(name, error.max().item(), error.mean().item()))
    return errors
