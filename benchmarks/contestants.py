"""Everything that is run on one shape: the floor, ours, and the peers, as calls without arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.floor import Floor, plan_of
from benchmarks.peers import BUILDERS, Peer, ours
from benchmarks.problem import Problem, draw
from benchmarks.shapes import tiny

FLOOR = "floor (three torch.mm)"
FLOOR_REUSED = "floor, outputs reused"
OURS = "cpo-kernels"
OURS_FP32_LOGITS = "cpo-kernels, fp32 logits"
OURS_PAIRS = "cpo-kernels, K = 1"


@dataclass(frozen=True)
class Contestant:
    """One entry of a shape: a call that returns (loss, gradients), with None for the loss of a floor."""

    name: str
    call: Callable[[], tuple[Tensor | None, tuple[Tensor, Tensor]]]
    warm_up: Callable[[], object]
    pairs: bool = False  # its loss is K = 1
    fresh: bool = True  # its gradients are new memory


def contestant(peer: Peer, problem: Problem) -> Contestant:
    """A peer bound to its tensors; `problem` is read as pairs where the peer contrasts pairs only."""
    if peer.pairs_only and problem.ref_logps is not None:
        problem = problem.as_pairs()

    def warm_up() -> object:
        # What a first call costs besides work: compilation needs the real shape, libraries and threads do not.
        # On a GPU, libraries choose their kernels by shape and the allocator grows to it.
        if peer.compiles or problem.hidden.is_cuda:
            return peer.run(problem)
        small = draw(tiny(problem.shape))
        return peer.run(small.as_pairs() if peer.pairs_only else small)

    return Contestant(peer.name, lambda: peer.run(problem), warm_up, pairs=problem.ref_logps is None)


def floor(problem: Problem, budget: int | None, *, fresh: bool = True) -> Contestant:
    """The bare products; with `fresh` outputs as any call that returns gradients has them."""
    call = Floor(problem, budget, fresh=fresh)
    warm_up = call if problem.hidden.is_cuda else Floor(draw(tiny(problem.shape)), None, fresh=True)
    return Contestant(FLOOR if fresh else FLOOR_REUSED, call, warm_up, fresh=fresh)


def line_up(problem: Problem, peer_names: Sequence[str]) -> list[Contestant]:
    """Floor, ours and the named peers. Where a peer contrasts pairs only, ours also runs on pairs."""
    budget = smallest_budget(problem) if problem.shape.smallest_budget else None
    floors = [floor(problem, budget), floor(problem, budget, fresh=False)]
    entries = [contestant(ours(OURS, budget), problem)]
    if problem.shape.dtype.itemsize < 4:
        entries.append(contestant(ours(OURS_FP32_LOGITS, budget, torch.float32), problem))
    peers = [BUILDERS[name]() for name in peer_names]
    if any(peer.pairs_only for peer in peers):
        entries.append(contestant(ours(OURS_PAIRS, budget), problem.as_pairs()))
    return [*floors, *entries, *(contestant(peer, problem) for peer in peers)]


def smallest_budget(problem: Problem) -> int:
    """Bytes of the logits of one group: the least that needs no second pass."""
    plan = plan_of(problem, None)
    row_bytes = plan.logits_bytes // max(min(chunk.num_rows, chunk.rows_per_block) for chunk in plan.chunks)
    shape = problem.shape
    return row_bytes * shape.candidates * (shape.tokens - shape.prompt_tokens)


def forget_compiled() -> None:
    """Drop compiled code, so that no shape is run with what was compiled for another."""
    torch._dynamo.reset()
