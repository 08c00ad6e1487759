"""Fifty batches of naturally varying lengths, first call included: what a user waits for.

A batch is some prompts of a real text, each with its true completion and the completions of other examples as
negatives, padded to its longest. Hidden states are random, since their values do not matter here. Every contestant
has a process of its own with empty caches of compiled code; importing is not counted. Processes take turns, so ours
and the floor run first and last, and their difference is the drift of the machine.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import texts
from benchmarks.contestants import FLOOR, OURS, OURS_PAIRS
from benchmarks.lengths_run import PACKED, Life, Task
from benchmarks.problem import IGNORE, Errors
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.texts import Corpus
from benchmarks.varying import builders

_ROOT = Path(__file__).parent.parent
CANDIDATES = 4  # K = 3
GROUPS = (2, 3, 4)
PAIRS_ONLY = ("Liger CPO",)
COMPILING = ("torch.compile", "torch.compile, dynamic=True", "Liger CPO", "Cut Cross-Entropy")
START_AND_IMPORT = 120.0  # seconds that a process may take beside its calls


@dataclass(frozen=True)
class Sizes:
    """Of one case.

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


ON_CPU = (Sizes(50, 48, 50257, 256, torch.bfloat16, 9.0, 20.0),)
ON_GPU = (Sizes(50, 512, 128256, 4096, torch.bfloat16, 20.0, 90.0),)
QUICK = (Sizes(6, 32, 8209, 32, torch.float32, 5.0, 20.0),)


def run(setting: Setting) -> Iterator[Record]:
    """A case for each dtype."""
    for sizes in QUICK if setting.quick else ON_GPU if setting.on_gpu else ON_CPU:
        corpus = texts.load(setting, longest=10 * sizes.longest)
        targets = draw_batches(corpus, sizes)
        task = Task(targets, sizes.vocab, sizes.hidden, sizes.dtype, setting.device, torch.get_num_threads())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "task.pt"
            torch.save(task, path)
            yield from Case(task, sizes, path, setting.quick).records()


def draw_batches(corpus: Corpus, sizes: Sizes, seed: int = 0) -> list[Tensor]:
    """Targets of every batch, (G, C, T): the true completion first, then those of other examples.

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
    """(G, C, T), as long as the longest completion, -100 behind the others."""
    longest = max(len(tokens) for group in groups for tokens in group)
    return torch.tensor([[[*tokens, *[IGNORE] * (longest - len(tokens))] for tokens in group] for group in groups])


class Case:
    """All contestants on the same batches, one process after the other."""

    def __init__(self, task: Task, sizes: Sizes, path: Path, quick: bool) -> None:
        self.task, self.sizes, self.path, self.quick = task, sizes, path, quick
        self.totals: dict[str, float] = {}  # of the first run of whoever has others compared with it
        self.conditions = conditions(task, sizes)

    def records(self) -> Iterator[Record]:
        """Floor and ours, the peers, ours and the floor again."""
        for name in (FLOOR, OURS, OURS_PAIRS, PACKED):
            yield self.measure(name, run="first")
        for name in builders():
            if self.quick and name in COMPILING:
                yield self.record(name, note="left out of a quick run, since it compiles for seconds")
            else:
                yield self.measure(name)
        for name in (OURS, FLOOR):
            yield self.measure(name, run="last")

    def measure(self, name: str, **more: Any) -> Record:
        """One process; only ours and the floor are never stopped."""
        life = in_a_process(self.path, name, self.limit(name))
        if isinstance(life, str):
            return self.record(name, note=life, **more)
        done, total = len(life.seconds), sum(life.seconds)
        self.totals.setdefault(name, total)
        stopped = f"stopped after {done} batches: {total:.1f} s" if done < len(self.task.targets) else ""
        return self.record(name, self.values(name, life), stopped, **more)

    def limit(self, name: str) -> float:
        """Seconds after which a peer is stopped: it has taken at least twice as long as ours, whatever comes."""
        if name in (FLOOR, OURS, OURS_PAIRS, PACKED):
            return float("inf")
        chosen = self.sizes.limit_compiling if name in COMPILING else self.sizes.limit
        return max(chosen, 2 * self.totals[OURS])

    def values(self, name: str, life: Life) -> dict[str, float]:
        """Of a contestant that ran; `total` is of the batches done, and ratios are of totals."""
        total = sum(life.seconds)
        base = OURS_PAIRS if name in (*PAIRS_ONLY, OURS_PAIRS) else OURS
        values = {"total": total, "first": life.seconds[0], "slowest": max(life.seconds)}
        values |= {"median": statistics.median(life.seconds), "batches": float(len(life.seconds))}
        values |= {"floor": total / self.totals[FLOOR]}
        if name != FLOOR and base in self.totals:
            values["of_ours"] = total / self.totals[base]
        return values | error_values(life.errors)

    def record(self, name: str, values: dict[str, float] | None = None, note: str = "", **more: Any) -> Record:
        """Of one contestant."""
        pairs = name in (*PAIRS_ONLY, OURS_PAIRS)
        work = {"K": 1, "work": "pairs"} if pairs else {"K": CANDIDATES - 1, "work": "cpo"}
        case = f"{self.sizes.batches} batches of varying lengths, {self.conditions['dtype']}"
        return Record(case, name, values or {}, self.conditions | work | more, note)


def conditions(task: Task, sizes: Sizes) -> dict[str, Any]:
    """Of a case: N counts the tokens of all batches, `padding` is the share of positions without one."""
    positions, tokens = sum(t.numel() for t in task.targets), sum(int((t != IGNORE).sum()) for t in task.targets)
    return {
        "V": sizes.vocab,
        "H": sizes.hidden,
        "N": tokens,
        "dtype": str(sizes.dtype).removeprefix("torch."),
        "padding": round(1 - tokens / positions, 3),
        "shapes": len({t.shape for t in task.targets}),
        "longest": max(t.shape[-1] for t in task.targets),
    }


def error_values(errors: Errors | None) -> dict[str, float]:
    """By the names of records."""
    if errors is None:
        return {}
    return {
        "error_loss": errors.loss,
        "error_grad_hidden": errors.grad_hidden,
        "error_grad_weight": errors.grad_weight,
    }


def in_a_process(task: Path, name: str, limit: float) -> Life | str:
    """One contestant's life, or why there is none."""
    command = [sys.executable, "-m", "benchmarks.lengths_run", str(task), name, "--limit", str(limit)]
    with tempfile.TemporaryDirectory() as cache:
        caches = {key: f"{cache}/{key}" for key in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        try:
            done = subprocess.run(
                command,
                cwd=_ROOT,
                env=os.environ | caches,
                capture_output=True,
                text=True,
                timeout=None if limit == float("inf") else limit + START_AND_IMPORT,
            )
        except subprocess.TimeoutExpired as error:
            return f"no end of one call after {error.timeout:.0f} s"
    if done.returncode:
        return next(reversed(done.stderr.strip().splitlines()), f"ended with {done.returncode}")
    life = json.loads(done.stdout.splitlines()[-1])
    return Life(tuple(life["seconds"]), Errors(**life["errors"]) if life["errors"] else None)
