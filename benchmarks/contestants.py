"""Lines up everything that is run on one shape: the floor, ours, and the peers, held against one oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from benchmarks.floor import Floor, plan_of, products
from benchmarks.measure import Case, Contestant
from benchmarks.oracle import Oracles
from benchmarks.peers import BUILDERS, Peer, build, ours, ours_dpo
from benchmarks.problem import Problem, draw
from benchmarks.shapes import CPO, DPO, NLL, NO_GRAD, PAIRS, TRAINED, Shape, tiny

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

Ceilings = Mapping[str, float]  # TFLOP/s by the name of a dtype, and GB/s as "copy"


class LineUp:
    """Binds contestants to the tensors of one problem."""

    def __init__(self, problem: Problem, ceilings: Ceilings | None = None) -> None:
        self.problem, self.ceilings = problem, ceilings or {}
        self.oracles = Oracles(problem)
        self.budget = smallest_budget(problem) if problem.shape.smallest_budget else None

    def floor(self, work: str, *, fresh: bool = True) -> Contestant:
        """Describe the bare products of some work; with `fresh` outputs as any call that returns gradients has them."""
        problem = self.problem.as_work(work)
        call = Floor.of(problem, self.budget, fresh=fresh)
        warm_up = call if problem.hidden.is_cuda else Floor.of(tiny_problem(problem), None)
        name = FLOORS[work] if fresh else FLOOR_REUSED
        return Contestant(name, lambda: call, warm_up=warm_up, needed=True, fresh=fresh, **self.described(work))

    def peer(self, peer: Peer, work: str, *, needed: bool = False) -> Contestant:
        """Describe a peer that does some work on these tensors."""
        problem = self.problem.as_work(work)

        def warm_up() -> object:
            # What a first call costs besides work: compilation needs the real shape, libraries and threads do not.
            # On a GPU, libraries choose their kernels by shape and the allocator grows to it.
            return peer.run(problem if peer.compiles or problem.hidden.is_cuda else tiny_problem(problem))

        check = partial(self.oracles.check, work)
        call = partial(peer.run, problem)
        return Contestant(peer.name, lambda: call, check, warm_up, needed, **self.described(work))

    def described(self, work: str) -> dict[str, object]:
        """Return conditions, ratios and further values of who does some work."""
        shape = self.problem.shape
        conditions = {"K": shape.negatives if work == shape.work else 1, "work": work}
        ratios = {"floor": FLOORS[work], "of_ours": OURS_ON[work]}
        return {"conditions": conditions, "ratios": ratios, "values": partial(rates, shape, work, self.ceilings)}

    def everyone(self, names: Sequence[str], builders: Mapping[str, Callable[[], Peer]] = BUILDERS) -> list[Contestant]:
        """Describe floor, ours and the named peers. Where a peer's work has one negative, ours does that work too.

        A peer that has no form of the work is left out; one that is not installed is absent.
        """
        shape, problem = self.problem.shape, self.problem
        found = [self.floor(shape.work), self.peer(ours(OURS, self.budget), shape.work, needed=True)]
        if shape.variants and shape.mode != NO_GRAD:
            found.append(self.floor(shape.work, fresh=False))
        if shape.variants and shape.dtype.itemsize < 4:
            fp32_logits = ours(OURS_FP32_LOGITS, self.budget, torch.float32)
            found.append(self.peer(fp32_logits, shape.work, needed=True))
        peers, works = [], set()
        for name in names:
            peer = build(name, builders)
            if isinstance(peer, str):
                peers.append(Contestant(name, lambda: lambda: None, absent=peer))
            elif work := peer.work_on(problem.shape):
                works.add(work)
                peers.append(self.peer(peer, work))
        if PAIRS in works - {shape.work}:
            found.append(self.peer(ours(OURS_PAIRS, self.budget), PAIRS, needed=True))
        if DPO in works - {shape.work}:
            found += [self.floor(DPO), self.peer(ours_dpo(OURS_DPO, self.budget), DPO, needed=True)]
        return [*found, *peers]

    def case(self, contestants: Sequence[Contestant], **options: object) -> Case:
        """Compare them on this problem."""
        shape = self.problem.shape
        given = {"conditions": shape.conditions, "rounds": shape.rounds, "note": shape.note}
        return Case(shape.name, contestants, peaks=True, **given | options)


def asked_of(shape: Shape) -> tuple[str, ...]:
    """Return the peers that a shape asks for, installed or not, able or not."""
    return tuple(name for name in (BUILDERS if shape.peers is None else shape.peers) if name not in shape.without)


def tiny_problem(problem: Problem) -> Problem:
    """Draw the same work on few numbers."""
    work = problem.shape.work
    small = draw(tiny(problem.shape))
    return small.as_dpo() if work == DPO else small


def smallest_budget(problem: Problem) -> int:
    """Return the bytes of the logits of one group: the least that needs no second pass."""
    plan, shape = plan_of(problem, None), problem.shape
    row_bytes = plan.logits_bytes // max(min(chunk.num_rows, chunk.rows_per_block) for chunk in plan.chunks)
    return row_bytes * (shape.predicted_tokens // shape.groups)


def forget_compiled() -> None:
    """Drop compiled code, so that no shape is run with what was compiled for another."""
    torch._dynamo.reset()


def rates(shape: Shape, work: str, ceilings: Ceilings, seconds: float) -> dict[str, float]:
    """Return products and bytes a second, and their shares of the ceilings."""
    tflops = products(shape, work) * product_flops(shape) / seconds * 1e-12
    gbs = compulsory_bytes(shape, work) / seconds * 1e-9
    values, dtype = {"tflops": tflops, "gbs": gbs}, shape.sizes["dtype"]
    if dtype in ceilings:
        values |= {"of_tflops": tflops / ceilings[dtype], "of_gbs": gbs / ceilings["copy"]}
    return values


def product_flops(shape: Shape) -> int:
    """Count those of one product of the rows that predict a token."""
    return 2 * shape.predicted_tokens * shape.vocab * shape.hidden


def compulsory_bytes(shape: Shape, work: str) -> int:
    """Count every input that is needed as read once, every gradient as written once; no logits."""
    hidden, weight = (n * shape.hidden * shape.dtype.itemsize for n in (shape.predicted_tokens, shape.vocab))
    of_hidden = 1 + (shape.mode != NO_GRAD) + (work == DPO)
    of_weight = 1 + (shape.mode == TRAINED) + (work == DPO)
    return of_hidden * hidden + of_weight * weight
