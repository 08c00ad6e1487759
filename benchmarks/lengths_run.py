"""One contestant on batches of varying lengths, in a process that has compiled and cached nothing before.

`python -m benchmarks.lengths_run TASK CONTESTANT OUT` writes the seconds of every call as JSON, for benchmarks.lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

import cpo_kernels
from benchmarks.contestants import FLOOR, OURS, OURS_DPO, OURS_PAIRS, Contestant, contestant, floor
from benchmarks.measure import SAME_LOSS, AnotherLossError, named
from benchmarks.oracle import Dense, Errors, Oracle
from benchmarks.peers import Peer, ours, ours_dpo
from benchmarks.problem import BETA, IGNORE, Problem
from benchmarks.shapes import DPO, PAIRS, Shape
from benchmarks.timing import Call
from benchmarks.varying import builders
from cpo_kernels.trainer.files import write_whole

PACKED = "cpo-kernels, packed"
OUTPUT = "output"  # file of what a process has printed
CHECKED = 3  # calls whose results are held against fp64; the last one is a fourth


@dataclass(frozen=True)
class Task:
    """Batches and the head that they meet.

    Attributes:
        targets: of every batch, (G, C, T), -100 behind the end of a completion.
        vocab: V.
        hidden: H.
        dtype: of hidden states and head.
        device: where they lie.
        threads: of torch, on the host.
    """

    targets: list[Tensor]
    vocab: int
    hidden: int
    dtype: torch.dtype
    device: torch.device
    threads: int

    def problems(self) -> Iterator[Problem]:
        """One batch after the other; the head is the same tensor in all of them."""
        drawn = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        exact = torch.randn(self.vocab, self.hidden, **drawn) * (2 / self.hidden**0.5)
        weight = exact.to(self.dtype).detach().requires_grad_()
        for index, some in enumerate(self.targets):
            targets = some.to(self.device)
            groups, candidates, tokens = targets.shape
            shape = Shape(f"batch {index + 1}", self.vocab, self.hidden, groups, tokens, self.dtype, "", candidates)
            hidden = torch.randn(*targets.shape, self.hidden, **drawn) + 2.5 * exact[targets.clamp(min=0)]
            ref = 10 * torch.randn(groups, candidates, **drawn) - 3 * (targets != IGNORE).sum(-1)
            yield Problem(shape, hidden.to(self.dtype).requires_grad_(), weight, targets, ref)


@dataclass
class Life:
    """What one contestant did.

    Attributes:
        work: of the contestant.
        seconds: of every call that came to its end.
        errors: of every call that was checked.
        unfinished: seconds that a last call had taken when it was stopped.
    """

    work: str = ""
    seconds: list[float] = field(default_factory=list)
    errors: list[Errors] = field(default_factory=list)
    unfinished: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all calls."""
        return sum(self.seconds) + self.unfinished

    def worst(self) -> Errors | None:
        """The largest error of each kind."""
        if not self.errors:
            return None
        return Errors(*(max(getattr(e, kind) for e in self.errors) for kind in ("loss", "grad_hidden", "grad_weight")))


def packed() -> Peer:
    """Ours without padding: the rows that predict something, as a body without padding would give them."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor, ref_logps: Tensor | None) -> Tensor:
        there = targets != IGNORE
        ends = there.flatten(0, 1).sum(-1).cumsum(0).tolist()
        groups, candidates, _ = targets.shape
        layout = cpo_kernels.CandidateLayout([0, *ends], range(0, groups * candidates + 1, candidates))
        refs = None if ref_logps is None else ref_logps.flatten()
        return cpo_kernels.linear_cpo_loss(
            hidden[there], weight, targets[there], layout=layout, ref_logps=refs, beta=BETA
        ).loss

    return Peer(PACKED, loss, ours(PACKED).sequence_logps, skips_ignored=True)


def entry_of(name: str, peer: Peer | None, problem: Problem) -> Contestant:
    """A contestant bound to one batch."""
    if peer is None:
        return floor(problem, None)
    return contestant(peer, problem.as_work({OURS_PAIRS: PAIRS, OURS_DPO: DPO}.get(name, problem.shape.work)))


def waited(call: Call) -> tuple[float, object]:
    """Seconds on the host's clock until the device is done too, and the result."""
    begin = time.perf_counter()
    result = call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def check(entry: Contestant, problem: Problem, result: object) -> Errors | None:
    """Errors against fp64; None for a floor.

    Raises:
        AnotherLossError: they are more than rounding explains.
    """
    loss, grads = result  # type: ignore[misc]
    if loss is None:
        return None
    problem = problem.as_work(entry.work)
    errors = named(entry.name, lambda: Oracle(problem, Dense.of(problem)).errors(loss, grads))()
    bound = SAME_LOSS[problem.shape.dtype]
    if not errors.worst() <= bound:  # not `>`: NaN is another loss too
        raise AnotherLossError(entry.name, f"on {problem.shape.name}: {errors}, expected at most {bound}")
    return errors


class Stopwatch:
    """Times calls, and ends the process in the midst of one when all together have taken `limit` seconds."""

    def __init__(self, life: Life, limit: float, at_limit: Callable[[], None]) -> None:
        self.life, self.limit, self.at_limit = life, limit, at_limit
        self.begin = 0.0

    def time(self, call: Call) -> object:
        """Run a call."""
        alarm = threading.Timer(min(self.limit - self.life.total, threading.TIMEOUT_MAX), self.stop)
        alarm.daemon = True
        self.begin = time.perf_counter()
        alarm.start()
        seconds, result = waited(call)
        alarm.cancel()
        self.life.seconds.append(seconds)
        return result

    def stop(self) -> None:
        """In the timer's thread: the call is still running."""
        self.life.unfinished = time.perf_counter() - self.begin
        self.at_limit()


def import_what_is_called(peer: Peer | None) -> None:
    """What torch would import in a first call: operators written in Python want the one, compilers the other."""
    if peer is not None:
        import_module("torch._dynamo")
    if peer is not None and peer.compiles:
        import_module("torch._inductor.compile_fx")


def live(name: str, task: Task, life: Life, stopwatch: Stopwatch) -> None:
    """All batches, until those done have taken more than the limit."""
    own = {OURS: ours, OURS_PAIRS: ours, OURS_DPO: ours_dpo}
    known = {**builders(), **{key: partial(build, key) for key, build in own.items()}, PACKED: packed}
    peer = None if name == FLOOR else known[name]()
    import_what_is_called(peer)
    for index, problem in enumerate(task.problems()):
        entry = entry_of(name, peer, problem)
        life.work = entry.work
        result = stopwatch.time(named(name, entry.call))
        if index < CHECKED or index == len(task.targets) - 1:
            errors = check(entry, problem, result)
            life.errors += [errors] if errors else []
        del result  # or the next call would run beside this one's gradients
        if life.total > stopwatch.limit:
            break


def alone(folder: Path, argv: list[str]) -> None:
    """:func:`main` in a process that has just been forked: a group of its own, empty caches, output in the folder."""
    os.setsid()
    os.environ |= {name: str(folder / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    with (folder / OUTPUT).open("wb") as stream:
        for printed in (1, 2):
            os.dup2(stream.fileno(), printed)
    main(argv)


def main(argv: list[str] | None = None) -> None:
    """Write one life as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="file that benchmarks.lengths saved")
    parser.add_argument("contestant")
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds of all calls together")
    args = parser.parse_args(argv)
    task: Task = torch.load(args.task, weights_only=False)
    torch.set_num_threads(task.threads)
    life = Life()

    def write() -> None:
        write_whole(args.out, json.dumps(asdict(life)))

    def write_and_end() -> None:
        write()
        os._exit(0)  # a call in another thread cannot be interrupted

    live(args.contestant, task, life, Stopwatch(life, args.limit, write_and_end))
    write()


if __name__ == "__main__":
    main()
