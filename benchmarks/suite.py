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
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Protocol

from benchmarks import environment, records
from benchmarks.environment import log
from benchmarks.measure import NotHereError
from benchmarks.records import Part, Record
from benchmarks.setting import Setting, add_options

PARTS = {
    "gpu": "the bars of a GPU at their shapes",
    "heads": "the head's loss and gradients beside every peer",
    "growth": "time and memory as N, V and K grow",
    "lengths": "fifty batches of naturally varying lengths, first call included",
    "filters": "candidate_eps and grad_filter_eps on a real run",
    "steps": "whole training steps beside TRL's trainers",
    "negatives": "what negatives cost a training step",
    "sharing": "prefix sharing: the transformer body",
    "wide": "the heads of the largest models, in more rounds",
    "adapters": "heads that are trained, frozen, low-rank or tied",
    "liger": "Liger's losses by their own signatures",
    "cuda": "the compiled CUDA kernels beside Triton's",
}
ON_REQUEST = ("wide", "adapters", "liger", "gpu", "cuda")  # not in a run of all, which is long enough
MODULES = {name: f"benchmarks.{name}" for name in PARTS} | {"cuda": "benchmarks.kernels.cuda_cases"}


class Measures(Protocol):
    """Stands for the module of a part."""

    def run(self, setting: Setting) -> Iterator[Record]:
        """Yield its records as they are measured."""


def measure(name: str, setting: Setting, out: Path, argv: list[str]) -> Part:
    """Run a part and save `out`/NAME.json after every record; an exception ends the part, and is its `error`."""
    started, path = time.monotonic(), out / f"{name}.json"
    part = Part(name, environment.describe(["suite", *argv], setting.device.type), error="ended from outside")
    module: Measures = import_module(MODULES[name])  # type: ignore[assignment]
    try:
        for record in module.run(setting):
            part.records.append(record)
            part.seconds = time.monotonic() - started
            log(f"  {record.case}: {record.contestant}: {dict(record.values) or record.note}")
            records.save({name: part}, path)
        part.error = ""
    except NotHereError as error:
        part.records.append(Record("", "", note=str(error)))
        part.error = ""
    except Exception as error:  # what was measured before it still counts
        part.error = f"{type(error).__name__}: {error}"
        log(traceback.format_exc())
    part.seconds = time.monotonic() - started
    records.save({name: part}, path)
    return part


def missing_package(name: str) -> str | None:
    """Say what a part imports that is not installed, or None."""
    try:
        import_module(MODULES[name])
    except ModuleNotFoundError as error:
        if str(error.name).startswith(("benchmarks", "cpo_kernels")):
            raise
        return error.name
    return None


def main(argv: list[str] | None = None) -> int:
    """Measure one part; 1 if it failed, or that there is nothing to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder of PART.json")
    add_options(parser)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if package := missing_package(args.part):
        log(f"{args.part} needs {package}, which is not installed")
        return environment.NOTHING_TO_DO
    return 1 if measure(args.part, Setting.of(args), args.out, argv).error else 0


if __name__ == "__main__":
    sys.exit(main())
