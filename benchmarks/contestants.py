"""Lines up everything that is run on one shape: the floor, ours, and the peers, held against one oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from benchmarks.floor import PRODUCTS, Floor, has_products_of_ours
from benchmarks.measure import Case, Contestant, not_here
from benchmarks.oracle import Oracles
from benchmarks.peers import BUILDERS, Peer, build, ours
from benchmarks.problem import Problem, draw
from benchmarks.shapes import CPO, NLL, PAIRS, Shape, tiny
from cpo_kernels.kernels.device import row_width

FLOOR = "floor (bare torch.mm)"
FLOOR_OURS = "floor (our bare products)"
OURS = "cpo-kernels"
OURS_FP32_LOGITS = "cpo-kernels, fp32 logits"
OURS_PAIRS = "cpo-kernels, K = 1"

# What is compared with what: by the work that a contestant does.
OURS_ON = {CPO: OURS, NLL: OURS, PAIRS: OURS_PAIRS}

Ceilings = Mapping[str, float]  # as benchmarks.ceilings measures them: TFLOP/s by the name of a dtype, for one


class LineUp:
    """Binds contestants to the tensors of one problem."""

    def __init__(self, problem: Problem, ceilings: Ceilings | None = None) -> None:
        self.problem, self.ceilings = problem, ceilings or {}
        self.oracles = Oracles(problem)
        self.budget = smallest_budget(problem) if problem.shape.smallest_budget else None

    def floor(self, work: str, name: str = FLOOR) -> Contestant:
        """Describe the bare products of some work, torch's or ours."""
        problem, ours_too = self.problem.as_work(work), name == FLOOR_OURS
        call = Floor.of(problem, self.budget, ours=ours_too)
        warm_up = call if problem.hidden.is_cuda else Floor.of(draw(tiny(problem.shape)), None, ours=ours_too)
        return Contestant(name, lambda: call, warm_up=warm_up, needed=True, **self.described(work))

    def peer(self, peer: Peer, work: str, *, needed: bool = False) -> Contestant:
        """Describe a peer that does some work on these tensors."""
        problem = self.problem.as_work(work)

        def warm_up() -> object:
            # What a first call costs besides work: compilation needs the real shape, libraries and threads do not.
            # On a GPU, libraries choose their kernels by shape and the allocator grows to it.
            return peer.run(problem if peer.compiles or problem.hidden.is_cuda else draw(tiny(problem.shape)))

        check = partial(self.oracles.check, work)
        call = partial(peer.run, problem)
        return Contestant(peer.name, lambda: call, check, warm_up, needed, **self.described(work))

    def described(self, work: str) -> dict[str, object]:
        """Return conditions, ratios and further values of who does some work."""
        shape = self.problem.shape
        conditions = {"K": shape.candidates - 1 if work == shape.work else 1, "work": work}
        ratios = {"floor": FLOOR, "floor_ours": FLOOR_OURS, "of_ours": OURS_ON[work]}
        return {"conditions": conditions, "ratios": ratios, "values": partial(rates, shape, self.ceilings)}

    def everyone(self, names: Sequence[str], builders: Mapping[str, Callable[[], Peer]] = BUILDERS) -> list[Contestant]:
        """Describe the floors, ours and the named peers. Where a peer's work has one negative, ours does that work too.

        A peer that has no form of the work is left out; one that is not installed is absent.
        """
        shape, problem = self.problem.shape, self.problem
        own_floor = [FLOOR_OURS] if has_products_of_ours(problem) else []
        found = [self.floor(shape.work, name) for name in (FLOOR, *own_floor)]
        found.append(self.peer(ours(OURS, self.budget), shape.work, needed=True))
        if shape.variants and shape.dtype.itemsize < 4:
            fp32_logits = ours(OURS_FP32_LOGITS, self.budget, torch.float32)
            found.append(self.peer(fp32_logits, shape.work, needed=True))
        peers, works = [], set()
        for name in names:
            peer = build(name, builders)
            if isinstance(peer, str):
                peers.append(not_here(name, peer))
            elif work := peer.work_on(problem.shape):
                works.add(work)
                peers.append(self.peer(peer, work))
        if PAIRS in works - {shape.work}:
            found.append(self.peer(ours(OURS_PAIRS, self.budget), PAIRS, needed=True))
        return [*found, *peers]

    def case(self, contestants: Sequence[Contestant], **options: object) -> Case:
        """Compare them on this problem."""
        shape = self.problem.shape
        given = {"conditions": shape.conditions, "rounds": shape.rounds, "peaks": True, "note": shape.note}
        return Case(shape.name, contestants, **given | options)


def asked_of(shape: Shape) -> tuple[str, ...]:
    """Return the peers that a shape asks for, installed or not, able or not."""
    return tuple(name for name in (BUILDERS if shape.peers is None else shape.peers) if name not in shape.without)


def smallest_budget(problem: Problem) -> int:
    """Return the bytes of the logits of one group: the least that needs no second pass."""
    row_bytes = row_width(len(problem.weight), problem.hidden.device) * problem.hidden.element_size()
    return row_bytes * (problem.shape.predicted_tokens // problem.shape.groups)


def rates(shape: Shape, ceilings: Ceilings, seconds: float) -> dict[str, float]:
    """Return the products a second that the work needs, and their share of the machine's multiply-adds."""
    tflops, dtype = PRODUCTS[shape.mode] * product_flops(shape) / seconds * 1e-12, shape.sizes["dtype"]
    return {"tflops": tflops} | ({"of_peak": tflops / ceilings[dtype]} if dtype in ceilings else {})


def product_flops(shape: Shape) -> int:
    """Count those of one product of the rows that predict a token."""
    return 2 * shape.predicted_tokens * shape.vocab * shape.hidden
