"""Measures backends against each other on the GPU at hand and rewrites their choices.

`python -m benchmarks.kernels.choose` rewrites cpo_kernels/kernels/selection.json; `--out FILE` leaves that alone and
writes the new table elsewhere. Operation by operation and size by size it times every backend that has the operation,
holds each result against float64 first, and writes a choice for this architecture where another than the default is
faster by more than 2 %, in place of the choices it had for that operation and dtype; other architectures keep theirs.
Where a choice is between ways of a whole call, the call is timed as users make it, with what was chosen for its rows
before. The table is written after every measurement, so that a time limit loses nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from benchmarks.contestants import LineUp
from benchmarks.environment import NOTHING_TO_DO, log
from benchmarks.kernels.calls import (
    CONTRASTS,
    CUDA,
    LOGITS_BYTES,
    TRITON,
    ContrastProblem,
    LogitsProblem,
    RowProblem,
    arch_of,
    missing,
    missing_hopper,
    under_choices,
)
from benchmarks.kernels.tune import describe_source, write_table
from benchmarks.measure import Case, free_memory, measure, ready, summary
from benchmarks.peers import ours
from benchmarks.problem import draw
from benchmarks.setting import Setting
from benchmarks.shapes import BAR_8K, NO_GRAD, TRAINED
from benchmarks.timing import Call
from cpo_kernels.kernels import registry, selection
from cpo_kernels.kernels.cuda import rows as cuda_rows
from cpo_kernels.kernels.selection import AUTO, Choice
from cpo_kernels.kernels.triton import support as triton_support

TABLE = Path(str(resources.files("cpo_kernels").joinpath("kernels/selection.json")))
FASTER = 1.02  # what another than the default must be more than
BUILT_UPON = ("row_forward", "row_backward", "contrast")  # by the whole calls that are measured after them
NAMES_OF_NONE = {
    "logits_loss": "the plain way",
    "row_gradient_": "two kernels",
    "linear_forward": "product and row kernel",
    "linear_kept": "logits",
}

Entry = dict[str, Any]
Times = Mapping[str | None, float]  # seconds by backend; None: without the way around


@dataclass(frozen=True)
class Size:
    """Says where a measurement is taken, and the bounds that its choice covers.

    Attributes:
        vocab: V, 0 where it does not matter.
        dtype: of what the operation reads; None where it does not matter.
        vocab_at_most: the choice's bound; None for none.
        hidden_size: H, 0 where it does not matter.
        hidden_at_most: see ``vocab_at_most``.
    """

    vocab: int = 0
    dtype: torch.dtype | None = None
    vocab_at_most: int | None = None
    hidden_size: int = 0
    hidden_at_most: int | None = None

    def __str__(self) -> str:
        named = {"V": self.vocab, "H": self.hidden_size}
        parts = [f"{name}={value}" for name, value in named.items() if value]
        return ", ".join(parts + ([str(self.dtype).removeprefix("torch.")] if self.dtype else []))


@dataclass(frozen=True)
class Task:
    """Describes an operation at a size; ``run`` takes backends and the choices so far, and yields times by place."""

    operation: str
    size: Size
    run: Callable[[Setting, Size, Sequence[str | None], Sequence[Choice]], Iterator[tuple[str, Times]]]


@dataclass(frozen=True)
class Measured:
    """Holds the times of a task, place by place; none where a way does not take the size, or ``error`` says why."""

    operation: str
    size: Size
    places: Mapping[str, Times]
    error: str = ""

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Return those that a choice is for: half-precision ones have the same loads, stores and instructions."""
        if self.size.dtype != torch.bfloat16:
            return ("any",) if self.size.dtype is None else ("float32",)
        # Gradients of float16 need a gain, which the one launch for given logits does not take.
        return ("bfloat16",) if self.operation == "logits_loss" else ("bfloat16", "float16")


def default_of(operation: str) -> str | None:
    """Return what serves an operation on a GPU without a choice."""
    return None if operation in NAMES_OF_NONE else selection.PREFERRED["cuda"][0]


def contestants_of(operation: str, device: torch.device) -> tuple[list[str | None], str]:
    """Return the default and the other backends that have an operation here, and why one of them cannot take part."""
    reason = (missing_hopper if operation.startswith("linear_") else missing)(device)
    others = [CUDA] if not reason else []
    if operation == "linear_forward" and TRITON in registry.AVAILABLE:
        others.append(TRITON)
    return [default_of(operation), *others], reason


def row_operation(
    setting: Setting, size: Size, names: Sequence[str | None], _chosen: Sequence[Choice], *, forward: bool
) -> Iterator[tuple[str, Times]]:
    """Time the row kernel of each backend."""
    problem = row_problem(setting, size)
    make = problem.forward if forward else problem.backward_
    yield str(size), medians(setting, {name: make(str(name)) for name in names})


def row_problem(setting: Setting, size: Size) -> RowProblem:
    """Make as many rows as fill a gibibyte."""
    assert size.dtype is not None
    rows = 8 if setting.quick else LOGITS_BYTES // (size.vocab * size.dtype.itemsize)
    return RowProblem(rows, size.vocab, size.dtype, setting.device)


def medians(setting: Setting, calls: Mapping[str | None, Call]) -> Times:
    """Time each call in turns with the others."""
    case = Case("", [ready(str(name), call) for name, call in calls.items()], rounds=setting.rounds(20, 20))
    found = measure(case, setting.device)
    return {name: record.values["seconds"] for name, record in zip(calls, found, strict=True)}


def row_gradient(
    setting: Setting, size: Size, _names: Sequence[str | None], chosen: Sequence[Choice]
) -> Iterator[tuple[str, Times]]:
    """Time one kernel for known coefficients against the two that are chosen for these rows."""
    problem = row_problem(setting, size)
    if not cuda_rows.row_gradient_takes(problem.logits):
        return
    assert size.dtype is not None
    sizes = selection.Sizes(size.vocab, size.dtype)
    with selection.overridden(*chosen):
        picked = selection.choices_for(AUTO, arch_of(setting.device), sizes, registry.AVAILABLE)
    forward, backward_ = (str(picked.get(name, default_of(name))) for name in ("row_forward", "row_backward"))
    two = problem.forward(forward), problem.backward_(backward_)
    yield str(size), medians(setting, {None: lambda: [call() for call in two], CUDA: problem.gradient_()})


def contrast(
    setting: Setting, _size: Size, names: Sequence[str | None], _chosen: Sequence[Choice]
) -> Iterator[tuple[str, Times]]:
    """Time coefficients of a chunk of few candidates, of some and of many: one choice is for all."""
    for groups, candidates in CONTRASTS:
        problem = ContrastProblem(groups, candidates, 3 if setting.quick else 128, setting.device)
        yield f"G={groups}, C={candidates}", medians(setting, {name: problem.call(str(name)) for name in names})


def logits_loss(
    setting: Setting, size: Size, names: Sequence[str | None], chosen: Sequence[Choice]
) -> Iterator[tuple[str, Times]]:
    """Time the whole loss of given logits with its gradient, of many bytes and of some that stay in a cache."""
    assert size.dtype is not None
    for nbytes, tokens in ((LOGITS_BYTES, 128), (24 * 2**20, 4)):
        if setting.quick:
            nbytes, tokens = 0, 2
        problem = LogitsProblem(nbytes, tokens, size.vocab, size.dtype, setting.device)
        calls = {name: problem.step(AUTO, *chosen, *way(setting, "logits_loss", name)) for name in names}
        yield f"{size}, {problem.logits.nbytes / 2**20:.3g} MiB", medians(setting, calls)


def way(setting: Setting, operation: str, name: str | None) -> tuple[Choice, ...]:
    """Return the choice of a way around, or none."""
    return () if name is None else (Choice(operation, arch_of(setting.device), name),)


def linear(
    setting: Setting,
    size: Size,
    names: Sequence[str | None],
    chosen: Sequence[Choice],
    *,
    operation: str,
    mode: str,
) -> Iterator[tuple[str, Times]]:
    """Time the whole call on hidden states, with a fused linear path and without."""
    assert size.dtype is not None
    shape = replace(BAR_8K, hidden=size.hidden_size, vocab=size.vocab, dtype=size.dtype, mode=mode)
    line_up = LineUp(draw(replace(shape, groups=2, tokens=2) if setting.quick else shape, device=setting.device))
    peers = {name: under_choices(ours(str(name)), *chosen, *way(setting, operation, name)) for name in names}
    contestants = [line_up.peer(peer, shape.work, needed=True) for peer in peers.values()]
    found = measure(line_up.case(contestants, rounds=setting.rounds(20, 20)), setting.device)
    yield str(size), {name: record.values["seconds"] for name, record in zip(names, found, strict=True)}


BF16, FP32 = torch.bfloat16, torch.float32
ROW_VOCABULARIES = ((2048, 2000), (65536, 32000), (160000, 128256), (None, 262144))
LOSS_VOCABULARIES = ((65536, 32000), (None, 128256))
HIDDEN_SIZES = ((1024, 1024), (2048, 2048), (4096, 4096), (None, 8192))
ROW_SIZES = [Size(vocab, dtype, bound) for dtype in (BF16, FP32) for bound, vocab in ROW_VOCABULARIES]
LOSS_SIZES = [Size(vocab, dtype, bound) for dtype in (BF16, FP32) for bound, vocab in LOSS_VOCABULARIES]
LINEAR_VOCABULARIES = ((65536, 32000), (None, 128256))
LINEAR_SIZES = [
    Size(vocab, BF16, most, hidden, bound) for most, vocab in LINEAR_VOCABULARIES for bound, hidden in HIDDEN_SIZES
]
# What a later choice builds upon first, and last what is new to the hardware and can hang.
TASKS = [
    *(Task("row_forward", size, partial(row_operation, forward=True)) for size in ROW_SIZES),
    *(Task("row_backward", size, partial(row_operation, forward=False)) for size in ROW_SIZES),
    Task("contrast", Size(), contrast),
    *(Task("logits_loss", size, logits_loss) for size in LOSS_SIZES),
    *(Task("row_gradient_", size, row_gradient) for size in ROW_SIZES),
    *(Task("linear_forward", s, partial(linear, operation="linear_forward", mode=NO_GRAD)) for s in LINEAR_SIZES),
    *(Task("linear_kept", size, partial(linear, operation="linear_kept", mode=TRAINED)) for size in LINEAR_SIZES),
]


def gains(measured: Measured) -> dict[str | None, float]:
    """Return the speed of each backend over the default's, where it is least."""
    default = default_of(measured.operation)
    others = [name for name in next(iter(measured.places.values())) if name != default]
    return {name: min(times[default] / times[name] for times in measured.places.values()) for name in others}


def fastest(measured: Measured) -> str | None:
    """Return the fastest backend, but the default unless another is faster than it by more than 2 % everywhere."""
    if not measured.places:
        return default_of(measured.operation)
    by_name = gains(measured)
    best = max(by_name, key=by_name.__getitem__)
    return best if by_name[best] > FASTER else default_of(measured.operation)


def figures(measured: Measured) -> str:
    """Say what a choice is made by."""
    places, default = list(measured.places), default_of(measured.operation) or NAMES_OF_NONE[measured.operation]
    if not places:
        return f"{measured.error or 'rows do not fit'} at {measured.size}"
    least = "at least " * (len(places) > 1)
    speeds = ", ".join(f"{name} {least}{gain:.2f}x" for name, gain in gains(measured).items())
    return f"{speeds} the speed of {default} at {'; '.join(places)}"


def entries(measured: Sequence[Measured], arch: str) -> list[Entry]:
    """Return choices of an architecture; a default is among them only where a wider bound follows, which it keeps out.

    They are searched in order, so that narrower bounds come first.
    """
    found: list[Entry] = []
    for operation in selection.OPERATIONS:
        of_this = sorted((m for m in measured if m.operation == operation), key=lambda m: bounds(m.size))
        for dtypes in dict.fromkeys(m.dtypes for m in of_this):
            left = [m for m in of_this if m.dtypes == dtypes]
            while left and fastest(left[-1]) == default_of(operation):
                left.pop()
            found += [entry(each, arch, dtype) for dtype in dtypes for each in left]
    return found


def bounds(size: Size) -> tuple[float, float]:
    """Return bounds for the order; none is the widest."""
    infinity = float("inf")
    return size.vocab_at_most or infinity, size.hidden_at_most or infinity


def entry(measured: Measured, arch: str, dtype: str) -> Entry:
    """Return a choice as :class:`cpo_kernels.kernels.selection.Choice` takes it."""
    size = measured.size
    limits = {"vocab_at_most": size.vocab_at_most, "hidden_at_most": size.hidden_at_most}
    return {
        "operation": measured.operation,
        "arch": arch,
        "dtype": dtype,
        "backend": fastest(measured),
        **{name: limit for name, limit in limits.items() if limit is not None},
        "measured": figures(measured),
    }


def merged(table: Mapping[str, Any], measured: Sequence[Measured], arch: str, source: str) -> dict[str, Any]:
    """Return the table with what was measured in place of the choices of the same operation, architecture and dtype."""

    def replaced(choice: Entry) -> bool:
        dtype = choice.get("dtype", "any")
        found = [m.dtypes for m in measured if (m.operation, arch) == (choice["operation"], choice["arch"])]
        return any(dtype == "any" or "any" in dtypes or dtype in dtypes for dtypes in found)

    kept = [choice for choice in table["choices"] if not replaced(choice)]
    sources = table.get("measurements", {}) | {arch: source}
    said = re.sub(r"choices: .*", "choices: benchmarks/kernels/choose.py, as `measurements` says", table["source"])
    return {**table, "source": said, "measurements": sources, "choices": [*kept, *entries(measured, arch)]}


def small(size: Size) -> Size:
    """Return a dry run's size: every GPU thread is interpreted or emulated."""
    return replace(size, vocab=257 if size.vocab else 0, hidden_size=16 if size.hidden_size else 0)


def measure_all(
    tasks: Sequence[Task], setting: Setting, deadline: float, table: Mapping[str, Any]
) -> Iterator[Measured]:
    """Measure until the deadline, with what was chosen before; where something fails or is wrong, the default stays."""
    arch, found = arch_of(setting.device), list[Measured]()
    for task in tasks:
        if time.monotonic() > deadline:
            log(f"not measured, the time was up: {task.operation} {task.size}")
            continue
        size = small(task.size) if setting.quick else task.size
        names, _ = contestants_of(task.operation, setting.device)
        so_far = merged(table, found, arch, "")["choices"]
        chosen = [Choice(**each) for each in so_far if each["operation"] in BUILT_UPON]
        log(f"  {task.operation} {size}")
        try:
            measured = Measured(task.operation, size, dict(task.run(setting, size, names, chosen)))
        except Exception as error:  # the other operations still have something to say
            measured = Measured(task.operation, size, {}, summary(error))
            log(traceback.format_exc())
        free_memory()  # after the handler: until there an error holds the tensors of its call
        for place, times in measured.places.items():
            seconds = (f"{name or NAMES_OF_NONE[task.operation]} {t * 1e3:.4g} ms" for name, t in times.items())
            log(f"    {place}: {', '.join(seconds)}")
        log(f"    {fastest(measured) or NAMES_OF_NONE[task.operation]}: {figures(measured)}")
        found.append(measured)
        yield measured


def selected(operations: Sequence[str], device: torch.device) -> list[Task]:
    """Return the tasks in which there is something to choose between on this device."""
    able = []
    for operation in dict.fromkeys(task.operation for task in TASKS if task.operation in operations):
        names, reason = contestants_of(operation, device)
        if reason:
            log(f"  {operation}: without {CUDA}, {reason}")
        able += [task for task in TASKS if task.operation == operation] if len(names) > 1 else []
    return able


def main(argv: list[str] | None = None) -> int:
    """Measure and write; 1 if something could not be measured, or not in the time, or came out wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(task.operation for task in TASKS))
    parser.add_argument("--out", type=Path, default=TABLE, help="file to write (default: the committed table)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cpu for a dry run")
    parser.add_argument("--operations", nargs="+", choices=names, default=names, metavar="OPERATION", help=f"{names}")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="measure nothing more after this time")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a dry run")
    args = parser.parse_args(argv)
    if args.quick and args.out == TABLE:
        parser.error("a dry run must not rewrite the committed table; give --out")
    if args.device.type == "cpu" and (reason := triton_support.unavailable_reason()):
        log(reason)
        return NOTHING_TO_DO
    deadline, setting = time.monotonic() + args.seconds, Setting(args.device, args.quick)
    arch, source = arch_of(args.device), describe_source(args.device)
    tasks, table, found = selected(args.operations, args.device), json.loads(TABLE.read_text()), []
    for measured in measure_all(tasks, setting, deadline, table):
        found.append(measured)
        write_table(merged(table, found, arch, source), "choices", args.out)
    able = sum(not measured.error for measured in found)
    log(f"{able} of {len(tasks)} sizes measured, {len(entries(found, arch))} choices for {arch}: {args.out}")
    return 0 if able == len(tasks) else 1


if __name__ == "__main__":
    sys.exit(main())
