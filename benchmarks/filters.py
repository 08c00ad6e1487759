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
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks import real_run
from benchmarks.contestants import FLOOR, OURS
from benchmarks.floor import allocate, gemms, product_rows
from benchmarks.measure import SAME_LOSS, AnotherLossError, free_memory, summary
from benchmarks.oracle import relative
from benchmarks.packed import Oracle, Packed, Result
from benchmarks.real_run import Looked
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.timing import Clock, Effort, Timing, clock_for, round_robin

CANDIDATES, COLUMNS = "candidate_eps", "grad_filter_eps"
FILTERS = (CANDIDATES, COLUMNS)
BOTH = "both"
CCE = "Cut Cross-Entropy"
BAR = 1e-3  # of the gradient
GRIDS = {  # least and largest eps as decimal logarithms, and points
    CANDIDATES: (-3.0, 0.0, 4),
    COLUMNS: (-6.0, -3.0, 4),
}
QUICK_POINTS = 3
WIDTH, QUICK_WIDTH = 768, 48  # of the wide head
REFINED = 3  # halvings, in logarithms, between two points of a grid
SETTLED = 1e-2  # of the largest coefficient
Eps = Mapping[str, float]


def grid(name: str, *, quick: bool = False) -> list[float]:
    """Values of a filter's eps, increasing by the same factor each."""
    low, high, points = GRIDS[name]
    return torch.logspace(low, high, QUICK_POINTS if quick else points, dtype=torch.float64).tolist()


def at_bar(name: str) -> str:
    """The contestant whose eps is as large as the bar of the gradient's error allows."""
    return f"{name} at error 1e-3"


def run(setting: Setting) -> Iterator[Record]:
    """Records of both steps: of the contrast alone in float32 and bfloat16, of a wider head, and with the NLL."""
    sizes = real_run.sizes_of(setting)
    made = real_run.train_in_a_process(setting)
    for looked in made.looked:
        yield about(looked, made, sizes)
        for case in cases(looked, setting, last=looked is made.looked[-1]):
            yield from case.records()
            del case
            free_memory()


def cases(looked: Looked, setting: Setting, *, last: bool) -> Iterator[Case]:
    """Of one step; the wide head has the logits of the run's, at the width of a model that is used.

    In bfloat16 the eps are those that float32 found, less by what rounding may change.
    """
    after, wide = f"after {looked.step} steps", widened(looked, QUICK_WIDTH if setting.quick else WIDTH)
    exact = Case(f"{after}, float32", Packed.of(looked, torch.float32, 0.0), looked.step, setting)
    yield exact
    chosen = {name: {key: 0.9 * value for key, value in eps.items()} for name, eps in exact.chosen.items()}
    rest = {"ranges": False, "chosen": chosen}
    yield Case(f"{after}, bfloat16", Packed.of(looked, torch.bfloat16, 0.0), looked.step, setting, **rest)
    if not setting.on_gpu:
        yield Case(f"{after}, bfloat16, wide", Packed.of(wide, torch.bfloat16, 0.0), looked.step, setting, **rest)
    if last:
        yield Case(f"{after}, float32, with NLL", Packed.of(looked, torch.float32), looked.step, setting, ranges=False)


def widened(looked: Looked, width: int) -> Looked:
    """The same logits and gradients of the same norms, from (R, width) and (V, width): both turned by an isometry."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(width, looked.hidden.shape[1], generator=generator)).Q.T.to(looked.hidden)
    return replace(looked, hidden=looked.hidden @ turn, weight=looked.weight @ turn)


def about(looked: Looked, made: real_run.Run, sizes: real_run.Sizes) -> Record:
    """What the contrast looks like at a step: the larger the share that is settled, the more there is to leave out."""
    problem = Packed.of(looked, torch.float32, 0.0)
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
    names = {"loss": "loss", "contrastive_loss": "contrastive_loss", "nll_loss": "nll_loss", "accuracy": "accuracy"}
    values |= {name: losses[key] for name, key in names.items() if key in losses}
    note = f"{made.source}; {sizes.mle_steps} steps of next-token prediction before"
    return Record(f"after {looked.step} steps", "the run", values, problem.conditions | {"step": looked.step}, note)


def contrast_shares(rewards: Tensor, cu_groups: Sequence[int]) -> Tensor:
    """Coefficients (S,) of an unranked contrast over beta / num_groups: a negative's softmax, 1 - that of a truth."""
    shares = []
    for start, end in pairwise(cu_groups):
        own = torch.softmax(rewards[start:end], 0)
        own[0] = 1 - own[0]
        shares.append(own)
    return torch.cat(shares)


@dataclass
class Case:
    """One problem, its oracle, and the same values in float32 with their exact gradients.

    Attributes:
        name: of the records' case.
        problem: what every contestant is given.
        step: of the run.
        setting: of the suite.
        ranges: whether every eps of the grids is timed too.
        chosen: eps of the contestants at the bar; found by :meth:`records` where not given.
    """

    name: str
    problem: Packed
    step: int
    setting: Setting
    ranges: bool = True
    chosen: dict[str, Eps] = field(default_factory=dict)
    oracle: Oracle = field(init=False)
    single: Packed = field(init=False)
    exact: Result = field(init=False)
    known: dict[tuple[tuple[str, float], ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.oracle, self.single = Oracle(self.problem), self.problem.to(torch.float32)
        self.exact = self.single.run()
        check(OURS, self.exact, self.oracle, torch.float32)

    def grid(self, name: str) -> list[float]:
        """See :func:`grid`."""
        return grid(name, quick=self.setting.quick)

    @property
    def clock(self) -> Clock:
        """Of the device."""
        return clock_for(self.setting.device)

    def records(self) -> Iterator[Record]:
        """The ranges of eps, then those at the bar."""
        if self.ranges:
            ranges = {f"{name} {eps:.2g}": {name: eps} for name in FILTERS for eps in self.grid(name)}
            yield from self.timed(ranges, rounds=2, beside="ranges")
        if not self.chosen:
            alone = {name: self.largest(name) for name in FILTERS}
            self.chosen = {at_bar(name): {name: eps} for name, eps in alone.items()}
            self.chosen[at_bar(BOTH)] = self.both(alone)
        yield from self.timed(self.chosen, rounds=3, beside="the bar")
        yield self.cut_cross_entropy()

    def timed(self, filtered: Mapping[str, Eps], rounds: int, beside: str) -> Iterator[Record]:
        """Floor and exact call beside filtered ones; nothing is yielded of one that is wrong."""
        seen: dict[str, Result] = {}
        calls: dict[str, Callable[[], Any]] = {FLOOR: self.floor(), OURS: self.problem.run}
        calls |= {name: partial(self.problem.run, **eps) for name, eps in filtered.items()}
        times = round_robin(
            calls,
            Effort(rounds=1 if self.setting.quick else rounds),
            reference=FLOOR,
            always=calls,
            observer=Keep(seen),
            clock=self.clock,
        )
        for name, timing in times.items():
            values = self.times(timing, times)
            if name != FLOOR:
                check(name, seen[name], self.oracle, self.problem.hidden.dtype, filtered=name in filtered)
                values |= self.errors(seen[name]) | {"error_filter": self.of_filter(**filtered.get(name, {}))}
                values |= filtered.get(name, {})
            yield Record(self.name, name, values, self.conditions | {"beside": beside})

    def times(self, timing: Timing, times: Mapping[str, Timing]) -> dict[str, float]:
        """Seconds, and as multiples of the floor and of the exact call."""
        best = timing.best
        values = {"seconds": best, "median": timing.median, "rounds": float(len(timing.seconds))}
        return values | {"floor": best / times[FLOOR].best, "of_ours": best / times[OURS].best}

    def errors(self, result: Result) -> dict[str, float]:
        """Against fp64."""
        return self.oracle.errors(result) | {"dropped": result.dropped}

    def of_filter(self, **eps: float) -> float:
        """What a filter does to a gradient, the larger of both: float32 on the same values, so without rounding."""
        key = tuple(eps.items())
        if key not in self.known:
            filtered, exact = self.single.run(**eps), self.exact
            self.known[key] = max(
                relative(filtered.grad_hidden, exact.grad_hidden), relative(filtered.grad_weight, exact.grad_weight)
            )
        return self.known[key]

    @property
    def conditions(self) -> dict[str, Any]:
        """Of every record of this case."""
        return self.problem.conditions | {"step": self.step}

    def floor(self) -> Callable[[], object]:
        """Three bare products of the same rows in our plan's chunks."""
        problem = self.problem
        hidden, weight = problem.hidden.detach(), problem.weight.detach()
        rows = product_rows(problem.plan())

        def products() -> tuple[Tensor, Tensor]:
            out = allocate(hidden, weight, rows)
            gemms(hidden, weight, rows, out)
            return out.grad_hidden, out.grad_weight

        return products

    def largest(self, name: str) -> float:
        """The largest eps whose gradient is within the bar: by the grid, then by halving; 0 where none is."""
        return largest_within(lambda eps: self.of_filter(**{name: eps}), self.grid(name))

    def both(self, alone: Eps) -> Eps:
        """Both filters within the bar: columns at their own eps or less, candidates at most at theirs."""
        for share in (1.0, 0.5, 0.25, 0.1, 0.0):
            eps = {CANDIDATES: alone[CANDIDATES], COLUMNS: share * alone[COLUMNS]}
            if self.of_filter(**eps) <= BAR:
                break
        return eps

    def cut_cross_entropy(self) -> Record:
        """Its filter on the same problem; on a CPU its path has none."""
        if not self.setting.on_gpu:
            return Record(self.name, CCE, {}, self.conditions, "its path on a CPU, torch.compile, filters nothing")
        try:
            (record,) = (r for r in self.timed_peer() if r.contestant == CCE)
        except (ImportError, RuntimeError, AnotherLossError) as error:
            return Record(self.name, CCE, {}, self.conditions, summary(error))
        return record

    def timed_peer(self) -> Iterator[Record]:
        """Floor, exact call and Cut Cross-Entropy with its default filter."""
        from cut_cross_entropy import linear_cross_entropy

        def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return -linear_cross_entropy(hidden, weight, targets, reduction="none")

        seen: dict[str, Result] = {}
        peer = partial(self.problem.run_by_token_logps, sequence_logps)
        peer()
        calls = {FLOOR: self.floor(), OURS: self.problem.run, CCE: peer}
        times = round_robin(
            calls, Effort(rounds=5), reference=FLOOR, always=calls, observer=Keep(seen), clock=self.clock
        )
        check(CCE, seen[CCE], self.oracle, self.problem.hidden.dtype)
        values = self.times(times[CCE], times) | self.errors(seen[CCE])
        yield Record(self.name, CCE, values, self.conditions, "its default filter, which does not say what it dropped")


class Keep:
    """Observer of a round robin that keeps the first result of every contestant."""

    def __init__(self, seen: dict[str, Result]) -> None:
        self.seen = seen

    def before(self, name: str) -> None:
        """Nothing."""

    def after(self, name: str, result: object) -> None:
        """Keep it; the floor's is no result."""
        if isinstance(result, Result):
            self.seen.setdefault(name, result)


def check(name: str, result: Result, oracle: Oracle, dtype: torch.dtype, *, filtered: bool = False) -> None:
    """Raise :class:`AnotherLossError` for another loss, or another gradient where nothing may be left out of it."""
    errors = oracle.errors(result)
    bounded = [errors["error_loss"]] if filtered else list(errors.values())
    if not all(error <= SAME_LOSS[dtype] for error in bounded):  # not `>`: NaN is another loss too
        raise AnotherLossError(name, f"{errors}, expected at most {SAME_LOSS[dtype]}")


def largest_within(error: Callable[[float], float], values: list[float], bar: float = BAR) -> float:
    """The largest eps between 0 and the last of increasing `values` whose error is within the bar, to a few percent.

    The error of a filter grows with its eps; it is taken at few points only.
    """
    low, high = 0, len(values)  # all below low are within, high and all above are not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if error(values[middle]) <= bar else (low, middle)
    if low in (0, len(values)):
        return values[-1] if low else 0.0
    best, beyond = values[low - 1], values[low]
    for _ in range(REFINED):
        middle = math.sqrt(best * beyond)
        best, beyond = (middle, beyond) if error(middle) <= bar else (best, middle)
    return best
