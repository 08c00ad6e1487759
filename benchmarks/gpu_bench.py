"""The bars of a GPU: row kernels, loss, log-likelihoods, accuracy and memory, written after every case.

`python -m benchmarks.gpu_bench --out DIR`; `make gpu-check PARTS=bench` runs it, and PARTS=bench-cuda the cases of the
compiled CUDA kernels (`--suite cuda`). bench.json and bench.md, or bench-cuda.*, hold what was measured when the time
was up, a case failed or the run was ended from outside; the exit status is then not 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, gpu_cases
from benchmarks.environment import log
from benchmarks.gpu_cases import Figure, NotHereError, Setting
from benchmarks.kernels import cuda_cases
from benchmarks.tables import markdown


@dataclass(frozen=True)
class Suite:
    """Cases that are run together, and the name of the files that their figures are written to."""

    stem: str
    title: str
    cases: Mapping[str, Callable[[Setting], Iterator[Figure]]]


SUITES = {
    "triton": Suite("bench", "Benchmarks on a GPU", gpu_cases.CASES),
    "cuda": Suite("bench-cuda", "Benchmarks of the compiled CUDA kernels", cuda_cases.CASES),
}


@dataclass
class Case:
    """Figures of one case; ``error`` says why there are no more, ``note`` why none were asked for."""

    name: str
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    error: str = ""
    note: str = ""


def run_case(suite: Suite, case: Case, setting: Setting, save: Callable[[], None]) -> None:
    """Measure one case, saved figure by figure; an exception ends it, not the run."""
    case.error, started = "ended from outside while it ran", time.monotonic()
    save()
    try:
        for figure in suite.cases[case.name](setting):
            case.figures.append(figure)
            log(f"  {figure.name}: {figure.value:.4g} {figure.unit} {figure.verdict} ({figure.detail})")
            save()
        case.error = ""
    except NotHereError as error:
        case.error, case.note = "", str(error)
        log(f"  {error}")
    except Exception as error:  # the other cases still have something to say
        case.error = f"{type(error).__name__}: {error}"
        log(traceback.format_exc())
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    case.seconds = time.monotonic() - started


def run(
    suite: Suite, names: Sequence[str], setting: Setting, seconds: float, out: Path, argv: Sequence[str]
) -> list[Case]:
    """Measure the cases in order until the time is up; those that are not reached are in the results by name."""
    started, cases = time.monotonic(), [Case(name, error="not run: the time was up") for name in names]
    described = environment.describe(["gpu_bench", *argv], setting.device.type)
    save = partial(write, suite, cases, described, out)
    for case in cases:
        if time.monotonic() - started <= seconds:
            log(f"{case.name} ...")
            run_case(suite, case, setting, save)
        save()
    return cases


def write(suite: Suite, cases: list[Case], described: dict[str, object], out: Path) -> None:
    """The figures as JSON, and as a page."""
    content = {"environment": described, "cases": [as_json(case) for case in cases]}
    (out / f"{suite.stem}.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / f"{suite.stem}.md").write_text(page(suite, cases, described))


def as_json(case: Case) -> dict[str, object]:
    """With the verdicts; numbers that are none are null."""
    figures = [asdict(figure) | {"verdict": figure.verdict} for figure in case.figures]
    for figure in figures:
        figure["value"] = None if figure["value"] != figure["value"] else figure["value"]
    return {"name": case.name, "seconds": case.seconds, "figures": figures, "error": case.error, "note": case.note}


def load(path: Path) -> tuple[dict[str, list[Figure]], dict[str, object]]:
    """The figures of a result file by case, and the environment they were measured in; nothing without a file."""
    if not path.exists():
        return {}, {}
    content = json.loads(path.read_text())
    figures = {case["name"]: [from_json(figure) for figure in case["figures"]] for case in content["cases"]}
    return figures, content["environment"]


def from_json(figure: dict[str, Any]) -> Figure:
    """The figure that :func:`as_json` wrote."""
    value = float("nan") if figure["value"] is None else figure["value"]
    return Figure(**{name: found for name, found in figure.items() if name != "verdict"} | {"value": value})


def page(suite: Suite, cases: list[Case], described: dict[str, object]) -> str:
    """Every figure, bars first."""
    parts = [f"# {suite.title}", environment.as_markdown(described)]
    bars = [figure for case in cases for figure in case.figures if figure.bar is not None]
    parts += ["## Bars", table(bars)]
    for case in cases:
        parts.append(f"## {case.name} ({case.seconds:.0f} s)")
        if case.figures:
            parts.append(table(case.figures))
        if case.error:
            parts.append(f"Failed: {case.error}")
        if case.note:
            parts.append(case.note)
    return "\n\n".join(parts) + "\n"


def table(figures: list[Figure]) -> str:
    """One row a figure."""
    rows = [
        [
            figure.name,
            f"{figure.value:.4g} {figure.unit}",
            "" if figure.bar is None else f"{'>=' if figure.at_least else '<='} {figure.bar:g}",
            figure.verdict,
            figure.detail,
        ]
        for figure in figures
    ]
    return markdown(["", "value", "bar", "", "detail"], rows)


def main(argv: list[str] | None = None) -> int:
    """Run, write and print; 1 if a case failed or was not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--suite", choices=SUITES, default="triton", help="triton writes bench.*, cuda bench-cuda.*")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cpu for a dry run")
    names = "; ".join(f"{name}: {list(suite.cases)}" for name, suite in SUITES.items())
    parser.add_argument("--cases", nargs="+", metavar="CASE", help=f"of the suite (default: all); {names}")
    parser.add_argument("--seconds", type=float, default=430.0, help="start no case after this time")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each contestant")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, whose times mean nothing")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    suite = SUITES[args.suite]
    chosen = args.cases or list(suite.cases)
    if unknown := [name for name in chosen if name not in suite.cases]:
        parser.error(f"no such cases: {unknown}, expected some of {list(suite.cases)}")
    args.out.mkdir(parents=True, exist_ok=True)
    cases = run(suite, chosen, Setting(args.device, args.quick, args.rounds), args.seconds, args.out, argv)
    print((args.out / f"{suite.stem}.md").read_text())
    return 1 if any(case.error for case in cases) else 0


if __name__ == "__main__":
    sys.exit(main())
