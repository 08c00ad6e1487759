"""Measures what the package can adopt as a table of its own: the command that tune and choose share.

The table is written after every measurement, so that a time limit loses nothing; nothing begins that would probably
end after it. Entries of other architectures stay as they are.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.environment import NOTHING_TO_DO, log
from benchmarks.measure import free_memory
from benchmarks.processes import summary
from benchmarks.setting import Setting
from cpo_kernels.kernels.device import architecture
from cpo_kernels.kernels.triton import support as triton_support

Entry = dict[str, Any]
Table = Mapping[str, Any]


@dataclass(frozen=True)
class Adoption:
    """Describes a table and how it is measured."""

    description: str  # of the command
    table: Path  # the committed one
    entries: str  # the list of the table that is measured
    tasks: Callable[[Sequence[str] | None, torch.device], Sequence[Any]]  # what there is to measure, of these names
    measure: Callable[[Any, Setting, Sequence[Any]], Any]  # a task, with what was found before
    failed: Callable[[Any, str], Any]  # what was found of a task that raised something; None: nothing
    merged: Callable[[Table, Sequence[Any], str, str], dict[str, Any]]  # the table with it, for an architecture

    def main(self, argv: list[str] | None = None) -> int:
        """Measure and write; 1 if something could not be measured, or not in the time, or came out wrong."""
        form = argparse.RawDescriptionHelpFormatter
        parser = argparse.ArgumentParser(description=self.description, formatter_class=form)
        parser.add_argument("--out", type=Path, default=self.table, help="file to write (default: the committed table)")
        parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cpu for a dry run")
        parser.add_argument("--only", nargs="+", metavar="NAME", help="kernels or operations; default: all")
        parser.add_argument("--seconds", type=float, default=float("inf"), help="measure nothing more after this time")
        parser.add_argument("--quick", action="store_true", help="tiny sizes: a dry run")
        args = parser.parse_args(argv)
        if args.quick and args.out == self.table:
            parser.error("a dry run must not rewrite the committed table; give --out")
        if args.device.type == "cpu" and (reason := triton_support.unavailable_reason()):
            log(reason)
            return NOTHING_TO_DO
        tasks, setting = self.tasks(args.only, args.device), Setting(args.device, args.quick)
        able = self.run(tasks, setting, args.out, time.monotonic() + args.seconds)
        log(f"{able} of {len(tasks)} sizes measured for {architecture(args.device)}: {args.out}")
        return 0 if able == len(tasks) else 1

    def run(self, tasks: Sequence[Any], setting: Setting, out: Path, deadline: float) -> int:
        """Measure tasks until the deadline, writing the table after each, and count those that could be measured."""
        committed, source = json.loads(self.table.read_text()), describe_source(setting.device)
        found, able, longest = list[Any](), 0, 0.0
        for task in tasks:
            started = time.monotonic()
            if started + longest > deadline:
                log(f"not measured, the time was up: {task.name} {task}")
                continue
            log(f"  {task.name} {task}")
            try:
                found.append(self.measure(task, setting, found))
                able += 1
            except Exception as error:  # the others still have something to say
                log(traceback.format_exc())
                failed = self.failed(task, summary(error))
                found += [] if failed is None else [failed]
            free_memory()  # after the handler: until there an error holds the tensors of its call
            longest = max(longest, time.monotonic() - started)
            write_table(self.merged(committed, found, architecture(setting.device), source), self.entries, out)
        return able


def committed(path: str) -> Path:
    """Return a table of the package."""
    return Path(str(resources.files("cpo_kernels").joinpath("kernels", path)))


def describe_source(device: torch.device) -> str:
    """Name device, versions and commit in a line."""
    described = environment.describe(["kernels.tune"], device.type)
    gpu = described.get("gpu", {"name": described["device"]})
    versions = f"torch {environment.version('torch')}, triton {environment.version('triton')}"
    where = f"commit {described['commit']} ({described['sources']})"
    return f"{gpu['name']}, driver {gpu.get('driver')}, {versions}, {where}"


def write_table(table: Table, entries: str, path: Path) -> None:
    """Write JSON with one of a list of entries a line, whatever the others take."""
    text = json.dumps({**table, entries: []}, indent=2)
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in table[entries])
    path.write_text(
        text.replace(f'"{entries}": []', f'"{entries}": [\n{lines}\n  ]' if lines else f'"{entries}": []') + "\n"
    )
