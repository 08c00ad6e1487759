"""Fifty batches of naturally varying lengths, first call included: what a user waits for.

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import texts
from benchmarks.contestants import FLOOR, FLOORS, OURS, OURS_DPO, OURS_ON, OURS_PAIRS
from benchmarks.lengths_run import OUTPUT, PACKED, Life, Task, alone
from benchmarks.oracle import Errors
from benchmarks.problem import IGNORE
from benchmarks.records import Record
from benchmarks.setting import Setting
from benchmarks.shapes import CPO, POLICIES
from benchmarks.texts import Corpus
from benchmarks.varying import COMPILED, DYNAMIC, builders

CANDIDATES = 4  # K = 3
GROUPS = (2, 3, 4)
OWN = (FLOOR, OURS, PACKED, OURS_PAIRS, OURS_DPO)
COMPILING = (COMPILED, DYNAMIC, "Liger CPO", "Liger DPO", "Cut Cross-Entropy")
QUICK_PEERS = ("eager",)


@dataclass(frozen=True)
class Sizes:
    """Of the case.

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


ON_CPU = Sizes(50, 40, 50257, 256, torch.bfloat16, 6.0, 12.0)
ON_GPU = Sizes(50, 512, 128256, 4096, torch.bfloat16, 20.0, 90.0)
QUICK = Sizes(6, 32, 8209, 32, torch.float32, 5.0, 20.0)


def run(setting: Setting) -> Iterator[Record]:
    """One case. On the CPU it is in bfloat16: in float32 it would take three times as long."""
    sizes = QUICK if setting.quick else ON_GPU if setting.on_gpu else ON_CPU
    targets = draw_batches(texts.load(setting, longest=10 * sizes.longest), sizes)
    task = Task(targets, sizes.vocab, sizes.hidden, sizes.dtype, setting.device, torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.pt"
        torch.save(task, path)
        yield from Case(task, sizes, path, setting).records()


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

    def __init__(self, task: Task, sizes: Sizes, path: Path, setting: Setting) -> None:
        self.task, self.sizes, self.path = task, sizes, path
        self.left_out = left_out(setting)
        self.totals: dict[str, float] = {}  # of first runs
        self.conditions = conditions(task, sizes)
        self.case = f"{sizes.batches} batches of varying lengths, {self.conditions['dtype']}"

    def records(self) -> Iterator[Record]:
        """Floor and ours, the peers, ours and the floor again."""
        for name in OWN:
            yield self.measure(name, run="first")
        for name in builders():
            yield self.measure(name)
        for name in (OURS, FLOOR):
            yield self.measure(name, run="last")

    def measure(self, name: str, **more: Any) -> Record:
        """One process.

        Raises:
            RuntimeError: the floor or ours failed, with which all others are compared.
        """
        if name in self.left_out:
            return self.record(name, self.left_out[name], **more)
        life = in_a_process(self.path, name, self.limit(name))
        if isinstance(life, str) and name in (FLOOR, OURS):
            raise RuntimeError(f"{name}: {life}")
        if isinstance(life, str):
            return self.record(name, life, **more)
        self.totals.setdefault(name, life.total)
        done = len(life.seconds)
        stopped = f"stopped after {done} batches: {life.total:.1f} s" if done < len(self.task.targets) else ""
        return self.record(name, stopped, life, **more)

    def limit(self, name: str) -> float:
        """Seconds after which a peer is stopped: it has taken at least twice as long as ours, whatever comes."""
        if name in OWN:
            return math.inf
        chosen = self.sizes.limit_compiling if name in COMPILING else self.sizes.limit
        return max(chosen, 2 * self.totals[OURS])

    def record(self, name: str, note: str, life: Life | None = None, **more: Any) -> Record:
        """Of one contestant."""
        work = life.work if life else CPO
        k = CANDIDATES - 1 if work == CPO else 1
        values = self.values(name, life) if life else {}
        return Record(self.case, name, values, self.conditions | {"K": k, "work": work} | more, note)

    def values(self, name: str, life: Life) -> dict[str, float]:
        """Of a contestant that ran; `total` is of what it did, and ratios are of totals."""
        values = {"total": life.total, "batches": float(len(life.seconds))}
        if life.seconds:
            values |= {"first": life.seconds[0], "slowest": max(life.seconds)}
            values["median"] = statistics.median(life.seconds)
        floor, base = FLOORS[life.work], OURS_ON[life.work]
        if floor in self.totals:
            values["floor"] = life.total / self.totals[floor]
        if name != floor and base in self.totals:
            values["of_ours"] = life.total / self.totals[base]
        if errors := life.worst():
            values |= {"error_loss": errors.loss}
            values |= {"error_grad_hidden": errors.grad_hidden, "error_grad_weight": errors.grad_weight}
        return values


def left_out(setting: Setting) -> dict[str, str]:
    """Who does not run, and why."""
    why = {"QuACK": "computes a cross-entropy and no sequence log-likelihoods: see the part heads"}
    if not setting.on_gpu:
        why |= dict.fromkeys(POLICIES, "a call takes tens of seconds, as with the policy that runs")
        why |= dict.fromkeys((OURS_DPO, "Liger DPO"), "compiles and calls as Liger CPO does: see the part heads")
        why[DYNAMIC] = "compiles as long as torch.compile does by default"
    if setting.quick:
        why |= {name: "not in a quick run" for name in builders() if name not in QUICK_PEERS}
    return why


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


def in_a_process(task: Path, name: str, limit: float) -> Life | str:
    """One contestant's life in a process with empty caches, or why there is none."""
    on_gpu = torch.cuda.is_available()  # where a process that has looked for GPUs must not be forked
    context = multiprocessing.get_context("spawn" if on_gpu else "forkserver")
    if not on_gpu:  # its server imports torch and never calls it
        context.set_forkserver_preload(["benchmarks.lengths_run", "torch._dynamo"])
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        out, output = folder / "life.json", folder / OUTPUT
        argv = [str(task), name, str(out), "--limit", str(limit)]
        process = context.Process(target=alone, args=(folder, argv))
        process.start()
        try:
            process.join()
        finally:
            process.kill()
            end_group(process.pid)
        if process.exitcode:
            last = output.read_text(errors="replace").strip().splitlines()[-1:] if output.exists() else []
            return last[0] if last else f"ended with {process.exitcode}"
        life = json.loads(out.read_text(encoding="utf-8"))
    return Life(life["work"], life["seconds"], [Errors(**one) for one in life["errors"]], life["unfinished"])


def end_group(process_group: int) -> None:
    """End what a process that was stopped has left: a compiler, for instance."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process_group, signal.SIGKILL)
