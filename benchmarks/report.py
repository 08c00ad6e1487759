"""Everything in one run: one table on stdout, the same with details as Markdown and JSON in `benchmarks/results/`.

`python -m benchmarks.report` measures all shapes, in under 15 minutes on two idle cores; `--only "gpt2 4k"` those whose
name contains the text; `--quick` tiny ones, to see that everything still runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from benchmarks import accuracy, environment, memory, shapes, tables
from benchmarks.accuracy import LogpError
from benchmarks.contestants import FLOOR, OURS
from benchmarks.environment import log
from benchmarks.measure import CaseResult, measure_case
from benchmarks.memory import Peak
from benchmarks.peers import BUILDERS
from benchmarks.shapes import Shape
from benchmarks.timing import Effort

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Report:
    """All results of one run."""

    environment: dict[str, object]
    cases: list[CaseResult]
    peaks: list[Peak]
    logps: list[LogpError]
    seconds: float


def run(cases: Sequence[Shape], effort: Effort, *, quick: bool, argv: list[str]) -> Report:
    """Measure the cases, then peak memory and accuracy."""
    started = time.perf_counter()
    described = environment.describe(["report", *argv])
    results = []
    for shape in cases:
        log(f"{shape.name}: N={shape.num_tokens}, V={shape.vocab}, H={shape.hidden} ...")
        results.append(measure_case(shape, peers_of(shape), effort))
        log(tables.progress(results[-1]))
    peaks = measure_peaks(quick=quick)
    log("accuracy of sequence log-likelihoods ...")
    logps = accuracy.measure(shapes.QUICK[1] if quick else shapes.ACCURACY)
    return Report(described, results, peaks, logps, time.perf_counter() - started)


def peers_of(shape: Shape) -> tuple[str, ...]:
    """Peers timed on a shape; the smallest budget is a question about ours and the floor alone."""
    return () if shape.smallest_budget else tuple(n for n in BUILDERS if n not in shape.without)


def measure_peaks(*, quick: bool) -> list[Peak]:
    """Ours at few and at many tokens and, for what the GEMM library takes, the floor; each in its own process."""
    log("peak memory in processes of their own ...")
    if quick:
        return [memory.measure(OURS, shapes.QUICK[0], shapes.QUICK[0].num_tokens)]
    few, many = shapes.PEAK_MEMORY_TOKENS
    runs = product(shapes.PEAK_MEMORY, ((FLOOR, few), (OURS, few), (OURS, many)))
    return [memory.measure(name, shape, tokens) for shape, (name, tokens) in runs]


def write(report: Report, folder: Path, name: str) -> None:
    """`name`.json and `name`.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(asdict(report), indent=1, default=str) + "\n")
    (folder / f"{name}.md").write_text(tables.page(report))


def main(argv: list[str] | None = None) -> None:
    """Run, print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes; the times mean nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="only shapes whose name contains TEXT")
    parser.add_argument("--all-peers", action="store_true", help="every peer on every shape: about twice the time")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the contestants that are close")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--name", default="cpu", help="name of the two result files (default: %(default)s)")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    cases = [shape for shape in (shapes.QUICK if args.quick else shapes.CASES) if args.only in shape.name]
    if not cases:
        parser.error(f"no shape's name contains {args.only!r}")
    if args.all_peers:
        cases = [replace(shape, without=()) for shape in cases]
    report = run(cases, Effort(rounds=args.rounds), quick=args.quick, argv=argv)
    write(report, args.output, "quick" if args.quick else args.name)
    print(tables.summary(report))


if __name__ == "__main__":
    main()
