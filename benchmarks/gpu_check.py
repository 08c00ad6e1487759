"""Runs everything on a machine with an NVIDIA GPU: build, tests, benchmarks, sanitizer, tuning, choices, with results.

`make gpu-check`, or `python -m benchmarks.gpu_check --parts tests bench --out gpu-results`. No part needs a network.
Parts are run in the order of what they tell in a minute on a GPU: whether it builds and computes the right numbers
there, the bars, races and wrong addresses, what is fastest, the suite, and last the tests that a CPU has run too.
`tests` is the parts tests-1, tests-2 and so on, `suite` those of benchmarks.suite. Every part has a time limit, after
which its processes are ended and it counts as failed; what it had found until then is kept, because results are
written as they come: gpu-check.md (read this: every bar and every part), gpu-check.json, gpu-check.log, tests-*.xml,
tuning.json, selection.json, and of the suite PART.json, which `python -m benchmarks.report --merge FOLDER` turns into a
report. A later run into the same folder keeps what earlier ones found there for other parts, if code, device and
versions are the same. Compiled kernels are kept in build/gpu-check from part to part. The exit status is 1 if a part
of this run failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from benchmarks import bars, environment, records
from benchmarks.environment import NOTHING_TO_DO, log
from benchmarks.records import Parts
from benchmarks.suite import PARTS as SUITE_PARTS
from benchmarks.tables import markdown

ROOT = Path(__file__).parent.parent
CACHES = ROOT / "build" / "gpu-check"  # no part compiles what another has compiled
LIMIT = 450  # seconds of a part: under 8 minutes with what starting and ending it takes
TAIL = 30  # lines of a failed part's output that go into the page
# What is new on a GPU: the first shard, in the order in which it is run. The others have what the CPU has tested too.
FIRST_TESTS = (
    "test_cuda_*device.py",
    "test_triton_*.py",
    "test_ops.py",
    "test_linear_loss*.py",
    "test_linear_logps.py",
)
# Of each shard of a dry run.
QUICK_TESTS = ("engine/test_layout.py", "engine/test_planning.py", "engine/test_objective.py")
SHARDS = len(QUICK_TESTS)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NO_KERNELS = "no CUDA kernels in this build (cpo_kernels/_cuda is absent)"
FOUND = 99  # exit status of compute-sanitizer when it found something


@dataclass
class Outcome:
    """Says of one part whether it "passed", "failed", "timed out" or had "nothing to do", and why."""

    part: str
    status: str
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    tail: str = ""

    @property
    def good(self) -> bool:
        """Return whether the part does not make the whole check fail."""
        return self.status in ("passed", "nothing to do")


@dataclass(frozen=True)
class Settings:
    """Holds what the command line says."""

    device: str
    out: Path
    limit: float
    quick: bool
    workers: int

    @property
    def options(self) -> list[str]:
        """Return the arguments that every measurement takes."""
        return ["--device", self.device, *["--quick"] * self.quick]

    def environment(self) -> dict[str, str]:
        """Return that of the parts: this checkout first, the device of the tests, one place for what is compiled."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        chosen = {"CPO_KERNELS_TEST_DEVICE": self.device, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        chosen["PYTHONFAULTHANDLER"] = "1"  # a crash says where
        usual = {"TRITON_CACHE_DIR": str(CACHES / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(CACHES / "inductor")}
        if self.device == "cpu":  # a dry run builds what a CPU runs
            usual["CPO_KERNELS_CUDA"] = "0"
            chosen["TRITON_INTERPRET"] = "1"
        return usual | os.environ | chosen


@dataclass(frozen=True)
class Run:
    """Holds what came of a command: its exit status, None if it ran past its limit, and its output."""

    status: int | None
    output: str


def run_command(command: Sequence[str], settings: Settings, limit: float, **extra: str) -> Run:
    """Run in a process group of its own, output appended to gpu-check.log as it comes; ended at ``limit`` seconds."""
    path = settings.out / "gpu-check.log"
    with path.open("ab") as sink:
        sink.write(f"\n$ {' '.join(command)}\n".encode())
        sink.flush()
        start = sink.tell()
        given = {"cwd": ROOT, "env": settings.environment() | extra, "start_new_session": True}
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, **given)
        try:
            status: int | None = process.wait(max(limit, 1.0))
        except subprocess.TimeoutExpired:
            end_group(process)
            status = None
    with path.open("rb") as source:
        source.seek(start)
        return Run(status, source.read().decode(errors="replace"))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask a command and its children to end, then end them."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            process.wait(10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def outcome(part: str, run: Run, notes: list[str]) -> Outcome:
    """Return that of the part whose only command this was."""
    lines = run.output.splitlines()
    if run.status == NOTHING_TO_DO:
        return Outcome(part, "nothing to do", notes=lines[-1:])
    status = "timed out" if run.status is None else "passed" if run.status == 0 else "failed"
    if run.status is not None and run.status < 0:
        notes = [*notes, f"ended by {signal.Signals(-run.status).name}"]
    return Outcome(part, status, notes=notes, tail="" if status == "passed" else "\n".join(lines[-TAIL:]))


def extension(name: str) -> Path | None:
    """Return the compiled module in this checkout, for this Python."""
    found = ROOT / "cpo_kernels" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    return found if found.exists() else None


def build(settings: Settings) -> Outcome:
    """Install the checkout without a network; where pip cannot, compile the extensions in place."""
    started = time.monotonic()
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--editable", "."]
    run = run_command(pip, settings, settings.limit)
    notes = ["installed with pip install -e"]
    if run.status:
        left = settings.limit - (time.monotonic() - started)
        notes = ["pip could not install the checkout; extensions compiled in place"]
        run = run_command([sys.executable, "setup.py", "build_ext", "--inplace"], settings, left)
    built = [name for name in ("_cpu", "_cuda") if extension(name)]
    return outcome("build", run, [*notes, f"extensions: {', '.join(built) or 'none'}"])


def shards() -> list[list[str]]:
    """Divide the test files: FIRST_TESTS, then the others in parts of about as many bytes, the largest files first."""
    folder = ROOT / "tests"
    first = list(dict.fromkeys(path for pattern in FIRST_TESTS for path in sorted(folder.rglob(pattern))))
    rest = sorted(set(folder.rglob("test_*.py")) - set(first), key=lambda path: (-path.stat().st_size, path))
    others: list[list[Path]] = [[] for _ in range(SHARDS - 1)]
    for path in rest:
        min(others, key=lambda part: sum(own.stat().st_size for own in part)).append(path)
    return [[str(path.relative_to(ROOT)) for path in part] for part in (first, *map(sorted, others))]


def tests(settings: Settings, shard: int) -> Outcome:
    """Run one of the SHARDS parts of the test suite on the device, counted from 1."""
    name = f"tests-{shard}"
    files = [f"tests/{QUICK_TESTS[shard - 1]}"] if settings.quick else shards()[shard - 1]
    options = ["-v", "-n", str(settings.workers), "--color=no", "-p", "no:cacheprovider"]
    report = f"--junitxml={settings.out / name}.xml"
    run = run_command([sys.executable, "-m", "pytest", *options, report, *files], settings, settings.limit)
    return outcome(name, run, count_tests(run.output))


def count_tests(output: str) -> list[str]:
    """Count who passed, failed and was skipped, in the lines of a verbose run, which may have been cut short."""
    counts = {
        word: len(set(re.findall(rf"(?:{word} (tests/\S+))|(tests/\S+.*) {word}\b", output)))
        for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    lines = [", ".join(f"{count} {word.lower()}" for word, count in counts.items())]
    skipped = re.findall(r"^SKIPPED \[(\d+)\] (\S+?): (.+)$", output, re.MULTILINE)
    return lines + [f"skipped {count}: {where}: {why}" for count, where, why in skipped]


def sanitizer(settings: Settings) -> Outcome:
    """Run compute-sanitizer's four tools over a small run of every kernel of the compiled CUDA extension."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if extension("_cuda") is None or settings.device == "cpu":
        why = NO_KERNELS if extension("_cuda") is None else "needs a GPU"
        return Outcome("sanitizer", "nothing to do", notes=[why])
    if tool is None:
        return Outcome("sanitizer", "failed", notes=["compute-sanitizer was not found"])
    started, notes, bad = time.monotonic(), [], []
    watched = [sys.executable, "-m", "benchmarks.kernels.small_run", "cuda"]
    for name in TOOLS:
        left = settings.limit - (time.monotonic() - started)
        command = [tool, "--tool", name, "--error-exitcode", str(FOUND), *watched]
        # Blocks that torch's allocator hands out again would hide accesses beyond their ends.
        run = run_command(command, settings, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        verdict = {0: "clean", FOUND: "found errors", None: "ran past the limit"}.get(run.status, "did not run")
        notes.append(f"{name}: {verdict}")
        bad += [run] if run.status != 0 else []
    return outcome("sanitizer", bad[0] if bad else Run(0, ""), notes)


def suite_part(settings: Settings, part: str, name: str) -> Outcome:
    """Run one part of the suite into NAME.json; what it had measured when its time was up is there."""
    if name == "cuda" and extension("_cuda") is None:
        return Outcome(part, "nothing to do", notes=[NO_KERNELS])
    command = [sys.executable, "-m", "benchmarks.suite", name, "--out", str(settings.out), *settings.options]
    return outcome(part, run_command(command, settings, settings.limit), [f"results: {name}.json"])


def table(settings: Settings, part: str, file: str, adopted: str) -> Outcome:
    """Measure a table into the results' folder until a little before the limit; the committed one stays as it is."""
    command = [sys.executable, "-m", f"benchmarks.kernels.{part}", "--out", str(settings.out / file)]
    run = run_command([*command, *settings.options, "--seconds", str(settings.limit - 20)], settings, settings.limit)
    return outcome(part, run, [f"{file}; to adopt it, copy it over {adopted}, tuning.json first"])


# Of the suite those that decide bars first.
SUITE_ORDER = ("heads", "lengths", "filters", "negatives", "sharing", "steps", "wide", "growth", "adapters", "liger")
PARTS: dict[str, Callable[[Settings], Outcome]] = {
    "build": build,
    "tests-1": partial(tests, shard=1),
    "bench": partial(suite_part, part="bench", name="gpu"),
    "sanitizer": sanitizer,
    "bench-cuda": partial(suite_part, part="bench-cuda", name="cuda"),
    "tune": partial(table, part="tune", file="tuning.json", adopted="cpo_kernels/kernels/triton/tuning.json"),
    "choose": partial(table, part="choose", file="selection.json", adopted="cpo_kernels/kernels/selection.json"),
    **{f"suite-{name}": partial(suite_part, part=f"suite-{name}", name=name) for name in SUITE_ORDER},
    **{f"tests-{shard}": partial(tests, shard=shard) for shard in range(2, SHARDS + 1)},
}
GROUPS = {
    "tests": [f"tests-{shard}" for shard in range(1, SHARDS + 1)],
    "suite": [f"suite-{name}" for name in SUITE_ORDER],
}
NAMES = (*GROUPS, *PARTS)


def expand(names: Sequence[str]) -> list[str]:
    """Return the parts of a command line, each once; `tests` and `suite` stand for all of their parts."""
    return list(dict.fromkeys(part for name in names for part in GROUPS.get(name, [name])))


def run_parts(names: Sequence[str], settings: Settings, argv: list[str]) -> list[Outcome]:
    """Run parts in order, a build first where there is none, and write the results after each.

    Returns the outcomes of this run; those that stay from earlier ones are only written.
    """
    if "build" not in names and extension("_cpu") is None:
        names = ["build", *names]
    described = environment.describe(["gpu_check", *argv], settings.device)
    outcomes: list[Outcome] = []
    kept = earlier(settings.out, described, names)
    for name in names:
        log(f"{name} ...")
        started = time.monotonic()
        try:
            result = PARTS[name](settings)
        except OSError as error:  # a program that is not there
            result = Outcome(name, "failed", notes=[str(error)])
        result.seconds = time.monotonic() - started
        log(f"{name}: {result.status} after {result.seconds:.0f} s; " + "; ".join(result.notes))
        outcomes.append(result)
        write([*kept, *outcomes], described, settings.out)
    return outcomes


def alike(found: Mapping[str, object], described: Mapping[str, object]) -> bool:
    """Return whether results come from the same code, device and versions as this run's."""
    same = ("commit", "sources", "device", "gpu", "python", "versions")
    return all(found.get(key) == described.get(key) for key in same)


def earlier(folder: Path, described: dict[str, object], names: Sequence[str]) -> list[Outcome]:
    """Return outcomes in the folder of other parts than these, found with the same code on the same device."""
    path = folder / "gpu-check.json"
    content = json.loads(path.read_text()) if path.exists() else {"environment": {}, "parts": []}
    if not alike(content["environment"], described):
        return []
    return [Outcome(**part) for part in content["parts"] if part["part"] not in names]


def decided(folder: Path, described: dict[str, object]) -> list[bars.Bar]:
    """Return every bar that a GPU decides, by what is in the folder from the same code and device."""
    parts: Parts = {}
    for name in SUITE_PARTS:
        parts |= records.load(folder / f"{name}.json")
    return bars.on_a_gpu({name: part for name, part in parts.items() if alike(part.environment, described)})


def write(outcomes: list[Outcome], described: dict[str, object], folder: Path) -> None:
    """Write gpu-check.json and gpu-check.md."""
    content = {"environment": described, "parts": [asdict(result) for result in outcomes]}
    (folder / "gpu-check.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "gpu-check.md").write_text(page(outcomes, decided(folder, described), described))


def page(outcomes: list[Outcome], found: list[bars.Bar], described: dict[str, object]) -> str:
    """Return every bar and every part as Markdown, then the end of the output of what failed."""
    rows = [[r.part, r.status, f"{r.seconds:.0f}", r.notes[0] if r.notes else ""] for r in outcomes]
    dry = [] if "gpu" in described else ["A dry run on the CPU, at sizes whose times mean nothing."]
    met = [bar.met for bar in found]
    counts = f"{met.count(True)} met, {met.count(False)} missed, {met.count(None)} not measured"
    parts = ["# GPU check", *dry, "## Bars", counts, bars.table(found)]
    parts += ["## Parts", markdown(["part", "status", "seconds", ""], rows), environment.as_markdown(described)]
    for result in outcomes:
        if result.notes[1:] or result.tail:
            parts += [f"## {result.part}", *("- " + note for note in result.notes)]
        if result.tail:
            parts += [f"```\n{result.tail}\n```"]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the parts; 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=NAMES, default=list(PARTS), metavar="PART", help=f"{', '.join(NAMES)}"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of the results")
    parser.add_argument("--device", default="cuda", help="cpu for a dry run")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of a part (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a dry run: a test file a part, tiny shapes")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="test processes")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(args.device, out, args.limit, args.quick, args.workers)
    outcomes = run_parts(expand(args.parts), settings, argv)
    print((out / "gpu-check.md").read_text())
    failed = [result.part for result in outcomes if not result.good]
    print(f"failed: {', '.join(failed)}" if failed else "every part passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
