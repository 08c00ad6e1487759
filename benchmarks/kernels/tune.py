"""Measures block sizes on the GPU at hand and rewrites their table.

`python -m benchmarks.kernels.tune` rewrites cpo_kernels/kernels/triton/tuning.json; `--out FILE` leaves that alone and
writes the new table elsewhere. For each kernel, vocabulary and dtype it times a small grid of sizes, holds each result
against the reference first, and writes the fastest as entries of this architecture in place of those it had for that
kernel and dtype; other architectures keep theirs. The table is written after every measurement, so that a time limit
loses nothing. Nothing else ever tunes: users' runs read the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.environment import NOTHING_TO_DO, log
from benchmarks.kernels.calls import HEAD, triton_kernels
from benchmarks.measure import AnotherLossError
from benchmarks.timing import Clock, clock_for
from cpo_kernels.kernels import plain
from cpo_kernels.kernels.device import architecture
from cpo_kernels.kernels.triton import support as triton_support

TABLE = Path(str(resources.files("cpo_kernels").joinpath("kernels/triton/tuning.json")))
ROUNDS = 15
CHECKED_ROWS = 32

Config = dict[str, int]
Entry = dict[str, Any]


def grid(**choices: Sequence[int]) -> list[Config]:
    """Return every combination."""
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


@dataclass(frozen=True)
class Job:
    """Holds a launcher bound to its tensors. ``work`` is bytes or FLOPs; ``unit`` names work / 1e9 s."""

    run: Callable[[Config], object]
    check: Callable[[Config], float]  # relative error of the launcher's result
    tolerance: float
    work: float
    unit: str


@dataclass(frozen=True)
class Kernel:
    """Says what is tuned of one kernel: sizes of V with the bound that their entries cover, and the grid."""

    name: str
    vocabularies: tuple[tuple[int | None, int], ...]  # (vocab_at_most, measured V)
    configs: list[Config]
    make: Callable[[Size, torch.device], Job]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Size:
    """Describes one point that is measured; ``quick`` takes few rows."""

    vocab: int
    dtype: torch.dtype
    quick: bool

    def rows(self, budget: int = 2**30) -> int:
        """Return as many as fill ``budget`` bytes."""
        return 9 if self.quick else max(1, budget // (self.vocab * self.dtype.itemsize))

    def logits(self, device: torch.device) -> Tensor:
        """Draw (R, V)."""
        return (3 * torch.randn(self.rows(), self.vocab, device=device)).to(self.dtype)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Return ||result - expected|| / ||expected||."""
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def row_forward_job(size: Size, device: torch.device) -> Job:
    """Make the job of one read of the logits."""
    logits = size.logits(device)
    targets = torch.randint(size.vocab, (len(logits),), device=device)
    expected = plain.row_forward(logits[:CHECKED_ROWS].double(), targets[:CHECKED_ROWS], None, *HEAD)[1]
    launch = partial(triton_kernels("rows").row_forward, logits, targets, None, *HEAD)

    def check(config: Config) -> float:
        return relative_error(launch(config=config)[1][:CHECKED_ROWS], expected)

    return Job(lambda config: launch(config=config), check, 1e-5, logits.nbytes, "GB/s")


def row_backward_job(size: Size, device: torch.device) -> Job:
    """Make that of one read and one write, over a buffer of its own."""
    logits = size.logits(device)
    targets, coef = torch.randint(size.vocab, (len(logits),), device=device), torch.rand(len(logits), device=device)
    some = slice(0, CHECKED_ROWS)
    exact = logits[some].double()
    stats64, _ = plain.row_forward(exact, targets[some], None, *HEAD)
    expected = plain.row_backward(exact, targets[some], None, stats64, coef[some].double(), *HEAD)
    rows = triton_kernels("rows")
    stats, _ = rows.row_forward(logits, targets, None, *HEAD)
    launch = partial(rows.row_backward_, targets=targets, row_starts=None, stats=stats, coef=coef)
    head = dict(zip(("bias", "logit_scale", "softcap", "temperature"), HEAD, strict=True))
    buffer = logits.clone()

    def check(config: Config) -> float:
        buffer.copy_(logits)
        launch(buffer, **head, config=config)
        return relative_error(buffer[some], expected)

    tolerance = 16 * torch.finfo(size.dtype).eps
    return Job(lambda config: launch(buffer, **head, config=config), check, tolerance, 2 * logits.nbytes, "GB/s")


def column_stats_job(size: Size, device: torch.device) -> Job:
    """Make that of one read of a gradient."""
    grad = size.logits(device)
    launch = triton_kernels("gradients").column_stats

    def check(config: Config) -> float:
        return relative_error(launch(grad, config=config), expected)

    expected = torch.stack([grad.abs().amax(0).double(), grad.double().abs().sum(0)])
    return Job(lambda config: launch(grad, config=config), check, 1e-5, grad.nbytes, "GB/s")


def scale_job(size: Size, device: torch.device) -> Job:
    """Make that of a gradient times a number; the entry's bound is the tensor's size, so it has none."""
    tensor, factor = size.logits(device), torch.tensor(1.0001, device=device)
    original = tensor.clone()
    launch = triton_kernels("gradients").scale_

    def check(config: Config) -> float:
        tensor.copy_(original)
        launch(tensor, factor, config=config)
        return relative_error(tensor, original.float() * factor)

    tolerance = torch.finfo(size.dtype).eps
    return Job(lambda config: launch(tensor, factor, config=config), check, tolerance, 2 * tensor.nbytes, "GB/s")


def linear_job(size: Size, device: torch.device, *, everything: bool) -> Job:
    """Make that of hidden @ weight.T without logits; ``everything``: a sample and the entropy of each row as well."""
    rows, width = (9, 32) if size.quick else (8192 if size.dtype != torch.float32 else 1024, 4096)
    hidden = torch.randn(rows, width, device=device).to(size.dtype)
    weight = (torch.randn(size.vocab, width, device=device) * (2 / width**0.5)).to(size.dtype)
    targets = torch.randint(size.vocab, (rows,), device=device)
    logits = hidden[:CHECKED_ROWS].double() @ weight.double().T
    expected = plain.row_forward(logits, targets[:CHECKED_ROWS], None, *HEAD)[1]
    extras = {"seed": torch.tensor(0, device=device), "entropy": True} if everything else {}
    launch = partial(triton_kernels("linear").linear_forward, hidden, weight, targets, None, *HEAD, **extras)

    def check(config: Config) -> float:
        return relative_error(launch(config=config).logps[:CHECKED_ROWS], expected)

    return Job(lambda config: launch(config=config), check, 1e-4, 2 * rows * width * size.vocab, "GFLOP/s")


ROW_VOCABULARIES = ((2048, 2000), (65536, 32000), (None, 128256))
ROW_GRID = grid(BLOCK=(4096, 8192, 16384), TOKENS=(32,), num_warps=(4, 8, 16), num_stages=(1,))
SMALL_ROW_GRID = grid(BLOCK=(1024, 2048), TOKENS=(32,), num_warps=(2, 4, 8), num_stages=(1,))
COLUMN_GRID = grid(BLOCK=(512, 1024), ROWS=(4, 8, 16), ROWS_PER_PROGRAM=(256,), num_warps=(4, 8), num_stages=(1,))
SCALE_GRID = grid(BLOCK=(4096, 8192), PROGRAMS=(528, 1056, 2112), num_warps=(4, 8), num_stages=(1,))
LINEAR_GRID = [
    {"BLOCK_R": r, "BLOCK_V": v, "BLOCK_H": h, "TMA": tma, "num_warps": warps, "num_stages": stages}
    for tma in (1, 0)
    for r, v, h, warps, stages in (
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 3),
        (64, 256, 64, 4, 4),
    )
]
LINEAR_GRID_FP32 = grid(
    BLOCK_R=(64, 128), BLOCK_V=(64, 128), BLOCK_H=(16, 32), TMA=(0,), num_warps=(8,), num_stages=(2, 3)
)
# Dtypes that an entry covers when it is written.
COVERED = {"any": ("any", "bfloat16", "float16"), "float32": ("float32",)}
HALF, SINGLE = (torch.bfloat16,), (torch.float32,)
ANY_VOCABULARY = ((None, 128256),)
KERNELS = (
    Kernel("row_forward", ROW_VOCABULARIES[1:], ROW_GRID, row_forward_job),
    Kernel("row_backward", ROW_VOCABULARIES[1:], ROW_GRID, row_backward_job),
    Kernel("linear_forward", ANY_VOCABULARY, LINEAR_GRID, partial(linear_job, everything=False), HALF),
    Kernel("linear_sample", ANY_VOCABULARY, LINEAR_GRID, partial(linear_job, everything=True), HALF),
    Kernel("row_forward", ROW_VOCABULARIES[:1], SMALL_ROW_GRID, row_forward_job),
    Kernel("row_backward", ROW_VOCABULARIES[:1], SMALL_ROW_GRID, row_backward_job),
    Kernel("column_stats", ANY_VOCABULARY, COLUMN_GRID, column_stats_job),
    Kernel("scale", ANY_VOCABULARY, SCALE_GRID, scale_job),
    Kernel("linear_forward", ANY_VOCABULARY, LINEAR_GRID_FP32, partial(linear_job, everything=False), SINGLE),
    Kernel("linear_sample", ANY_VOCABULARY, LINEAR_GRID_FP32, partial(linear_job, everything=True), SINGLE),
)


@dataclass(frozen=True)
class Found:
    """Holds the fastest configuration of those tried, and how many of the grid's were."""

    config: Config
    seconds: float
    tried: int


@dataclass(frozen=True)
class Measured:
    """Holds an entry without its architecture; ``complete``: the whole grid was tried for it."""

    entry: Entry
    complete: bool


def median_seconds(call: Callable[[], object], clock: Clock, rounds: int) -> float:
    """Time a call that has run before."""
    return statistics.median(clock(call)[0] for _ in range(rounds))


def candidates(kernel: Kernel, quick: bool) -> list[Config]:
    """Return the grid, or its beginning."""
    return kernel.configs[: 2 if quick else None]


def fastest(kernel: Kernel, job: Job, clock: Clock, quick: bool, deadline: float) -> Found | None:
    """Return the fastest configuration of those with the right result that were tried until the deadline."""
    best: tuple[Config, float] | None = None
    tried = 0
    for config in candidates(kernel, quick):
        if time.monotonic() > deadline:
            log("    the time was up")
            break
        tried += 1
        try:
            error = job.check(config)
            seconds = median_seconds(partial(job.run, config), clock, 1 if quick else ROUNDS)
        except Exception as reason:  # too much shared memory, registers that do not suffice, ...
            log(f"    {config}: does not run here: {str(reason).splitlines()[:1]}")
            continue
        wrong = not error <= job.tolerance  # not `>`: NaN is wrong too
        log(f"    {config}: {job.work / seconds / 1e9:.0f} {job.unit}, error {error:.1e}" + " WRONG" * wrong)
        if wrong:
            raise AnotherLossError(f"{kernel.name} {config}: error {error:.2g}, allowed {job.tolerance:.2g}")
        if best is None or seconds < best[1]:
            best = config, seconds
    return None if best is None else Found(*best, tried)


def measure(selected: Sequence[Kernel], device: torch.device, quick: bool, deadline: float) -> Iterator[Measured]:
    """Measure until the deadline; of the measurement that it falls into, what was found until then."""
    clock = clock_for(device)
    for kernel in selected:
        for (bound, vocab), dtype in itertools.product(kernel.vocabularies, kernel.dtypes):
            if time.monotonic() > deadline:
                log(f"not measured, the time was up: {kernel.name} V={vocab} {dtype}")
                continue
            log(f"  {kernel.name} V={vocab} {dtype}")
            size = Size(509 if quick else vocab, dtype, quick)
            job = kernel.make(size, device)
            try:
                found = fastest(kernel, job, clock, quick, deadline)
            except AnotherLossError as error:
                log(f"    left out: {error}")
                continue
            if found is None:
                log("    no configuration was found")
                continue
            total = len(candidates(kernel, quick))
            rate = f"{job.work / found.seconds / 1e9:.0f} {job.unit} at V={size.vocab}, {str(dtype)[6:]}"
            entry = {
                "kernel": kernel.name,
                # Half-precision dtypes have the same loads, stores and matrix instructions: one entry is for both.
                "dtype": "float32" if dtype == torch.float32 else "any",
                **({} if bound is None else {"vocab_at_most": bound}),
                "config": found.config,
                "measured": rate if found.tried == total else f"{rate}, {found.tried} of {total} configurations tried",
            }
            yield Measured(entry, complete=found.tried == total)


def merged(table: dict[str, Any], measured: Sequence[Entry], arch: str, source: str) -> dict[str, Any]:
    """Return the table with the measured entries in place of those of the same kernel, architecture and dtype.

    Entries are searched in order, so that narrower bounds and named dtypes come before wider ones.
    """
    replaced = {(entry["kernel"], arch, name) for entry in measured for name in COVERED[entry["dtype"]]}
    kept = [e for e in table["entries"] if (e["kernel"], e["arch"], e["dtype"]) not in replaced]
    new = [{"kernel": entry["kernel"], "arch": arch, **entry} for entry in measured]

    def order(entry: Entry) -> tuple[Any, ...]:
        bound = entry.get("vocab_at_most", float("inf")), entry.get("hidden_at_most", float("inf"))
        return entry["kernel"], entry["arch"], entry["dtype"] == "any", *bound

    sources = table.get("measurements", {}) | {arch: source}
    return {**table, "measurements": sources, "entries": sorted([*kept, *new], key=order)}


def describe_source(device: torch.device) -> str:
    """Name device, versions and commit in a line."""
    described = environment.describe(["kernels.tune"], device.type)
    gpu = described.get("gpu", {"name": described["device"]})
    assert isinstance(gpu, dict)
    versions = f"torch {environment.version('torch')}, triton {environment.version('triton')}"
    return (
        f"{gpu['name']}, driver {gpu.get('driver')}, {versions}, commit {described['commit']} ({described['sources']})"
    )


def write_table(table: Mapping[str, Any], entries: str, path: Path) -> None:
    """Write JSON with one of a list of entries a line, whatever the others take."""
    text = json.dumps(table | {entries: []}, indent=2)
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in table[entries])
    path.write_text(
        text.replace(f'"{entries}": []', f'"{entries}": [\n{lines}\n  ]' if lines else f'"{entries}": []') + "\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Measure and write; 1 if something could not be measured, or not wholly in the time, or came out wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({kernel.name for kernel in KERNELS})
    parser.add_argument("--out", type=Path, default=TABLE, help="file to write (default: the committed table)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cpu for a dry run")
    parser.add_argument("--kernels", nargs="+", choices=names, default=names, metavar="KERNEL", help=f"{names}")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="try nothing more after this time")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two configurations: a dry run")
    args = parser.parse_args(argv)
    if args.quick and args.out == TABLE:
        parser.error("a dry run must not rewrite the committed table; give --out")
    if args.device.type == "cpu" and (reason := triton_support.unavailable_reason()):
        log(reason)
        return NOTHING_TO_DO
    arch, source = architecture(args.device), describe_source(args.device)
    selected = [kernel for kernel in KERNELS if kernel.name in args.kernels]
    expected = sum(len(kernel.vocabularies) * len(kernel.dtypes) for kernel in selected)
    table, found = json.loads(TABLE.read_text()), []
    for measured in measure(selected, args.device, args.quick, time.monotonic() + args.seconds):
        found.append(measured)
        write_table(merged(table, [each.entry for each in found], arch, source), "entries", args.out)
    complete = sum(measured.complete for measured in found)
    log(f"{len(found)} of {expected} entries of {arch} measured, {complete} of them with the whole grid: {args.out}")
    return 0 if complete == expected else 1


if __name__ == "__main__":
    sys.exit(main())
