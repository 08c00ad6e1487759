"""Part `filters`: candidate_eps and grad_filter_eps on the head of a real CPO run, after 200 and after 2,000 steps.

The run (benchmarks.real_run) is made here. A batch of texts that it was not trained on is then given to the head as it
was at those steps: exact, with each filter over a range of eps, and with the largest eps that keeps the gradient
within 1e-3 of the exact call's. The contrast alone is what the filters are for; with the run's NLL beside it the
ground truths are never settled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks import real_run
from benchmarks.contestants import FLOOR, OURS
from benchmarks.floor import Floor, product_rows
from benchmarks.measure import Case, Contestant, free_memory, measure, ready
from benchmarks.oracle import Dense, Oracle, relative, require_same
from benchmarks.real_run import Looked
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.timing import Call

CANDIDATES, COLUMNS = "candidate_eps", "grad_filter_eps"
FILTERS = (CANDIDATES, COLUMNS)
BOTH = "both"
CCE = "Cut Cross-Entropy"
BAR = 1e-3  # of the gradient
GRIDS = {CANDIDATES: (-3.0, 0.0, 4), COLUMNS: (-6.0, -3.0, 4)}  # least and largest eps as logarithms, and points
QUICK_POINTS = 3
WIDTH, QUICK_WIDTH = 768, 48  # of the wide head
REFINED = 3  # halvings, in logarithms, between two points of a grid
SETTLED = 1e-2  # of the largest coefficient
LOSSES = ("loss", "contrastive_loss", "nll_loss", "accuracy")
Eps = Mapping[str, float]


def grid(name: str, *, quick: bool = False) -> list[float]:
    """Return values of a filter's eps, increasing by the same factor each."""
    low, high, points = GRIDS[name]
    return torch.logspace(low, high, QUICK_POINTS if quick else points, dtype=torch.float64).tolist()


def at_bar(name: str) -> str:
    """Name the contestant whose eps is as large as the bar of the gradient's error allows."""
    return f"{name} at error 1e-3"


def run(setting: Setting) -> Iterator[Record]:
    """Measure both steps: the contrast alone in float32 and bfloat16, a wider head, and with the NLL."""
    made = real_run.train_in_a_process(setting)
    for looked in made.looked:
        yield about(looked, made)
        for head in heads(looked, setting, last=looked is made.looked[-1]):
            yield from head.records()
            free_memory()


def heads(looked: Looked, setting: Setting, *, last: bool) -> Iterator[Head]:
    """Yield what is measured of one step; the wide head has the run's logits, at the width of a model that is used.

    In bfloat16 the eps are those that float32 found, less by what rounding may change.
    """
    after, alone = f"after {looked.step} steps", {"mle_weight": 0.0}
    exact = Head(f"{after}, float32", looked.to(torch.float32, **alone), setting)
    yield exact
    chosen = {name: {key: 0.9 * value for key, value in eps.items()} for name, eps in exact.chosen.items()}
    rest = {"ranges": False, "chosen": chosen}
    yield Head(f"{after}, bfloat16", looked.to(torch.bfloat16, **alone), setting, **rest)
    if not setting.on_gpu:
        wide = widened(looked, QUICK_WIDTH if setting.quick else WIDTH)
        yield Head(f"{after}, bfloat16, wide", wide.to(torch.bfloat16, **alone), setting, **rest)
    if last:
        yield Head(f"{after}, float32, with NLL", looked.to(torch.float32), setting, ranges=False)


def widened(looked: Looked, width: int) -> Looked:
    """Return the same logits and norms of gradients, from (R, width) and (V, width): both turned by an isometry."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(width, looked.hidden.shape[1], generator=generator)).Q.T.to(looked.hidden)
    return replace(looked, hidden=looked.hidden @ turn, weight=looked.weight @ turn)


def about(looked: Looked, made: real_run.Run) -> Record:
    """Say what the contrast looks like at a step: the more is settled, the more there is to leave out."""
    problem = looked.to(torch.float32, mle_weight=0.0)
    with torch.no_grad():
        rewards = problem.output().rewards
    coefficients = contrast_shares(rewards.cpu().double(), looked.layout.cu_groups)
    truths = coefficients[looked.layout.cu_groups[:-1]]
    values = {
        "settled": float((coefficients <= SETTLED).double().mean()),
        "settled_groups": float((truths <= SETTLED).double().mean()),
        "coefficient_median": float(coefficients.median()),
    }
    losses = next((entry for entry in reversed(made.losses) if entry.get("step", math.inf) <= looked.step), {})
    values |= {name: losses[name] for name in LOSSES if name in losses}
    return Record(f"after {looked.step} steps", "the run", values, problem.conditions, made.source)


def contrast_shares(rewards: Tensor, cu_groups: Sequence[int]) -> Tensor:
    """Return coefficients (S,) of an unranked contrast over beta / num_groups: softmax, for a truth 1 - softmax."""
    shares = []
    for start, end in pairwise(cu_groups):
        own = torch.softmax(rewards[start:end], 0)
        own[0] = 1 - own[0]
        shares.append(own)
    return torch.cat(shares)


@dataclass
class Head:
    """Measures filters on one problem.

    Attributes:
        name: of the records' case.
        problem: what every contestant is given.
        setting: of the suite.
        ranges: whether every eps of the grids is timed too.
        chosen: eps of the contestants at the bar; found by :meth:`records` where not given.
    """

    name: str
    problem: Looked
    setting: Setting
    ranges: bool = True
    chosen: dict[str, Eps] = field(default_factory=dict)
    known: dict[tuple[tuple[str, float], ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problem = self.problem
        dense = Dense(problem.hidden, problem.weight, problem.targets, problem.rows)
        self.oracle, self.single = Oracle(dense, problem.loss_of), problem.to(torch.float32)

    @cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """Return the exact gradients in float32."""
        result = self.single.run()
        require_same(self.errors(result), torch.float32)
        return result[1]

    def records(self) -> Iterator[Record]:
        """Measure the ranges of eps, then those at the bar."""
        grids = {name: grid(name, quick=self.setting.quick) for name in FILTERS}
        if self.ranges:
            ranges = {f"{name} {eps:.2g}": {name: eps} for name in FILTERS for eps in grids[name]}
            yield from self.timed([self.filtered(*one) for one in ranges.items()], "ranges")
        if not self.chosen:
            alone = {
                name: largest_within(lambda eps, name=name: self.of_filter(**{name: eps}), grids[name])
                for name in FILTERS
            }
            self.chosen = {at_bar(name): {name: eps} for name, eps in alone.items()}
            self.chosen[at_bar(BOTH)] = self.both(alone)
        filtered = [self.filtered(*one) for one in self.chosen.items()]
        yield from self.timed([*filtered, self.cut_cross_entropy()], "the bar")

    def timed(self, contestants: Sequence[Contestant], beside: str) -> list[Record]:
        """Measure floor and exact call beside others."""
        problem = self.problem
        floor = Floor(problem.hidden, problem.weight, product_rows(problem.plan()))
        exact = ready(OURS, problem.run, check=partial(self.check, {}))
        conditions, rounds = problem.conditions | {"beside": beside}, self.setting.rounds(3, 5)
        ratios = {"floor": FLOOR, "of_ours": OURS}
        case = Case(
            self.name, [ready(FLOOR, floor), exact, *contestants], conditions, ratios, rounds=rounds, peaks=True
        )
        return measure(case, self.setting.device)

    def filtered(self, name: str, eps: Eps) -> Contestant:
        """Describe our call with a filter."""
        return ready(name, partial(self.problem.run, **eps), check=partial(self.check, eps))

    def check(self, eps: Eps, result: Any) -> dict[str, float]:
        """Return the errors of a result; where a filter leaves something out, only the loss must be the same."""
        errors = self.errors(result)
        bounded = {"error_loss": errors["error_loss"]} if eps else errors
        require_same(bounded, self.problem.hidden.dtype)
        return errors | {"dropped": result[2], "error_filter": self.of_filter(**eps), **eps}

    def errors(self, result: Any) -> dict[str, float]:
        """Compare with float64."""
        return self.oracle.errors(result[0].item(), *result[1])

    def of_filter(self, **eps: float) -> float:
        """Return what a filter does to a gradient, the larger of both: float32 on the same values, so no rounding."""
        key = tuple(eps.items())
        if key not in self.known:
            filtered = self.single.run(**eps)[1]
            self.known[key] = max(relative(own, right) for own, right in zip(filtered, self.exact, strict=True))
        return self.known[key]

    def both(self, alone: Eps) -> Eps:
        """Return both filters within the bar: columns at their own eps or less, candidates at most at theirs."""
        for share in (1.0, 0.5, 0.25, 0.1, 0.0):
            eps = {CANDIDATES: alone[CANDIDATES], COLUMNS: share * alone[COLUMNS]}
            if self.of_filter(**eps) <= BAR:
                break
        return eps

    def cut_cross_entropy(self) -> Contestant:
        """Describe its default filter, which does not say what it dropped; on a CPU its path has none."""

        def build() -> Call:
            from cut_cross_entropy import linear_cross_entropy

            def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
                return -linear_cross_entropy(hidden, weight, targets, reduction="none")

            return partial(self.problem.run_by_token_logps, sequence_logps)

        def check(result: Any) -> dict[str, float]:
            require_same(self.errors(result), self.problem.hidden.dtype)
            return self.errors(result)

        absent = "" if self.setting.on_gpu else "its path on a CPU, torch.compile, filters nothing"
        return Contestant(CCE, build, check, absent=absent)


def largest_within(error: Callable[[float], float], values: list[float], bar: float = BAR) -> float:
    """Return the largest eps between 0 and the last of increasing `values` with an error within the bar, nearly.

    The error of a filter grows with its eps; it is taken at few points only: by the grid, then by halving.
    """
    low, high = 0, len(values)  # all below low are within, high and all above are not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if error(values[middle]) <= bar else (low, middle)
    if low in (0, len(values)):
        return values[-1] if low else 0.0
    best, beyond = values[low - 1], values[low]
    for _ in range(REFINED):
        between = math.sqrt(best * beyond)
        best, beyond = (between, beyond) if error(between) <= bar else (best, between)
    return best
