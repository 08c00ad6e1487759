"""Time and peak memory of the loss and its gradients as N, V and K grow.

A curve is one quantity growing. bfloat16, because models are trained in it and because its products are fast: the rest
of the work, by which implementations differ, weighs most. Peers that compile keep what they compiled along a curve,
with the growing dimension dynamic from the beginning; compiling is not timed (benchmarks.lengths asks what it costs).
A peer whose call takes longer than a limit grows no further. Liger contrasts pairs only: see benchmarks.heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from benchmarks.contestants import FLOOR, OURS, contestant, floor, forget_compiled
from benchmarks.measure import SAME_LOSS, AnotherLossError, free_memory, run_to_the_end, summary
from benchmarks.memory import meter_for
from benchmarks.oracle import Dense, Errors, Oracle
from benchmarks.peers import Peer, ours
from benchmarks.problem import Problem, draw
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import Shape
from benchmarks.timing import Effort, Timing, clock_for, round_robin
from benchmarks.varying import builders

PEERS = ("eager", "torch.compile", "F.linear_cross_entropy", "TRL fused head", "Cut Cross-Entropy")
QUICK_PEERS = ("eager", "F.linear_cross_entropy")  # need no seconds to import or compile
MIB = 2**20
GROWING = {"N": 0, "K": 1}  # the dimension of hidden states, targets and references; V is dimension 0 of the head


@dataclass(frozen=True)
class Curve:
    """One quantity growing.

    Attributes:
        along: "N", "V" or "K".
        shapes: of its points, the smallest first.
    """

    along: str
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Sizes:
    """Of the part.

    Attributes:
        hidden: H.
        vocab: V of the curves in N and K.
        tokens: N of the curve in N, groups of four candidates of `length` tokens.
        vocabularies: V of the curve in V, at `vocab_tokens` tokens.
        negatives: K of the curve in K, two groups of candidates of `length` tokens.
        limit: seconds of a call beyond which a peer grows no further; two points are a curve at least.
        touched: bytes of memory to be used once before anything is timed.
    """

    hidden: int
    vocab: int
    tokens: tuple[int, ...]
    vocab_tokens: int
    vocabularies: tuple[int, ...]
    negatives: tuple[int, ...]
    length: int
    effort: Effort
    limit: float
    touched: int = 0

    def curves(self) -> tuple[Curve, ...]:
        """All three."""
        base = Shape("", self.vocab, self.hidden, 2, self.length, torch.bfloat16, "")
        at_n = (replace(base.with_tokens(n), name=f"N = {n}") for n in self.tokens)
        wide = base.with_tokens(self.vocab_tokens)
        at_v = (replace(wide, vocab=v, name=f"V = {v}") for v in self.vocabularies)
        at_k = (replace(base, candidates=k + 1, name=f"K = {k}") for k in self.negatives)
        return Curve("N", tuple(at_n)), Curve("V", tuple(at_v)), Curve("K", tuple(at_k))


ON_CPU = Sizes(
    hidden=256,
    vocab=50257,
    tokens=(512, 1024, 2048, 4096),
    vocab_tokens=512,
    vocabularies=(8192, 32768, 131072, 262144),
    negatives=(1, 4, 16),
    length=64,
    effort=Effort(rounds=2, far=1.5, very_far=1.5),
    limit=0.4,
    touched=2 * 2**30,
)
ON_GPU = Sizes(
    hidden=4096,
    vocab=128256,
    tokens=(1024, 2048, 4096, 8192, 16384, 32768, 65536),
    vocab_tokens=8192,
    vocabularies=(32768, 65536, 131072, 262144),
    negatives=(1, 2, 4, 8, 16),
    length=128,
    effort=Effort(rounds=5),
    limit=2.0,
)
QUICK = Sizes(
    hidden=32,
    vocab=509,
    tokens=(128, 256),
    vocab_tokens=128,
    vocabularies=(509, 1021),
    negatives=(1, 2),
    length=16,
    effort=Effort(rounds=1),
    limit=10.0,
)


def run(setting: Setting) -> Iterator[Record]:
    """The curves in N, V and K."""
    sizes = QUICK if setting.quick else ON_GPU if setting.on_gpu else ON_CPU
    touch(sizes.touched)
    for curve in sizes.curves():
        yield from Growth(curve, sizes, setting).records()


def touch(size: int) -> None:
    """Use memory once: a virtual machine gets it from its host at the first touch, which takes longer than the use."""
    if size:
        torch.ones(size, dtype=torch.uint8)


@dataclass
class Watch:
    """What is seen of the calls at one point: first peaks, losses, and why a contestant has none.

    At a first point `oracle` holds all results against fp64; at the others the loss is held against ours, which runs
    before the peers.
    """

    problem: Problem
    oracle: Oracle | None
    peaks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, Errors] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    loss: float = math.nan

    def __post_init__(self) -> None:
        self.meter = meter_for(self.problem.hidden.device)

    def guarded(self, name: str, call: Callable[[], object]) -> Callable[[], object]:
        """A peer's call that notes its failure; a peer that failed is not run again."""

        if name in (FLOOR, OURS):
            return call

        def run() -> object:
            if name in self.failed:
                return None
            try:
                return call()
            except Exception as error:  # a contestant may fail in any way of its own
                self.failed[name] = f"failed with {summary(error)}"
            free_memory()  # after the handler: until there the error holds the tensors of the call
            return None

        return run

    def before(self, name: str) -> None:
        """Start the meter for a first call."""
        if name not in self.peaks:
            self.meter.start()

    def after(self, name: str, result: object) -> None:
        """Peak and loss of a first call."""
        if name in self.peaks or result is None:
            return
        loss, grads = result  # type: ignore[misc]
        self.peaks[name] = self.meter.growth() - sum(grad.nbytes for grad in grads)
        if loss is not None and (another := self.another_loss(name, loss, grads)):
            if name == OURS:
                raise AnotherLossError(name, another)
            self.failed[name] = another

    def another_loss(self, name: str, loss: torch.Tensor, grads: tuple[torch.Tensor, ...]) -> str:
        """Why this is not the loss of the others; empty where it is."""
        bound = SAME_LOSS[self.problem.shape.dtype]
        if self.oracle is not None:
            errors = self.errors[name] = self.oracle.errors(loss, grads)
            return "" if errors.worst() <= bound else f"computes another loss: {errors}"
        if name == OURS:
            self.loss = loss.item()
        error = abs(loss.item() - self.loss)
        return "" if error <= bound * abs(self.loss) else f"computes another loss: {loss.item()}, ours is {self.loss}"


class Growth:
    """One curve: its points in turn, with the contestants that have not been stopped."""

    def __init__(self, curve: Curve, sizes: Sizes, setting: Setting) -> None:
        self.curve, self.sizes, self.setting = curve, sizes, setting
        self.out: dict[str, str] = {}  # who is not run any more, and why
        self.last: dict[str, float] = {}  # seconds of each at the last point
        self.peers: dict[str, Peer] = {OURS: ours(OURS)}
        for name in PEERS:
            if setting.quick and name not in QUICK_PEERS:
                self.out[name] = "not in a quick run"
                continue
            try:
                self.peers[name] = builders()[name]()
            except (ImportError, AttributeError, RuntimeError) as error:
                self.out[name] = f"not installed: {summary(error)}"

    def records(self) -> Iterator[Record]:
        """One for every contestant at every point."""
        forget_compiled()
        for index, shape in enumerate(self.curve.shapes):
            problem = mark(draw(shape, device=self.setting.device), self.curve.along)
            yield from self.point(problem, first=index == 0)
            if index:
                self.stop_slow()

    def point(self, problem: Problem, *, first: bool) -> Iterator[Record]:
        """Everyone in turns."""
        entries = {FLOOR: floor(problem, None)}
        entries |= {name: contestant(peer, problem) for name, peer in self.peers.items() if name not in self.out}
        watch = Watch(problem, Oracle(problem, Dense.of(problem)) if first else None)
        if first or self.setting.on_gpu:
            for name, entry in entries.items():
                watch.guarded(name, partial(run_to_the_end, entry.warm_up))()
        timings = round_robin(
            {name: watch.guarded(name, entry.call) for name, entry in entries.items()},
            self.sizes.effort,
            reference=FLOOR,
            always=(OURS, *(name for name, peer in self.peers.items() if peer.compiles)),
            observer=watch,
            clock=clock_for(problem.hidden.device),
        )
        self.out |= watch.failed
        for name in (FLOOR, OURS, *PEERS):
            yield self.record(name, watch, timings)
        self.last = {name: timing.best for name, timing in timings.items()}

    def stop_slow(self) -> None:
        """Whoever took longer than the limit grows no further."""
        for name in self.peers.keys() - {OURS} - self.out.keys():
            if self.last[name] > self.sizes.limit:
                self.out[name] = f"grew no further: {self.last[name]:.2f} s a call at the last point"

    def record(self, name: str, watch: Watch, timings: Mapping[str, Timing]) -> Record:
        """Of one contestant at one point."""
        conditions = conditions_of(watch.problem.shape)
        if name in self.out:
            return Record(self.curve.along, name, {}, conditions, self.out[name])
        return Record(self.curve.along, name, values_of(name, watch, timings), conditions)


def mark(problem: Problem, along: str) -> Problem:
    """The same problem; compilers are told which dimension grows, as they would find out at the second point."""
    mark_dynamic = torch._dynamo.maybe_mark_dynamic
    if along == "V":
        mark_dynamic(problem.weight, 0)
    else:
        for tensor in (problem.hidden, problem.targets, problem.ref_logps):
            mark_dynamic(tensor, GROWING[along])
    return problem


def conditions_of(shape: Shape) -> dict[str, Any]:
    """Sizes of a point."""
    return {
        "V": shape.vocab,
        "H": shape.hidden,
        "N": shape.num_tokens,
        "K": shape.negatives,
        "dtype": shape.dtype_name,
        "work": shape.work,
    }


def values_of(name: str, watch: Watch, timings: Mapping[str, Timing]) -> dict[str, float]:
    """Of a contestant that ran."""
    timing = timings[name]
    values = {"seconds": timing.best, "median": timing.median, "rounds": float(len(timing.seconds))}
    values["floor"] = timing.best / timings[FLOOR].best
    values["of_ours"] = timing.best / timings[OURS].best
    values["peak_mib"] = watch.peaks[name] / MIB
    if errors := watch.errors.get(name):
        values |= {"error_loss": errors.loss, "error_grad_hidden": errors.grad_hidden}
        values["error_grad_weight"] = errors.grad_weight
    return values
