"""Measures backends against each other on the GPU at hand and rewrites their choices.

`python -m benchmarks.kernels.choose` rewrites cpo_kernels/kernels/selection.json; `--out FILE` leaves that alone and
writes the new table elsewhere. Operation by operation and size by size it times every backend that has the operation,
holds each result against float64 first, and writes a choice for this architecture where another than the default is
faster by more than 2 %, in place of the choices it had for that operation and dtype; other architectures keep theirs.
What is timed is a call as users make it, of given logits or of hidden states, with what was chosen before.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.contestants import LineUp
from benchmarks.environment import log
from benchmarks.kernels import adopt, problems
from benchmarks.kernels.adopt import Entry
from benchmarks.measure import Case, Contestant, dtype_name, measure, ready
from benchmarks.meters import Call
from benchmarks.peers import ours
from benchmarks.problem import draw
from benchmarks.setting import Setting
from benchmarks.shapes import BAR_8K, NO_GRAD, TRAINED
from cpo_kernels.kernels import registry, selection
from cpo_kernels.kernels.device import architecture
from cpo_kernels.kernels.selection import AUTO, Choice

TABLE = adopt.committed("selection.json")
ROUNDS = 20
FASTER = 1.02  # what another than the default must be more than
BUILT_UPON = ("row_forward", "row_backward", "contrast")  # by the whole calls that are measured after them
NAMES_OF_NONE = {"unit_gradient": "two kernels", "logits_loss": "the plain way"}
NAMES_OF_NONE |= {"linear_forward": "product and row kernel", "linear_kept": "logits"}

Times = Mapping[str | None, float]  # seconds by backend; None: without the way around
Places = Iterator[tuple[str, Times]]


@dataclass(frozen=True)
class Task:
    """Says what is measured, where, and the bounds that its choice covers."""

    name: str  # of the operation
    # Yields times by place, of backends and with the choices so far.
    run: Callable[[Task, Setting, Sequence[str | None], Sequence[Choice]], Places]
    vocab: int = 0  # V, 0 where it does not matter
    dtype: torch.dtype | None = None  # of what the operation reads; None where it does not matter
    vocab_at_most: int | None = None  # the choice's bound; None for none
    hidden: int = 0  # H, 0 where it does not matter
    hidden_at_most: int | None = None  # see ``vocab_at_most``

    def __str__(self) -> str:
        parts = [f"{name}={value}" for name, value in (("V", self.vocab), ("H", self.hidden)) if value]
        return ", ".join([*parts, *([dtype_name(self.dtype)] if self.dtype else [])])

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Returns those that a choice is for: half-precision ones have the same loads, stores and instructions."""
        if self.dtype != torch.bfloat16:
            return ("any",) if self.dtype is None else ("float32",)
        # Gradients of float16 need a gain, which the one launch for given logits does not take.
        return ("bfloat16",) if self.name == "logits_loss" else ("bfloat16", "float16")

    @property
    def bounds(self) -> dict[str, int]:
        """Returns the bounds by the names of the table."""
        bounds = {"vocab_at_most": self.vocab_at_most, "hidden_at_most": self.hidden_at_most}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    @property
    def default(self) -> str | None:
        """Returns what serves the operation on a GPU without a choice."""
        return None if self.name in NAMES_OF_NONE else selection.PREFERRED["cuda"][0]


@dataclass(frozen=True)
class Measured:
    """Holds the times of a task, place by place; none where a way does not take the size, or ``error`` says why."""

    task: Task
    places: Mapping[str, Times]
    error: str = ""


def contestants_of(task: Task, device: torch.device) -> tuple[list[str | None], str]:
    """Return the default and the other backends that have an operation here, and why one of them cannot take part."""
    reason = (problems.missing_hopper if task.name.startswith("linear_") else problems.missing)(device)
    others = [problems.CUDA] if not reason else []
    if task.name in ("linear_forward", "unit_gradient") and problems.TRITON in registry.AVAILABLE:
        others.append(problems.TRITON)
    return [task.default, *others], reason


def medians(setting: Setting, contestants: Mapping[str | None, Contestant]) -> Times:
    """Time everyone in turns with the others."""
    found = measure(Case("", list(contestants.values()), rounds=setting.rounds(ROUNDS, ROUNDS)), setting.device)
    return {name: record.values["seconds"] for name, record in zip(contestants, found, strict=True)}


def unit_gradient(task: Task, setting: Setting, names: Sequence[str | None], _chosen: Sequence[Choice]) -> Places:
    """Time the kernels that read and write rows once against forward and backward in their place."""
    assert task.dtype is not None
    rows = 8 if setting.quick else problems.LOGITS_BYTES // (task.vocab * task.dtype.itemsize)
    problem = problems.RowProblem(rows, task.vocab, task.dtype, setting.device)
    two = problem.forward(problems.TRITON), problem.backward_(problems.TRITON)
    calls: dict[str | None, Call] = {None: lambda: [call() for call in two]}
    for name in names:
        unit = None if name is None else registry.BACKENDS[name].unit_gradient
        if name is not None and unit is not None and unit.takes(task.vocab, task.dtype, setting.device):
            calls[name] = problem.unit_forward_(name)
    yield str(task), medians(setting, {name: ready(str(name), call) for name, call in calls.items()})


def of_logits(task: Task, setting: Setting, names: Sequence[str | None], chosen: Sequence[Choice]) -> Places:
    """Time the loss of given logits with its gradient, of many bytes and of some that stay in a cache."""
    for size in ((0, 2),) if setting.quick else ((problems.LOGITS_BYTES, 128), (24 * 2**20, 4)):
        problem = problems.LogitsProblem(*size, task.vocab, task.dtype, setting.device)
        calls = {name: problem.step(AUTO, *way(task, setting, name), *chosen) for name in names}
        yield (
            f"{task}, {problem.logits.nbytes / 2**20:.3g} MiB",
            medians(setting, {name: ready(str(name), call) for name, call in calls.items()}),
        )


def way(task: Task, setting: Setting, name: str | None) -> tuple[Choice, ...]:
    """Return the choice of a way around, or none."""
    return () if name is None else (Choice(task.name, architecture(setting.device), name),)


def linear(task: Task, setting: Setting, names: Sequence[str | None], chosen: Sequence[Choice]) -> Places:
    """Time the whole call on hidden states; a small head where the size does not matter."""
    mode = NO_GRAD if task.name == "linear_forward" else TRAINED
    shape = replace(BAR_8K, hidden=task.hidden or 64, vocab=task.vocab or 1000, mode=mode)
    line_up = LineUp(draw(replace(shape, groups=2, tokens=2) if setting.quick else shape, device=setting.device))
    peers = {name: problems.under_choices(ours(str(name)), *way(task, setting, name), *chosen) for name in names}
    contestants = {name: line_up.peer(peer, shape.work, needed=True) for name, peer in peers.items()}
    yield str(task) or "a small head", medians(setting, contestants)


BF16, FP32 = torch.bfloat16, torch.float32
ROW_VOCABULARIES = ((2000, 2048), (32000, 65536), (128256, 160000), (262144, None))  # V and its bound
VOCABULARIES = ((32000, 65536), (128256, None))
HIDDEN_SIZES = ((1024, 1024), (2048, 2048), (4096, 4096), (8192, None))
HEADS = [(vocab, BF16, bound, *hidden) for vocab, bound in VOCABULARIES for hidden in HIDDEN_SIZES]


def over_rows(name: str, run: Any, vocabularies: Sequence[tuple[int, int | None]] = ROW_VOCABULARIES) -> list[Task]:
    """Return the tasks of an operation on rows of logits."""
    return [Task(name, run, vocab, dtype, bound) for dtype in (BF16, FP32) for vocab, bound in vocabularies]


# What a later choice builds upon first, and last what is new to the hardware and can hang.
TASKS = [
    *over_rows("row_forward", of_logits),
    *over_rows("row_backward", of_logits),
    *over_rows("unit_gradient", unit_gradient),
    Task("contrast", linear),
    *over_rows("logits_loss", of_logits, VOCABULARIES),
    *(Task("linear_forward", linear, *size) for size in HEADS),
    *(Task("linear_kept", linear, *size) for size in HEADS),
]


def gains(measured: Measured) -> dict[str | None, float]:
    """Return the speed of each backend over the default's, where it is least."""
    default = measured.task.default
    others = [name for name in next(iter(measured.places.values())) if name != default]
    return {name: min(times[default] / times[name] for times in measured.places.values()) for name in others}


def fastest(measured: Measured) -> str | None:
    """Return the fastest backend, but the default unless another is faster than it by more than 2 % everywhere."""
    by_name = gains(measured) if measured.places else {}
    best = max(by_name, key=by_name.__getitem__, default=None)
    return best if by_name.get(best, 0.0) > FASTER else measured.task.default


def figures(measured: Measured) -> str:
    """Say what a choice is made by."""
    places, task = list(measured.places), measured.task
    if not places:
        return f"{measured.error or 'rows do not fit'} at {task}"
    least = "at least " * (len(places) > 1)
    speeds = ", ".join(f"{name} {least}{gain:.2f}x" for name, gain in gains(measured).items())
    return f"{speeds} the speed of {task.default or NAMES_OF_NONE[task.name]} at {'; '.join(places)}"


def entries(measured: Sequence[Measured], arch: str) -> list[Entry]:
    """Return choices, narrower bounds first, and a default only where it keeps out a wider bound that follows."""
    infinity, found = float("inf"), list[Entry]()

    def order(one: Measured) -> tuple[float, float]:
        return one.task.vocab_at_most or infinity, one.task.hidden_at_most or infinity

    for operation in selection.OPERATIONS:
        of_this = sorted((one for one in measured if one.task.name == operation), key=order)
        for dtypes in dict.fromkeys(one.task.dtypes for one in of_this):
            left = [one for one in of_this if one.task.dtypes == dtypes]
            while left and fastest(left[-1]) == left[-1].task.default:
                left.pop()
            for dtype in dtypes:
                head = {"operation": operation, "arch": arch, "dtype": dtype}
                found += [
                    {**head, "backend": fastest(one), **one.task.bounds, "measured": figures(one)} for one in left
                ]
    return found


def merged(table: adopt.Table, measured: Sequence[Measured], arch: str, source: str) -> dict[str, Any]:
    """Return the table with what was measured in place of the choices of its own kind."""

    def replaced(choice: Entry) -> bool:
        dtype, kind = choice.get("dtype", "any"), (choice["operation"], choice["arch"])
        found = [one.task.dtypes for one in measured if (one.task.name, arch) == kind]
        return any(dtype == "any" or "any" in dtypes or dtype in dtypes for dtypes in found)

    kept = [choice for choice in table["choices"] if not replaced(choice)]
    sources = table.get("measurements", {}) | {arch: source}
    said = re.sub(r"choices: .*", "choices: benchmarks/kernels/choose.py, as `measurements` says", table["source"])
    return {**table, "source": said, "measurements": sources, "choices": [*kept, *entries(measured, arch)]}


def measure_task(task: Task, setting: Setting, found: Sequence[Measured] = ()) -> Measured:
    """Measure a task with what was chosen before; a dry run is small, since every GPU thread is interpreted."""
    small = replace(task, vocab=257 if task.vocab else 0, hidden=16 if task.hidden else 0)
    task, arch = small if setting.quick else task, architecture(setting.device)
    so_far = merged(json.loads(TABLE.read_text()), found, arch, "")["choices"]
    chosen = [Choice(**choice) for choice in so_far if choice["operation"] in BUILT_UPON]
    names, _ = contestants_of(task, setting.device)
    measured = Measured(task, dict(task.run(task, setting, names, chosen)))
    log(f"    {fastest(measured) or NAMES_OF_NONE[task.name]}: {figures(measured)}")
    return measured


def selected(names: Sequence[str] | None, device: torch.device) -> list[Task]:
    """Return the tasks in which there is something to choose between on this device."""
    able = []
    for task in TASKS:
        if names is None or task.name in names:
            backends, reason = contestants_of(task, device)
            if reason:
                log(f"  {task.name}: without {problems.CUDA}, {reason}")
            able += [task] if len(backends) > 1 else []
    return able


CHOICES = adopt.Adoption(
    *(__doc__, TABLE, "choices", selected, measure_task, lambda task, why: Measured(task, {}, why), merged)
)

if __name__ == "__main__":
    sys.exit(CHOICES.main())
