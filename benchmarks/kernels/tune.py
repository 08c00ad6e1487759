"""Measures block sizes on the GPU at hand and rewrites their table.

`python -m benchmarks.kernels.tune` rewrites cpo_kernels/kernels/triton/tuning.json; `--out FILE` leaves that alone and
writes the new table elsewhere. For each kernel, vocabulary and dtype it times a small grid of sizes in turns, holds
each result against float64 first, and writes the fastest as entries of this architecture in place of those it had for
that kernel and dtype; other architectures keep theirs. Nothing else ever tunes: users' runs read the table.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.environment import log
from benchmarks.kernels import adopt
from benchmarks.kernels.adopt import Entry
from benchmarks.kernels.problems import LOGITS_BYTES, TRITON, LinearProblem, RowProblem, compare, triton_kernels
from benchmarks.measure import AnotherLossError, Case, Contestant, ContestantError, dtype_name, measure
from benchmarks.meters import Call
from benchmarks.setting import Setting

ROUNDS = 15

Config = dict[str, int]


def grid(**choices: Sequence[int]) -> list[Config]:
    """Return every combination."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


@dataclass(frozen=True)
class Job:
    """Makes the checked call of a configuration; ``work`` is bytes or FLOPs, and ``unit`` names work / 1e9 s."""

    call: Callable[[Config], Call]
    work: float
    unit: str = "GB/s"


@dataclass(frozen=True)
class Task:
    """Says what is tuned of one kernel at one size."""

    name: str  # of the kernel
    vocab: int  # V
    vocab_at_most: int | None  # the bound that its entry covers; None for none
    dtype: torch.dtype  # of what the kernel reads
    configs: Sequence[Config]  # the grid
    make: Callable[[int, torch.dtype, Setting], Job]  # the job of a vocabulary and a dtype, with few rows for a dry run

    def __str__(self) -> str:
        return f"V={self.vocab}, {dtype_name(self.dtype)}"


def rows(vocab: int, dtype: torch.dtype, setting: Setting) -> int:
    """Return as many rows of logits as fill a gibibyte."""
    return 9 if setting.quick else LOGITS_BYTES // (vocab * dtype.itemsize)


def row_job(vocab: int, dtype: torch.dtype, setting: Setting, *, name: str) -> Job:
    """Make the job of one read of the logits, or of one read and one write over a buffer."""
    problem = RowProblem(rows(vocab, dtype, setting), vocab, dtype, setting.device)
    makers = {"row_forward": problem.forward, "row_backward": problem.backward_, "unit_forward": problem.unit_forward_}
    work = problem.logits.nbytes * (1 if name == "row_forward" else 2)
    return Job(lambda config: makers[name](TRITON, config=config), work)


def gradient_job(vocab: int, dtype: torch.dtype, setting: Setting, *, scaled: bool) -> Job:
    """Make that of one read of a gradient for statistics of its columns, or of the gradient times a number."""
    grad = (3 * torch.randn(rows(vocab, dtype, setting), vocab, device=setting.device)).to(dtype)
    factor, kernels = torch.tensor(1.0001, device=setting.device), triton_kernels("gradients")

    def call(config: Config) -> Call:
        if scaled:
            over = grad.clone()
            kernels.scale_(over, factor, config=config)
            compare("scale_", over, grad.double() * factor.double(), torch.finfo(dtype).eps)
            return partial(kernels.scale_, over, factor, config=config)
        expected = torch.stack([grad.abs().amax(0).double(), grad.double().abs().sum(0)])
        compare("column_stats", kernels.column_stats(grad, config=config), expected, 1e-5)
        return partial(kernels.column_stats, grad, config=config)

    return Job(call, grad.nbytes * (2 if scaled else 1))


def linear_job(vocab: int, dtype: torch.dtype, setting: Setting, *, everything: bool) -> Job:
    """Make that of hidden @ weight.T without logits; ``everything``: a sample and the entropy of each row as well."""
    count, width = (9, 32) if setting.quick else (8192 if dtype != torch.float32 else 1024, 4096)
    hidden = torch.randn(count, width, device=setting.device).to(dtype)
    weight = (torch.randn(vocab, width, device=setting.device) * (2 / width**0.5)).to(dtype)
    problem = LinearProblem(hidden, weight, torch.randint(vocab, (count,), device=setting.device))
    extras: dict[str, Any] = {"seed": torch.tensor(0, device=setting.device), "entropy": True} if everything else {}
    return Job(lambda config: problem.fused(config=config, **extras), 2 * count * width * vocab, "GFLOP/s")


ROW_GRID = grid(BLOCK=(4096, 8192, 16384), TOKENS=(32,), num_warps=(4, 8, 16, 32), num_stages=(1,))
SMALL_ROW_GRID = grid(BLOCK=(1024, 2048), TOKENS=(32,), num_warps=(2, 4, 8), num_stages=(1,))
COLUMN_GRID = grid(BLOCK=(512, 1024), ROWS=(4, 8, 16), ROWS_PER_PROGRAM=(256,), num_warps=(4, 8), num_stages=(1,))
SCALE_GRID = grid(BLOCK=(4096, 8192), PROGRAMS=(528, 1056, 2112), num_warps=(4, 8), num_stages=(1,))
LINEAR_GRID = [
    {"BLOCK_R": r, "BLOCK_V": v, "BLOCK_H": h, "TMA": tma, "num_warps": warps, "num_stages": stages}
    for tma in (1, 0)
    for r, v, h, warps, stages in (
        *((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4)),
        *((128, 128, 64, 4, 4), (128, 128, 128, 8, 3), (64, 256, 64, 4, 4)),
    )
]
LINEAR_GRID_FP32 = grid(
    BLOCK_R=(64, 128), BLOCK_V=(64, 128), BLOCK_H=(16, 32), TMA=(0,), num_warps=(8,), num_stages=(2, 3)
)
BF16, FP32 = torch.bfloat16, torch.float32
LARGE = ((65536, 32000), (None, 128256))  # vocab_at_most, V
ROWS = {name: partial(row_job, name=name) for name in ("unit_forward", "row_forward", "row_backward")}
LINEAR = {name: partial(linear_job, everything=name == "linear_sample") for name in ("linear_forward", "linear_sample")}
GRADIENTS = {"column_stats": (COLUMN_GRID, False), "scale": (SCALE_GRID, True)}
GRADIENTS = {name: (own, partial(gradient_job, scaled=scaled)) for name, (own, scaled) in GRADIENTS.items()}
# What tells most first.
TASKS = [
    *(Task(n, v, most, own, ROW_GRID, f) for n, f in ROWS.items() for most, v in LARGE for own in (BF16, FP32)),
    *(Task(name, 128256, None, BF16, LINEAR_GRID, make) for name, make in LINEAR.items()),
    *(Task(name, 2000, 2048, dtype, SMALL_ROW_GRID, make) for name, make in ROWS.items() for dtype in (BF16, FP32)),
    *(Task(n, 128256, None, dtype, own, make) for n, (own, make) in GRADIENTS.items() for dtype in (BF16, FP32)),
    *(Task(name, 128256, None, FP32, LINEAR_GRID_FP32, make) for name, make in LINEAR.items()),
]
# Dtypes that an entry covers when it is written.
COVERED = {"any": ("any", "bfloat16", "float16"), "float32": ("float32",)}


def measure_task(task: Task, setting: Setting, _found: Sequence[Entry] = ()) -> Entry:
    """Return the entry of the fastest configuration that launches; raise ContestantError for a wrong one, or none."""
    vocab, configs = (509, task.configs[:2]) if setting.quick else (task.vocab, task.configs)
    job = task.make(vocab, task.dtype, setting)
    by_name = {str(config): config for config in configs}
    contestants = [Contestant(name, partial(job.call, config)) for name, config in by_name.items()]
    found = measure(Case(task.name, contestants, rounds=setting.rounds(ROUNDS, ROUNDS)), setting.device)
    for record in found:
        if record.values:
            log(f"    {record.contestant}: {job.work / record.values['seconds'] / 1e9:.0f} {job.unit}")
        elif record.note.startswith(AnotherLossError.__name__):
            raise ContestantError(f"{record.contestant}: {record.note}")
    timed = [record for record in found if record.values]
    if not timed:
        raise ContestantError("no configuration was found")
    best = min(timed, key=lambda record: record.values["seconds"])
    rate = f"{job.work / best.values['seconds'] / 1e9:.0f} {job.unit}"
    return {
        "kernel": task.name,
        # Half-precision dtypes have the same loads, stores and matrix instructions: one entry is for both.
        "dtype": "float32" if task.dtype == torch.float32 else "any",
        **({} if task.vocab_at_most is None else {"vocab_at_most": task.vocab_at_most}),
        "config": by_name[best.contestant],
        "measured": f"{rate} at V={vocab}, {dtype_name(task.dtype)}",
    }


def merged(table: adopt.Table, measured: Sequence[Entry], arch: str, source: str) -> dict[str, Any]:
    """Return the table with measured entries in place of those of their kind, the narrower before the wider ones."""
    replaced = {(entry["kernel"], arch, name) for entry in measured for name in COVERED[entry["dtype"]]}
    kept = [e for e in table["entries"] if (e["kernel"], e["arch"], e["dtype"]) not in replaced]
    new = [{"kernel": entry["kernel"], "arch": arch, **entry} for entry in measured]

    def order(entry: Entry) -> tuple[Any, ...]:
        bound = entry.get("vocab_at_most", float("inf")), entry.get("hidden_at_most", float("inf"))
        return entry["kernel"], entry["arch"], entry["dtype"] == "any", *bound

    sources = table.get("measurements", {}) | {arch: source}
    return {**table, "measurements": sources, "entries": sorted([*kept, *new], key=order)}


def selected(names: Sequence[str] | None, _device: torch.device) -> list[Task]:
    """Return the tasks of some kernels."""
    return [task for task in TASKS if names is None or task.name in names]


TUNING = adopt.Adoption(
    *(__doc__, adopt.committed("triton/tuning.json"), "entries", selected, measure_task),
    *(lambda task, why: None, merged),
)

if __name__ == "__main__":
    sys.exit(TUNING.main())
