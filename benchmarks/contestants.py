"""Everything that is run on one shape: the floor, ours, and the peers, as calls without arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.floor import Floor, plan_of
from benchmarks.peers import BUILDERS, Peer, ours, ours_dpo
from benchmarks.problem import Problem, draw
from benchmarks.shapes import CPO, DPO, NLL, NO_GRAD, PAIRS, tiny

FLOOR = "floor (bare torch.mm)"
FLOOR_REUSED = "floor, outputs reused"
FLOOR_DPO = "floor, DPO"
OURS = "cpo-kernels"
OURS_FP32_LOGITS = "cpo-kernels, fp32 logits"
OURS_PAIRS = "cpo-kernels, K = 1"
OURS_DPO = "cpo-kernels, DPO"

# What is compared with what: by the work that a contestant does.
FLOORS = {CPO: FLOOR, NLL: FLOOR, PAIRS: FLOOR, DPO: FLOOR_DPO}
OURS_ON = {CPO: OURS, NLL: OURS, PAIRS: OURS_PAIRS, DPO: OURS_DPO}


@dataclass(frozen=True)
class Contestant:
    """One entry of a shape: a call that returns (loss, gradients), with None for the loss of a floor."""

    name: str
    call: Callable[[], tuple[Tensor | None, tuple[Tensor, ...]]]
    warm_up: Callable[[], object]
    work: str
    fresh: bool = True  # its gradients are new memory


def contestant(peer: Peer, problem: Problem) -> Contestant:
    """A peer bound to its tensors; `problem` is read as the work that the peer does."""
    work = peer.work_on(problem.shape)
    if work is None:
        raise ValueError(f"{peer.name} does no work that compares with {problem.shape.work}, {problem.shape.mode}")
    problem = problem.as_work(work)

    def warm_up() -> object:
        # What a first call costs besides work: compilation needs the real shape, libraries and threads do not.
        # On a GPU, libraries choose their kernels by shape and the allocator grows to it.
        if peer.compiles or problem.hidden.is_cuda:
            return peer.run(problem)
        return peer.run(tiny_problem(problem))

    return Contestant(peer.name, lambda: peer.run(problem), warm_up, work)


def tiny_problem(problem: Problem) -> Problem:
    """The same work on few numbers."""
    small = draw(tiny(problem.shape))
    return small.as_dpo() if problem.shape.work == DPO else small


def floor(problem: Problem, budget: int | None, *, fresh: bool = True) -> Contestant:
    """The bare products; with `fresh` outputs as any call that returns gradients has them."""
    call, work = Floor(problem, budget, fresh=fresh), problem.shape.work
    warm_up = call if problem.hidden.is_cuda else Floor(tiny_problem(problem), None, fresh=True)
    return Contestant(FLOORS[work] if fresh else FLOOR_REUSED, call, warm_up, work, fresh)


def line_up(problem: Problem, peer_names: Sequence[str]) -> list[Contestant]:
    """Floor, ours and the named peers. Where a peer's work has one negative, ours does that work too."""
    shape = problem.shape
    budget = smallest_budget(problem) if shape.smallest_budget else None
    entries = [floor(problem, budget), contestant(ours(OURS, budget), problem)]
    if shape.variants and shape.mode != NO_GRAD:
        entries.append(floor(problem, budget, fresh=False))
    if shape.variants and shape.dtype.itemsize < 4:
        entries.append(contestant(ours(OURS_FP32_LOGITS, budget, torch.float32), problem))
    peers = [contestant(BUILDERS[name](), problem) for name in peer_names]
    works = {peer.work for peer in peers} - {shape.work}
    if PAIRS in works:
        entries.append(contestant(ours(OURS_PAIRS, budget), problem.as_pairs()))
    if DPO in works:
        pairs = problem.as_dpo()
        entries += [floor(pairs, budget), contestant(ours_dpo(OURS_DPO, budget), pairs)]
    return [*entries, *peers]


def smallest_budget(problem: Problem) -> int:
    """Bytes of the logits of one group: the least that needs no second pass."""
    plan = plan_of(problem, None)
    row_bytes = plan.logits_bytes // max(min(chunk.num_rows, chunk.rows_per_block) for chunk in plan.chunks)
    shape = problem.shape
    return row_bytes * shape.candidates * (shape.tokens - shape.prompt_tokens)


def forget_compiled() -> None:
    """Drop compiled code, so that no shape is run with what was compiled for another."""
    torch._dynamo.reset()
