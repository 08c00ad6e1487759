"""One command for a machine with an NVIDIA GPU: build, tests, benchmarks, sanitizer, tuning, choices, with results.

`make gpu-check`, or `python -m benchmarks.gpu_check --parts tests bench --out gpu-results`. No part needs a network.
Parts are run in the order of what they tell in a minute on a GPU: whether it builds and computes the right numbers
there, the bars, races and wrong addresses, what is fastest, the suite, and last the tests that a CPU has run too.
`tests` is the parts tests-1, tests-2 and so on, `suite` those of benchmarks.suite. Every part has a time limit, after
which its processes are ended and it counts as failed; what it had found until then is kept, because results are
written as they come: gpu-check.md (read this: every bar and every part), gpu-check.json, gpu-check.log, bench.*,
bench-cuda.*,
tests-*.xml, tuning.json, selection.json, and of the suite PART.json, which `python -m benchmarks.report --merge FOLDER`
turns into a report. A later run into the same folder keeps what earlier ones found there for other parts, if code,
device and versions are the same. Compiled kernels are kept in build/gpu-check from part to part. The exit status is 1
if a part of this run failed.
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

from benchmarks import bars, environment, gpu_bench, gpu_cases, records
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
SHARDS = 3
# Roughly what a file takes on one core, in seconds; any other takes UNKNOWN_TEST. They only balance the shards.
SLOW_TESTS = {
    "test_linear_logps.py": 150,
    "test_linear_loss.py": 110,
    "test_linear_loss_half.py": 40,
    "test_triton_rows.py": 100,
    "test_triton_linear.py": 100,
    "test_filtering.py": 100,
    "test_ops.py": 80,
    "test_demo.py": 80,
    "test_triton_aot.py": 70,
    "test_memory.py": 60,
    "test_benchmarks.py": 60,
    "test_compile.py": 60,
    "test_cuda_device.py": 60,
    "test_trainer.py": 50,
    "test_gpu_check.py": 40,
    "test_triton_contrast.py": 40,
    "test_peers.py": 40,
    "test_build.py": 35,
    "test_cuda_cases.py": 40,
    "test_choose.py": 50,
}
UNKNOWN_TEST = 15
# Of each shard of a dry run.
QUICK_TESTS = ("engine/test_layout.py", "engine/test_planning.py", "engine/test_objective.py")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NO_KERNELS = "no CUDA kernels in this build (cpo_kernels/_cuda is absent)"
NO_GPU = "needs a GPU"
FOUND = 99  # exit status of compute-sanitizer when it found something


@dataclass
class Outcome:
    """One part: "passed", "failed", "timed out" or "nothing to do", and the numbers or reasons behind it."""

    part: str
    status: str
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    tail: str = ""

    @property
    def good(self) -> bool:
        """Whether the part does not make the whole check fail."""
        return self.status in ("passed", "nothing to do")


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    device: str
    out: Path
    limit: float
    quick: bool
    workers: int

    def environment(self) -> dict[str, str]:
        """That of the parts: this checkout first, the device of the tests, and one place for what is compiled."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        # A dry run builds what a CPU runs.
        usual = {"CPO_KERNELS_CUDA": "0"} if self.device == "cpu" else {}
        chosen = {"CPO_KERNELS_TEST_DEVICE": self.device, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        chosen["PYTHONFAULTHANDLER"] = "1"  # a crash says where
        if self.device == "cpu":
            chosen["TRITON_INTERPRET"] = "1"
        caches = {"TRITON_CACHE_DIR": str(CACHES / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(CACHES / "inductor")}
        return usual | caches | os.environ | chosen


@dataclass(frozen=True)
class Run:
    """A finished command: its exit status, None if it ran past its limit, and its output."""

    status: int | None
    output: str


def run_command(command: Sequence[str], settings: Settings, limit: float, **extra: str) -> Run:
    """Run in a process group of its own, output appended to gpu-check.log as it comes; ended at ``limit`` seconds."""
    path = settings.out / "gpu-check.log"
    with path.open("ab") as sink:
        sink.write(f"\n$ {' '.join(command)}\n".encode())
        sink.flush()
        start = sink.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=settings.environment() | extra,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
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
    """The part whose only command this was."""
    lines = run.output.splitlines()
    if run.status == NOTHING_TO_DO:
        return Outcome(part, "nothing to do", notes=lines[-1:])
    status = "timed out" if run.status is None else "passed" if run.status == 0 else "failed"
    if run.status is not None and run.status < 0:
        notes = [*notes, f"ended by {signal.Signals(-run.status).name}"]
    return Outcome(part, status, notes=notes, tail="" if status == "passed" else "\n".join(lines[-TAIL:]))


def extension(name: str) -> Path | None:
    """The compiled module in this checkout, for this Python."""
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


def seconds_of(file: str) -> float:
    """What SLOW_TESTS says of a test file."""
    return SLOW_TESTS.get(Path(file).name, UNKNOWN_TEST)


def shards() -> list[list[str]]:
    """The test files in SHARDS parts: FIRST_TESTS, then the others in parts of about the same time.

    Of those the longest first, each to the part that has least.
    """
    folder = ROOT / "tests"
    first = dict.fromkeys(path for pattern in FIRST_TESTS for path in sorted(folder.rglob(pattern)))
    rest = [str(path.relative_to(ROOT)) for path in sorted(folder.rglob("test_*.py")) if path not in first]
    others: list[list[str]] = [[] for _ in range(SHARDS - 1)]
    for file in sorted(rest, key=lambda name: (-seconds_of(name), name)):
        min(others, key=lambda part: sum(map(seconds_of, part))).append(file)
    return [[str(path.relative_to(ROOT)) for path in first], *map(sorted, others)]


def tests(settings: Settings, shard: int) -> Outcome:
    """One of the SHARDS parts of the suite on the device, counted from 1."""
    name = f"tests-{shard}"
    files = [f"tests/{QUICK_TESTS[shard - 1]}"] if settings.quick else shards()[shard - 1]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-n",
        str(settings.workers),
        "--color=no",
        "-p",
        "no:cacheprovider",
    ]
    command += [f"--junitxml={settings.out / name}.xml", *files]
    run = run_command(command, settings, settings.limit)
    return outcome(name, run, count_tests(run.output))


def count_tests(output: str) -> list[str]:
    """How many passed, failed and were skipped, from the lines of a verbose run, which may have been cut short."""
    counts = {
        word: len(set(re.findall(rf"(?:{word} (tests/\S+))|(tests/\S+.*) {word}\b", output)))
        for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    lines = [", ".join(f"{count} {word.lower()}" for word, count in counts.items())]
    skipped = re.findall(r"^SKIPPED \[(\d+)\] (\S+?): (.+)$", output, re.MULTILINE)
    return lines + [f"skipped {count}: {where}: {why}" for count, where, why in skipped]


def sanitizer(settings: Settings) -> Outcome:
    """compute-sanitizer's four tools over a small run of every kernel of the compiled CUDA extension."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if extension("_cuda") is None or settings.device == "cpu":
        return Outcome("sanitizer", "nothing to do", notes=[NO_KERNELS if extension("_cuda") is None else NO_GPU])
    if tool is None:
        return Outcome("sanitizer", "failed", notes=["compute-sanitizer was not found"])
    started, notes, bad = time.monotonic(), [], []
    for name in TOOLS:
        command = [
            tool,
            "--tool",
            name,
            "--error-exitcode",
            str(FOUND),
            sys.executable,
            "-m",
            "benchmarks.kernels.small_run",
        ]
        left = settings.limit - (time.monotonic() - started)
        # Blocks that torch's allocator hands out again would hide accesses beyond their ends.
        run = run_command([*command, "cuda"], settings, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        verdict = {0: "clean", FOUND: "found errors", None: "ran past the limit"}.get(run.status, "did not run")
        notes.append(f"{name}: {verdict}")
        bad += [run] if run.status != 0 else []
    return outcome("sanitizer", bad[0] if bad else Run(0, ""), notes)


def bench(settings: Settings) -> Outcome:
    """The bars of a GPU; bench.json and bench.md grow case by case."""
    return measured("bench", settings, "gpu_bench", settings.out, "results: bench.md, bench.json")


def bench_cuda(settings: Settings) -> Outcome:
    """Those of the compiled CUDA kernels; bench-cuda.json and bench-cuda.md grow case by case."""
    if extension("_cuda") is None:
        return Outcome("bench-cuda", "nothing to do", notes=[NO_KERNELS])
    note = "results: bench-cuda.md, bench-cuda.json"
    return measured("bench-cuda", settings, "gpu_bench", settings.out, note, "--suite", "cuda")


def tune(settings: Settings) -> Outcome:
    """Measure block sizes into tuning.json in the results' folder; the committed table stays as it is."""
    note = "tuning.json; to adopt it, copy it over cpo_kernels/kernels/triton/tuning.json"
    return measured("tune", settings, "kernels.tune", settings.out / "tuning.json", note)


def choose(settings: Settings) -> Outcome:
    """Measure backends into selection.json in the results' folder, with the committed block sizes."""
    note = "selection.json; to adopt it, after tuning.json, copy it over cpo_kernels/kernels/selection.json"
    return measured("choose", settings, "kernels.choose", settings.out / "selection.json", note)


def measured(part: str, settings: Settings, module: str, out: Path, note: str, *options: str) -> Outcome:
    """A benchmark that writes what it has until its time is up, a little before the part's limit."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--out", str(out), "--device", settings.device, *options]
    command += ["--seconds", str(settings.limit - 20)] + ["--quick"] * settings.quick
    return outcome(part, run_command(command, settings, settings.limit), [note])


def suite_part(settings: Settings, name: str) -> Outcome:
    """One part of the suite into NAME.json; what it had measured when its time was up is there."""
    command = [sys.executable, "-m", "benchmarks.suite", name, "--out", str(settings.out), "--device", settings.device]
    run = run_command([*command, *["--quick"] * settings.quick], settings, settings.limit)
    return outcome(f"suite-{name}", run, [f"results: {name}.json"])


# Those that decide bars first.
SUITE_ORDER = ("heads", "lengths", "filters", "negatives", "sharing", "steps", "wide", "growth", "adapters", "liger")
SUITE = [f"suite-{name}" for name in SUITE_ORDER]
TESTS = [f"tests-{shard}" for shard in range(1, SHARDS + 1)]
PARTS: dict[str, Callable[[Settings], Outcome]] = {
    "build": build,
    "tests-1": partial(tests, shard=1),
    "bench": bench,
    "sanitizer": sanitizer,
    "bench-cuda": bench_cuda,
    "tune": tune,
    "choose": choose,
    **{f"suite-{name}": partial(suite_part, name=name) for name in SUITE_ORDER},
    **{f"tests-{shard}": partial(tests, shard=shard) for shard in range(2, SHARDS + 1)},
}
GROUPS = {"tests": TESTS, "suite": SUITE}
NAMES = (*GROUPS, *PARTS)


def expand(names: Sequence[str]) -> list[str]:
    """The parts of a command line, each once; `tests` and `suite` stand for all of their parts."""
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
    """Whether results come from the same code, device and versions as this run's."""
    same = ("commit", "sources", "device", "gpu", "python", "versions")
    return all(found.get(key) == described.get(key) for key in same)


def earlier(folder: Path, described: dict[str, object], names: Sequence[str]) -> list[Outcome]:
    """Outcomes in the folder of other parts than these, found with the same code on the same device."""
    path = folder / "gpu-check.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if not alike(content["environment"], described):
        return []
    return [Outcome(**part) for part in content["parts"] if part["part"] not in names]


def decided(folder: Path, described: dict[str, object]) -> list[bars.Bar]:
    """Every bar that a GPU decides, by what is in the folder from the same code and device."""
    figures, measured_in = gpu_bench.load(folder / "bench.json")
    parts: Parts = {}
    for name in SUITE_PARTS:
        parts |= records.load(folder / f"{name}.json")
    of_this = {name: part for name, part in parts.items() if alike(part.environment, described)}
    return bars.on_a_gpu(figures if alike(measured_in, described) else {}, {"loss": gpu_cases.LOSS_BARS}, of_this)


def write(outcomes: list[Outcome], described: dict[str, object], folder: Path) -> None:
    """gpu-check.json and gpu-check.md."""
    content = {"environment": described, "parts": [asdict(result) for result in outcomes]}
    (folder / "gpu-check.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "gpu-check.md").write_text(page(outcomes, decided(folder, described), described))


def page(outcomes: list[Outcome], found: list[bars.Bar], described: dict[str, object]) -> str:
    """Every bar and every part as Markdown, then the end of the output of what failed."""
    rows = [[r.part, r.status, f"{r.seconds:.0f}", r.notes[0] if r.notes else ""] for r in outcomes]
    dry = [] if "gpu" in described else ["A dry run on the CPU, at sizes whose times mean nothing."]
    parts = ["# GPU check", *dry, "## Bars", counts(found), bars.table(found)]
    parts += ["## Parts", markdown(["part", "status", "seconds", ""], rows), environment.as_markdown(described)]
    for result in outcomes:
        if result.notes[1:] or result.tail:
            parts += [f"## {result.part}", *("- " + note for note in result.notes)]
        if result.tail:
            parts += [f"```\n{result.tail}\n```"]
    return "\n\n".join(parts) + "\n"


def counts(found: list[bars.Bar]) -> str:
    """How many bars were met, missed and not measured."""
    verdicts = [bar.met for bar in found]
    return f"{verdicts.count(True)} met, {verdicts.count(False)} missed, {verdicts.count(None)} not measured"


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
