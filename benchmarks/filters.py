"""Part `filters`: candidate_eps and grad_filter_eps on the head of a real CPO run, after 200 and after 2,000 steps.

The run (benchmarks.real_run) is made here. Texts that it was not trained on are given to the head as it was at some
steps. The eps of a filter is chosen for the whole run from a handful of early steps: the largest of a grid that keeps
the gradients of all of them within 1e-3 of the exact call's. At later steps it is timed on other texts, and every other
eps of the grid beside it. The contrast alone is what the filters are for; with the run's NLL beside it no ground truth
is settled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import real_run
from benchmarks.contestants import FLOOR, OURS
from benchmarks.floor import Floor, product_rows
from benchmarks.measure import Case, Contestant, dtype_name, free_memory, measure, ready
from benchmarks.oracle import Dense, Oracle, relative, require_same
from benchmarks.real_run import Looked
from benchmarks.records import Record
from benchmarks.setting import Setting

CANDIDATES, COLUMNS, BOTH = "candidate_eps", "grad_filter_eps", "both"
BAR = 1e-3  # of the gradient
# By half decades; 0 leaves nothing out.
GRIDS = {CANDIDATES: [10 ** (i / 2) for i in range(-6, 1)], COLUMNS: [10 ** (i / 2) for i in range(-12, -5)]}
WIDTH, QUICK_WIDTH = 768, 48  # of the wide head
Eps = Mapping[str, float]


def at_bar(name: str) -> str:
    """Name the contestant whose eps is as large as the bar of the gradient's error allows."""
    return f"{name} at error 1e-3"


def run(setting: Setting) -> Iterator[Record]:
    """Measure the later steps: the contrast alone in both dtypes, a wider head, and at last with the NLL."""
    early, later = real_run.train_in_a_process(setting)
    chosen = choose([Head("", looked.to(torch.float32, mle_weight=0.0), setting) for looked in early])
    for looked in later:
        for name, problem in variants(looked, setting, last=looked is later[-1]).items():
            yield from Head(f"after {looked.step} steps, {name}", problem, setting).records(chosen)
            free_memory()


def variants(looked: Looked, setting: Setting, *, last: bool) -> dict[str, Looked]:
    """Return what is measured of one step; a wide head has the run's logits, at the width of a model that is used."""
    found = {dtype_name(dtype): looked.to(dtype, mle_weight=0.0) for dtype in (torch.float32, torch.bfloat16)}
    if not setting.on_gpu:
        wide = widened(looked, QUICK_WIDTH if setting.quick else WIDTH)
        found["bfloat16, wide"] = wide.to(torch.bfloat16, mle_weight=0.0)
    return found | ({"float32, with NLL": looked.to(torch.float32)} if last else {})


def widened(looked: Looked, width: int) -> Looked:
    """Return the same logits and norms of gradients, from (R, width) and (V, width): both turned by an isometry."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(width, looked.hidden.shape[1], generator=generator)).Q.T.to(looked.hidden)
    return replace(looked, hidden=looked.hidden @ turn, weight=looked.weight @ turn)


def choose(heads: Sequence[Head]) -> dict[str, Eps]:
    """Return the eps of each filter, and of both, that are within the bar on all of some heads."""

    def within(**eps: float) -> bool:
        return all(head.error_of_filter(**eps) <= BAR for head in heads)

    alone = {name: max((eps for eps in grid if within(**{name: eps})), default=0.0) for name, grid in GRIDS.items()}
    for share in (1.0, 0.3, 0.1, 0.0):  # of both, the columns give way
        both = {CANDIDATES: alone[CANDIDATES], COLUMNS: share * alone[COLUMNS]}
        if within(**both):
            break
    return {at_bar(name): {name: eps} for name, eps in alone.items()} | {at_bar(BOTH): both}


class Head:
    """Measures filters on one problem, with the exact gradients at hand."""

    def __init__(self, name: str, problem: Looked, setting: Setting) -> None:
        self.name, self.problem, self.setting = name, problem, setting
        dense = Dense(problem.hidden, problem.weight, problem.targets, problem.layout.rows)
        self.oracle, self.single = Oracle(dense, problem.loss_of), problem.to(torch.float32)

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """Returns the exact gradients in float32."""
        result = self.single.run()
        require_same(self.errors(result), torch.float32)
        return result[1]

    def records(self, chosen: Mapping[str, Eps]) -> list[Record]:
        """Measure floor, the exact call, every eps of the grids, and those chosen."""
        problem = self.problem
        floor = Floor(problem.hidden, problem.weight, product_rows(problem.plan()))
        step = 3 if self.setting.quick else 1
        ranges = {f"{name} {eps:.2g}": {name: eps} for name, grid in GRIDS.items() for eps in grid[::step]}
        filtered = [self.contestant(*one) for one in (ranges | dict(chosen)).items()]
        contestants = [ready(FLOOR, floor), self.contestant(OURS, {}), *filtered]
        ratios, rounds = {"floor": FLOOR, "of_ours": OURS}, self.setting.rounds(5, 5)
        case = Case(self.name, contestants, problem.conditions, ratios, rounds=rounds, peaks=True)
        return measure(case, self.setting.device)

    def contestant(self, name: str, eps: Eps) -> Contestant:
        """Describe our call with a filter."""
        return ready(name, partial(self.problem.run, **eps), check=partial(self.check, eps))

    def check(self, eps: Eps, result: Any) -> dict[str, float]:
        """Return the errors of a result; where a filter leaves something out, only the loss must be the same."""
        errors = self.errors(result)
        require_same({"error_loss": errors["error_loss"]} if eps else errors, self.problem.hidden.dtype)
        return errors | {"dropped": result[2], "error_filter": self.error_of_filter(**eps), **eps}

    def errors(self, result: Any) -> dict[str, float]:
        """Compare with float64."""
        return self.oracle.errors(result[0].item(), *result[1])

    def error_of_filter(self, **eps: float) -> float:
        """Return what a filter does to a gradient, the larger of both: float32 on the same values, so no rounding."""
        filtered = self.single.run(**eps)[1] if eps else self.exact
        return max(relative(own, right) for own, right in zip(filtered, self.exact, strict=True))
