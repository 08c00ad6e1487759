"""Part `lengths`: fifty batches of naturally varying lengths, first call included: what a user waits for.

A batch is some prompts of a real text, each with its true completion and the completions of other examples as
negatives, padded to its longest. Hidden states are random, since their values do not matter here. Every contestant
has a process of its own with empty caches of compiled code; importing is not counted. Processes take turns, so ours
and the floor run first and last, and their difference is the drift of the machine.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cpo_kernels
from benchmarks import texts
from benchmarks.contestants import FLOOR, FLOORS, OURS, OURS_DPO, OURS_ON, OURS_PAIRS
from benchmarks.floor import Floor
from benchmarks.measure import dtype_name, summary, synchronize
from benchmarks.oracle import Oracles
from benchmarks.peers import COMPILED, DYNAMIC, VARYING, Peer, ours, ours_dpo
from benchmarks.problem import BETA, IGNORE, Problem
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import CPO, DPO, PAIRS, POLICIES, Shape
from benchmarks.texts import Corpus
from cpo_kernels.trainer.files import write_whole

CANDIDATES = 4  # K = 3
GROUPS = (2, 3, 4)
CHECKED = 3  # calls whose results are held against fp64; the last one is a fourth
PACKED = "cpo-kernels, packed"
OWN = (FLOOR, OURS, PACKED, OURS_PAIRS, OURS_DPO)
COMPILING = (COMPILED, DYNAMIC, "Liger CPO", "Liger DPO", "Cut Cross-Entropy")
QUICK_PEERS = ("eager",)


@dataclass(frozen=True)
class Sizes:
    """Holds the sizes of the case.

    Attributes:
        batches: how many.
        longest: tokens of the longest completion that is taken.
        vocab: V, at least that of the tokenizer.
        hidden: H.
        dtype: of hidden states and head.
        limit: seconds after which a peer is stopped.
        limit_compiling: the same for one that compiles, so that its calls after that show too.
    """

    batches: int
    longest: int
    vocab: int
    hidden: int
    dtype: torch.dtype
    limit: float
    limit_compiling: float


# On the CPU in bfloat16: in float32 it would take three times as long.
ON_CPU = Sizes(50, 40, 50257, 256, torch.bfloat16, 6.0, 12.0)
ON_GPU = Sizes(50, 512, 128256, 4096, torch.bfloat16, 20.0, 90.0)
QUICK = Sizes(6, 32, 8209, 32, torch.float32, 5.0, 20.0)


@dataclass(frozen=True)
class Task:
    """Holds the targets (G, C, T) of every batch, -100 behind the end of a completion, and what they are run with."""

    targets: list[Tensor]
    vocab: int
    hidden: int
    dtype: torch.dtype
    device: torch.device
    threads: int  # of torch, on the host

    def problems(self) -> Iterator[Problem]:
        """Yield one batch after the other; the head is the same tensor in all of them."""
        drawn = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        exact = torch.randn(self.vocab, self.hidden, **drawn) * (2 / self.hidden**0.5)
        weight = exact.to(self.dtype).detach().requires_grad_()
        for index, some in enumerate(self.targets):
            targets = some.to(self.device)
            groups, candidates, tokens = targets.shape
            name = f"batch {index + 1}"
            shape = Shape(name, self.vocab, self.hidden, groups, tokens, self.dtype, candidates=candidates)
            hidden = torch.randn(*targets.shape, self.hidden, **drawn) + 2.5 * exact[targets.clamp(min=0)]
            ref = 10 * torch.randn(groups, candidates, **drawn) - 3 * (targets != IGNORE).sum(-1)
            yield Problem(shape, hidden.to(self.dtype).requires_grad_(), weight, targets, ref)

    @property
    def conditions(self) -> dict[str, Any]:
        """Count the tokens of all batches as N, and the share of positions without one as `padding`."""
        positions, tokens = sum(t.numel() for t in self.targets), sum(int((t != IGNORE).sum()) for t in self.targets)
        return {
            "V": self.vocab,
            "H": self.hidden,
            "N": tokens,
            "dtype": dtype_name(self.dtype),
            "padding": round(1 - tokens / positions, 3),
            "shapes": len({t.shape for t in self.targets}),
            "longest": max(t.shape[-1] for t in self.targets),
        }


@dataclass
class Life:
    """Says what one contestant did.

    Attributes:
        work: of the contestant.
        seconds: of every call that came to its end.
        errors: the largest of each kind, of the calls that were checked.
        unfinished: seconds that a last call had taken when it was stopped.
    """

    work: str = CPO
    seconds: list[float] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    unfinished: float = 0.0

    @property
    def total(self) -> float:
        """Return the seconds of all calls."""
        return sum(self.seconds) + self.unfinished


def run(setting: Setting) -> Iterator[Record]:
    """Measure floor and ours, the peers, ours and the floor again, one process after the other."""
    sizes = setting.choose(QUICK, ON_CPU, ON_GPU)
    targets = draw_batches(texts.load(setting, longest=10 * sizes.longest), sizes)
    task = Task(targets, sizes.vocab, sizes.hidden, sizes.dtype, setting.device, torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.pt"
        torch.save(task, path)
        yield from records(task, sizes, path, left_out(setting))


def draw_batches(corpus: Corpus, sizes: Sizes, seed: int = 0) -> list[Tensor]:
    """Draw the targets of every batch, (G, C, T): the true completion first, then those of other examples.

    Examples whose completion is longer than `sizes.longest` are left out, not cut, so that lengths stay natural.
    """
    completions = [e.completion for e in corpus.examples if len(e.completion) <= sizes.longest]
    if len(completions) < CANDIDATES:
        raise ValueError(f"only {len(completions)} completions of at most {sizes.longest} tokens in {corpus.source}")
    draw = random.Random(seed)
    return [
        pad([draw.sample(completions, CANDIDATES) for _ in range(draw.choice(GROUPS))]) for _ in range(sizes.batches)
    ]


def pad(groups: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Make (G, C, T), as long as the longest completion, with -100 behind the others."""
    longest = max(len(tokens) for group in groups for tokens in group)
    return torch.tensor([[[*tokens, *[IGNORE] * (longest - len(tokens))] for tokens in group] for group in groups])


def left_out(setting: Setting) -> dict[str, str]:
    """Say who does not run, and why."""
    why = {"QuACK": "computes a cross-entropy and no sequence log-likelihoods: see the part heads"}
    if not setting.on_gpu:
        why |= dict.fromkeys(POLICIES, "a call takes tens of seconds, as with the policy that runs")
        why |= dict.fromkeys((OURS_DPO, "Liger DPO"), "compiles and calls as Liger CPO does: see the part heads")
        why[DYNAMIC] = "compiles as long as torch.compile does by default"
    if setting.quick:
        why |= {name: "not in a quick run" for name in VARYING if name not in QUICK_PEERS}
    return why


def records(task: Task, sizes: Sizes, path: Path, absent: dict[str, str]) -> Iterator[Record]:
    """Yield a record of everyone; a peer is stopped when it has taken twice as long as ours, whatever comes.

    Raises:
        RuntimeError: the floor or ours failed, with which all others are compared.
    """
    case = f"{sizes.batches} batches of varying lengths, {dtype_name(sizes.dtype)}"
    totals: dict[str, float] = {}  # of first runs
    turns = [(name, {"run": "first"}) for name in OWN] + [(name, {}) for name in VARYING]
    for name, more in [*turns, (OURS, {"run": "last"}), (FLOOR, {"run": "last"})]:
        note, life = absent.get(name, ""), Life()
        if not note:
            least = sizes.limit_compiling if name in COMPILING else sizes.limit
            found = in_a_process(path, name, math.inf if name in OWN else max(least, 2 * totals[OURS]))
            if isinstance(found, str) and name in (FLOOR, OURS):
                raise RuntimeError(f"{name}: {found}")
            note, life = (found, life) if isinstance(found, str) else ("", found)
        values = {}
        if not note:
            totals.setdefault(name, life.total)
            done = len(life.seconds)
            note = f"stopped after {done} batches: {life.total:.1f} s" if done < len(task.targets) else ""
            values = values_of(name, life, totals)
        conditions = {"K": CANDIDATES - 1 if life.work == CPO else 1, "work": life.work, **more}
        yield Record(case, name, values, task.conditions | conditions, note)


def values_of(name: str, life: Life, totals: dict[str, float]) -> dict[str, float]:
    """Return what a life says; `total` is of what the contestant did, and ratios are of totals."""
    values = {"total": life.total, "batches": float(len(life.seconds))}
    if life.seconds:
        values |= {"first": life.seconds[0], "slowest": max(life.seconds), "median": statistics.median(life.seconds)}
    floor, base = FLOORS[life.work], OURS_ON[life.work]
    if floor in totals:
        values["floor"] = life.total / totals[floor]
    if name != floor and base in totals:
        values["of_ours"] = life.total / totals[base]
    return values | life.errors


def in_a_process(task: Path, name: str, limit: float) -> Life | str:
    """Let a contestant live in a process with empty caches; return its life, or why there is none."""
    on_gpu = torch.cuda.is_available()  # where a process that has looked for GPUs must not be forked
    context = multiprocessing.get_context("spawn" if on_gpu else "forkserver")
    if not on_gpu:  # its server imports torch and never calls it
        context.set_forkserver_preload(["benchmarks.lengths", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "life.json"
        process = context.Process(target=alone, args=(task, name, out, limit))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
            end_group(process.pid)
        if not out.exists():
            return f"ended with {process.exitcode}"
        found = json.loads(out.read_text(encoding="utf-8"))
    return found["error"] if "error" in found else Life(**found)


def end_group(process_group: int) -> None:
    """End what a process that was stopped has left: a compiler, for instance."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_group, signal.SIGKILL)


def alone(path: Path, name: str, out: Path, limit: float) -> None:
    """Live in a process that has just started, in a group of its own, and write the life or why there is none."""
    os.setsid()
    os.environ |= {cache: str(out.parent / cache) for cache in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    task: Task = torch.load(path, weights_only=False)
    torch.set_num_threads(task.threads)
    life = Life()

    def write_and_end() -> None:
        write_whole(out, json.dumps(asdict(life)))
        os._exit(0)  # a call in another thread cannot be interrupted

    try:
        live(name, task, life, Stopwatch(life, limit, write_and_end))
        write_whole(out, json.dumps(asdict(life)))
    except Exception as error:  # a contestant may fail in any way of its own
        write_whole(out, json.dumps({"error": summary(error)}))


class Stopwatch:
    """Times calls, and ends the process in the midst of one when all together have taken `limit` seconds."""

    def __init__(self, life: Life, limit: float, at_limit: Callable[[], None]) -> None:
        self.life, self.limit, self.at_limit = life, limit, at_limit
        self.begin = 0.0

    def time(self, call: Callable[[], Any]) -> Any:
        """Run a call until the device is done with it too."""
        alarm = threading.Timer(min(self.limit - self.life.total, threading.TIMEOUT_MAX), self.stop)
        alarm.daemon = True
        self.begin = time.perf_counter()
        alarm.start()
        result = call()
        synchronize()
        self.life.seconds.append(time.perf_counter() - self.begin)
        alarm.cancel()
        return result

    def stop(self) -> None:
        """Note, in the timer's thread, how long the call has been running, and end."""
        self.life.unfinished = time.perf_counter() - self.begin
        self.at_limit()


def live(name: str, task: Task, life: Life, stopwatch: Stopwatch) -> None:
    """Run all batches, until those done have taken more than the limit.

    Raises:
        AnotherLossError: a result that is checked is not that of the batch.
    """
    peer = None if name == FLOOR else known()[name]()
    if peer is not None:  # what torch would import in a first call
        import_module("torch._inductor.compile_fx" if peer.compiles else "torch._dynamo")
    for index, problem in enumerate(task.problems()):
        if peer is None:
            stopwatch.time(Floor.of(problem, None))
        else:
            asked = problem.as_work({OURS_PAIRS: PAIRS, OURS_DPO: DPO}.get(name, CPO))
            life.work = peer.work_on(asked.shape) or CPO
            result = stopwatch.time(partial(peer.run, asked.as_work(life.work)))
            if index < CHECKED or index == len(task.targets) - 1:
                for kind, error in Oracles(problem).check(life.work, result).items():
                    life.errors[kind] = max(error, life.errors.get(kind, 0.0))
            del result  # or the next call would run beside this one's gradients
        if life.total > stopwatch.limit:
            break


def known() -> dict[str, Callable[[], Peer]]:
    """Return how to build everyone but the floor."""
    own = {OURS: ours, OURS_PAIRS: ours, OURS_DPO: ours_dpo}
    return {**VARYING, **{name: partial(build, name) for name, build in own.items()}, PACKED: packed}


def packed() -> Peer:
    """Make ours without padding: the rows that predict something, as a body without padding would give them."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, ref_logps: Tensor | None) -> Tensor:
        there = targets != IGNORE
        ends = there.flatten(0, 1).sum(-1).cumsum(0).tolist()
        groups, candidates, _ = targets.shape
        layout = cpo_kernels.CandidateLayout([0, *ends], range(0, groups * candidates + 1, candidates))
        options = {"layout": layout, "ref_logps": None if ref_logps is None else ref_logps.flatten(), "beta": BETA}
        return cpo_kernels.linear_cpo_loss(hidden[there], weight, targets[there], **options).loss

    return Peer(PACKED, loss, ours(PACKED).sequence_logps, skips_ignored=True)
