"""Part `lengths`: fifty batches of naturally varying lengths, first call included: what a user waits for.

A batch is some prompts of a real text, each with its true completion and the completions of other examples as
negatives, padded to its longest. Hidden states are random, since their values do not matter here. Every contestant
has a process of its own with empty caches of compiled code; importing is not counted. Processes take turns, so ours
and the floor run first and last, and their difference is the drift of the machine.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import texts
from benchmarks.contestants import FLOOR, OURS, OURS_ON, OURS_PAIRS
from benchmarks.floor import Floor
from benchmarks.measure import dtype_name, synchronize
from benchmarks.oracle import Oracles
from benchmarks.peers import VARYING, Peer, build, ours
from benchmarks.problem import IGNORE, Problem
from benchmarks.processes import ProcessError, call_alone, end_with
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import CCE, CPO, PAIRS, Shape
from benchmarks.texts import Corpus

CANDIDATES = 4  # K = 3
GROUPS = (2, 3, 4)
CHECKED = 3  # calls whose results are held against fp64; the last one is a fourth
OWN = (FLOOR, OURS, OURS_PAIRS)
QUICK_PEERS = ("eager",)
PEERS = ("eager", "torch.compile", "F.linear_cross_entropy", "Liger CPO", "TRL fused head", CCE)
WARM = 10  # batches after which the rest says what a call takes


@dataclass(frozen=True)
class Sizes:
    """Holds the sizes of the case."""

    batches: int  # how many
    longest: int  # tokens of the longest completion that is taken
    vocab: int  # V, at least that of the tokenizer
    hidden: int  # H
    dtype: torch.dtype  # of hidden states and head
    limit: float  # seconds after which a peer is stopped, enough for one that compiles


# On the CPU in bfloat16: in float32 it would take three times as long.
ON_CPU = Sizes(50, 40, 50257, 256, torch.bfloat16, 120.0)
ON_GPU = Sizes(50, 512, 128256, 4096, torch.bfloat16, 300.0)
QUICK = Sizes(6, 32, 8209, 32, torch.float32, 20.0)


@dataclass(frozen=True)
class Task:
    """Holds the targets (G, C, T) of every batch, -100 behind the end of a completion, and what they are run with."""

    targets: list[Tensor]
    sizes: Sizes
    device: torch.device

    def problems(self) -> Iterator[Problem]:
        """Yield one batch after the other; the head is the same tensor in all of them."""
        vocab, width, dtype = self.sizes.vocab, self.sizes.hidden, self.sizes.dtype
        drawn = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        exact = torch.randn(vocab, width, **drawn) * (2 / width**0.5)
        weight = exact.to(dtype).detach().requires_grad_()
        for index, some in enumerate(self.targets):
            targets = some.to(self.device)
            groups, candidates, tokens = targets.shape
            shape = Shape(f"batch {index + 1}", vocab, width, groups, tokens, dtype, candidates=candidates)
            hidden = torch.randn(*targets.shape, width, **drawn) + 2.5 * exact[targets.clamp(min=0)]
            ref = 10 * torch.randn(groups, candidates, **drawn) - 3 * (targets != IGNORE).sum(-1)
            yield Problem(shape, hidden.to(dtype).requires_grad_(), weight, targets, ref)

    @property
    def conditions(self) -> dict[str, Any]:
        """Counts the tokens of all batches as N, and the share of positions without one as `padding`."""
        positions, tokens = sum(t.numel() for t in self.targets), sum(int((t != IGNORE).sum()) for t in self.targets)
        sizes = {"V": self.sizes.vocab, "H": self.sizes.hidden, "N": tokens, "dtype": dtype_name(self.sizes.dtype)}
        shapes = {"shapes": len({t.shape for t in self.targets}), "longest": max(t.shape[-1] for t in self.targets)}
        return sizes | {"padding": round(1 - tokens / positions, 3)} | shapes


@dataclass
class Life:
    """Says what one contestant did."""

    work: str = CPO  # of the contestant
    seconds: list[float] = field(default_factory=list)  # of every call that came to its end
    errors: dict[str, float] = field(default_factory=dict)  # the largest of each kind, of the calls that were checked
    unfinished: float = 0.0  # seconds that a last call had taken when it was stopped

    @property
    def total(self) -> float:
        """Returns the seconds of all calls."""
        return sum(self.seconds) + self.unfinished

    @property
    def steady(self) -> float:
        """Returns the median of the calls after the first ten; 0 without any."""
        return statistics.median(self.seconds[WARM:] or [0.0])


def run(setting: Setting) -> Iterator[Record]:
    """Measure floor and ours, the peers, ours and the floor again, one process after the other."""
    sizes = setting.choose(QUICK, ON_CPU, ON_GPU)
    targets = draw_batches(texts.load(setting, longest=10 * sizes.longest), sizes)
    task = Task(targets, sizes, setting.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.pt"
        torch.save(task, path)
        yield from records(task, path, QUICK_PEERS if setting.quick else PEERS)


def draw_batches(corpus: Corpus, sizes: Sizes, seed: int = 0) -> list[Tensor]:
    """Draw the targets of every batch, (G, C, T): the true completion first, then those of other examples.

    Examples whose completion is longer than `sizes.longest` are left out, not cut, so that lengths stay natural.
    """
    completions = [e.completion for e in corpus.examples if len(e.completion) <= sizes.longest]
    if len(completions) < CANDIDATES:
        raise ValueError(f"only {len(completions)} completions of at most {sizes.longest} tokens")
    draw = random.Random(seed)
    return [
        pad([draw.sample(completions, CANDIDATES) for _ in range(draw.choice(GROUPS))]) for _ in range(sizes.batches)
    ]


def pad(groups: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Make (G, C, T), as long as the longest completion, with -100 behind the others."""
    longest = max(len(tokens) for group in groups for tokens in group)
    return torch.tensor([[[*tokens, *[IGNORE] * (longest - len(tokens))] for tokens in group] for group in groups])


def records(task: Task, path: Path, peers: Sequence[str]) -> Iterator[Record]:
    """Yield a record of everyone; a peer beyond the limit and twice our time is stopped, without ours nobody runs."""
    case = f"{task.sizes.batches} batches of varying lengths, {dtype_name(task.sizes.dtype)}"
    first: dict[str, Life] = {}
    turns = [(name, {"run": "first"}) for name in OWN] + [(name, {}) for name in peers]
    for name, more in [*turns, (OURS, {"run": "last"}), (FLOOR, {"run": "last"})]:
        limit, note, life = math.inf if name in OWN else max(task.sizes.limit, 2 * first[OURS].total), "", Life()
        try:
            life = call_alone(alone, path, name, limit, preload=["benchmarks.lengths", "torch._dynamo"])
        except ProcessError as error:
            if name in (FLOOR, OURS):
                raise
            note = str(error)
        if not note:
            first.setdefault(name, life)
            done = len(life.seconds)
            note = f"stopped after {done} batches: >= {life.total:.1f} s" if done < len(task.targets) else ""
        conditions = {"K": CANDIDATES - 1 if life.work == CPO else 1, "work": life.work, **more}
        yield Record(case, name, values_of(name, life, first), task.conditions | conditions, note)


def values_of(name: str, life: Life, first: Mapping[str, Life]) -> dict[str, float]:
    """Return what a life says; ratios are of totals, or of the first lives' medians after the first ten batches."""
    if not life.total:
        return {}
    values = {"total": life.total, "batches": float(len(life.seconds))}
    if life.seconds:
        values["first"] = life.seconds[0]
    floor, base = first.get(FLOOR), first.get(OURS_ON[life.work])
    if floor:
        values["floor"] = life.total / floor.total
    if base and not name.startswith("floor"):
        values["of_ours"] = life.total / base.total
        if life.steady and base.steady:
            values["steady_of_ours"] = life.steady / base.steady
    return values | life.errors


def alone(path: Path, name: str, limit: float) -> Life:
    """Live in a process that has just started, with empty caches of compiled code."""
    caches = tempfile.mkdtemp(dir=path.parent)
    os.environ |= {cache: f"{caches}/{cache}" for cache in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    life = Life()
    live(name, torch.load(path, weights_only=False), life, Stopwatch(life, limit, lambda: end_with(life)))
    return life


class Stopwatch:
    """Times calls, and ends the process in the midst of one when all together have taken `limit` seconds."""

    def __init__(self, life: Life, limit: float, at_limit: Callable[[], object]) -> None:
        self.life, self.limit, self.at_limit = life, limit, at_limit

    def time(self, call: Callable[[], Any]) -> Any:
        """Run a call until the device is done with it too; what had no end is noted in the timer's thread."""
        left = min(self.limit - self.life.total, threading.TIMEOUT_MAX)

        def stop() -> None:
            self.life.unfinished = time.perf_counter() - begin
            self.at_limit()

        alarm = threading.Timer(left, stop)
        alarm.daemon = True
        begin = time.perf_counter()
        alarm.start()
        result = call()
        synchronize()
        self.life.seconds.append(time.perf_counter() - begin)
        alarm.cancel()
        return result


def live(name: str, task: Task, life: Life, stopwatch: Stopwatch) -> None:
    """Run all batches, until those done have taken more than the limit; raise AnotherLossError for a wrong result."""
    peer = None if name == FLOOR else make(name)
    if peer is not None:  # what torch would import in a first call
        import_module("torch._inductor.compile_fx" if peer.compiles else "torch._dynamo")
    for index, problem in enumerate(task.problems()):
        if peer is None:
            stopwatch.time(Floor.of(problem, None))
        else:
            asked = problem.as_work({OURS_PAIRS: PAIRS}.get(name, CPO))
            life.work = peer.work_on(asked.shape) or CPO
            result = stopwatch.time(partial(peer.run, asked.as_work(life.work)))
            if index < CHECKED or index == len(task.targets) - 1:
                for kind, error in Oracles(problem).check(life.work, result).items():
                    life.errors[kind] = max(error, life.errors.get(kind, 0.0))
            del result  # or the next call would run beside this one's gradients
        if life.total > stopwatch.limit:
            break


def make(name: str) -> Peer:
    """Build anyone but the floor."""
    peer = build(name, {**VARYING, **{own: partial(ours, own) for own in (OURS, OURS_PAIRS)}})
    if isinstance(peer, str):
        raise ImportError(peer)
    return peer
