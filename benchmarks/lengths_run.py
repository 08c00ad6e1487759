"""One contestant on batches of varying lengths, in a process that has compiled and cached nothing before.

`python -m benchmarks.lengths_run TASK CONTESTANT` prints the seconds of every call as JSON, for benchmarks.lengths.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # torch imports it in somebody's first call, and importing is not counted
import torch._inductor.compile_fx
from torch import Tensor

import cpo_kernels
from benchmarks.contestants import FLOOR, OURS, OURS_PAIRS, Contestant, contestant, floor
from benchmarks.measure import SAME_LOSS, AnotherLossError, named
from benchmarks.peers import Peer, ours
from benchmarks.problem import BETA, IGNORE, Dense, Errors, Oracle, Problem
from benchmarks.shapes import Shape
from benchmarks.timing import Call
from benchmarks.varying import builders

PACKED = "cpo-kernels, packed"
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


@dataclass(frozen=True)
class Life:
    """What one contestant did: seconds of every call, and its worst errors over the calls that were checked."""

    seconds: tuple[float, ...]
    errors: Errors | None


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
    return contestant(peer, problem.as_pairs() if name == OURS_PAIRS else problem)


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
    problem = problem.as_pairs() if entry.pairs else problem
    errors = named(entry.name, lambda: Oracle(problem, Dense.of(problem)).errors(loss, *grads))()
    bound = SAME_LOSS[problem.shape.dtype]
    if not errors.worst() <= bound:  # not `>`: NaN is another loss too
        raise AnotherLossError(entry.name, f"on {problem.shape.name}: {errors}, expected at most {bound}")
    return errors


def worst(errors: list[Errors]) -> Errors | None:
    """The largest of each kind."""
    if not errors:
        return None
    kinds = zip(*(asdict(one).values() for one in errors), strict=True)
    return Errors(*map(max, kinds))


def live(name: str, task: Task, limit: float) -> Life:
    """All batches, until those done have taken more than `limit` seconds together."""
    known = {**builders(), OURS: partial(ours, OURS), OURS_PAIRS: partial(ours, OURS_PAIRS), PACKED: packed}
    peer = None if name == FLOOR else known[name]()
    seconds, errors = [], []
    for index, problem in enumerate(task.problems()):
        entry = entry_of(name, peer, problem)
        elapsed, result = waited(named(name, entry.call))
        seconds.append(elapsed)
        if index < CHECKED or index == len(task.targets) - 1:
            errors.append(check(entry, problem, result))
        del result  # or the next call would run beside this one's gradients
        if sum(seconds) > limit:
            break
    return Life(tuple(seconds), worst([one for one in errors if one is not None]))


def main(argv: list[str] | None = None) -> None:
    """Print one life as a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path, help="file that benchmarks.lengths saved")
    parser.add_argument("contestant")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    args = parser.parse_args(argv)
    task: Task = torch.load(args.task, weights_only=False)
    torch.set_num_threads(task.threads)
    print(json.dumps(asdict(live(args.contestant, task, args.limit))))


if __name__ == "__main__":
    main()
