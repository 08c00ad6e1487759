"""Names the parts of the suite, and runs one of them in this process.

`python -m benchmarks.suite heads --out FOLDER` measures one part; benchmarks.report runs each in a process of its own,
so that no part meets what another compiled, cached or left in memory. A part whose package is not installed has
nothing to do.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from benchmarks import environment, records
from benchmarks.ceilings import measure_ceilings, too_fast
from benchmarks.environment import log
from benchmarks.processes import summary
from benchmarks.records import Part, Record
from benchmarks.setting import Setting, add_options

PARTS = {
    "gpu": "the bars of a GPU at their shapes",
    "heads": "the head's loss and gradients beside every peer",
    "growth": "time and memory as N, V and K grow, and small calls",
    "lengths": "fifty batches of naturally varying lengths, first call included",
    "filters": "candidate_eps and grad_filter_eps on a real run",
    "steps": "whole training steps beside TRL's trainers",
    "negatives": "what negatives cost a training step",
    "sharing": "prefix sharing: the transformer body",
    "adapters": "heads that are trained, frozen, low-rank or tied",
    "liger": "Liger's losses by their own signatures",
}
ON_REQUEST = ("adapters", "liger", "gpu")  # not in a run of all, which is long enough


def part_function(name: str) -> Callable[[Setting], Iterator[Record]]:
    """Import what measures a part: the function run(setting) of its module, which yields records."""
    return import_module("benchmarks.kernels.gpu_cases" if name == "gpu" else f"benchmarks.{name}").run


def measure(name: str, setting: Setting, out: Path, argv: list[str]) -> Part:
    """Run a part and saves `out`/NAME.json after every record; an exception ends the part, and is its `error`.

    What the machine does at best is measured first; a part in which something was faster is void.
    """
    started, path = time.monotonic(), out / f"{name}.json"
    part = Part(name, environment.describe(["suite", *argv], setting.device.type), error="ended from outside")
    ceilings = measure_ceilings(setting)
    part.environment["ceilings"] = ceilings
    try:
        for record in part_function(name)(replace(setting, ceilings=ceilings)):
            part.records.append(record)
            part.seconds = time.monotonic() - started
            log(f"  {record.case}: {record.contestant}: {dict(record.values) or record.note}")
            records.save({name: part}, path)
        part.error = records.VOID + beyond if (beyond := too_fast(part.records)) else ""
    except Exception as error:  # what was measured before it still counts
        part.error = summary(error)
        log(traceback.format_exc())
    part.seconds = time.monotonic() - started
    records.save({name: part}, path)
    return part


def main(argv: list[str] | None = None) -> int:
    """Measure one part; 1 if it failed, or that there is nothing to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder of PART.json")
    add_options(parser)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    try:
        part_function(args.part)
    except ModuleNotFoundError as error:
        if str(error.name).startswith(("benchmarks", "cpo_kernels")):
            raise
        log(f"{args.part} needs {error.name}, which is not installed")
        return environment.NOTHING_TO_DO
    return 1 if measure(args.part, Setting.of(args), args.out, argv).error else 0


if __name__ == "__main__":
    sys.exit(main())
