"""Runs everything on a machine with an NVIDIA GPU: build, tests, benchmarks, sanitizer, tuning, choices, with results.

`make gpu-check`, or `python -m benchmarks.gpu_check --parts tests bench --out gpu-results`. No part needs a network.
Parts run in the order of what they tell in a minute on a GPU; `tests`, `sanitizer` and `suite` stand for all parts
whose names begin so. After its time limit a part's processes are ended and it counts as failed. Results are written as
they come: gpu-check.md (read this: every bar and every part), gpu-check.json, gpu-check.log, tests-*.xml, tuning.json,
selection.json, and of the suite PART.json, which `python -m benchmarks.report --merge FOLDER` turns into a report. A
later run into the same folder keeps what earlier ones found there for other parts, if code, device and versions are the
same. Compiled kernels are kept in build/gpu-check. The exit status is 1 if a part of this run failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import bars, environment, records
from benchmarks.environment import NOTHING_TO_DO, ROOT, log
from benchmarks.processes import end_group
from benchmarks.records import Part, Parts, Record
from benchmarks.suite import PARTS as SUITE_PARTS
from benchmarks.tables import markdown
from cpo_kernels.negatives.files import write_whole

CACHES = ROOT / "build" / "gpu-check"  # no part compiles what another has compiled
LIMIT = 450  # seconds of a part: under 8 minutes with what starting and ending it takes
TAIL = 30  # lines of a failed part's output that go into the page
# What is new on a GPU: the first shard, in the order in which it is run. The others have what the CPU has tested too.
FIRST_TESTS = ("test_cuda_*device.py", "test_triton_*.py", "test_ops.py", "test_linear_loss*.py", "test_linear_log*.py")
QUICK_TESTS = ("engine/test_layout.py", "engine/test_planning.py", "engine/test_objective.py")  # of each dry shard
SHARDS = len(QUICK_TESTS)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 99  # exit status of compute-sanitizer when it found something
GOOD = ("passed", "nothing to do")


@dataclass(frozen=True)
class Settings:
    """Holds what the command line says."""

    device: str
    out: Path
    limit: float
    quick: bool
    workers: int

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


Command = Callable[[Settings], list[str]]


def extension(name: str) -> Path | None:
    """Return the compiled module in this checkout, for this Python."""
    found = ROOT / "cpo_kernels" / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    return found if found.exists() else None


def build(_settings: Settings) -> list[str]:
    """Install the checkout without a network; where pip cannot, compiles the extensions in place."""
    pip = "-m pip install --no-build-isolation --no-deps --no-index --editable ."
    python = shlex.quote(sys.executable)
    return ["sh", "-c", f"{python} {pip} || {python} setup.py build_ext --inplace"]


def shards() -> list[list[str]]:
    """Divide the test files: FIRST_TESTS, then the others in parts of about as many bytes, the largest files first."""
    folder = ROOT / "tests"
    first = list(dict.fromkeys(path for pattern in FIRST_TESTS for path in sorted(folder.rglob(pattern))))
    rest = sorted(set(folder.rglob("test_*.py")) - set(first), key=lambda path: (-path.stat().st_size, path))
    others: list[list[Path]] = [[] for _ in range(SHARDS - 1)]
    for path in rest:
        min(others, key=lambda part: sum(own.stat().st_size for own in part)).append(path)
    return [[str(path.relative_to(ROOT)) for path in part] for part in (first, *map(sorted, others))]


def tests(settings: Settings, shard: int) -> list[str]:
    """Run one of the SHARDS parts of the test suite on the device, counted from 1."""
    files = [f"tests/{QUICK_TESTS[shard - 1]}"] if settings.quick else shards()[shard - 1]
    options = ["-v", "-n", str(settings.workers), "--color=no", "-p", "no:cacheprovider"]
    return [sys.executable, "-m", "pytest", *options, f"--junitxml={settings.out}/tests-{shard}.xml", *files]


def sanitizer(settings: Settings, tool: str) -> list[str]:
    """Run one of compute-sanitizer's tools over a small run of every kernel of the compiled CUDA extension."""
    if extension("_cuda") is None or settings.device == "cpu":
        return ["sh", "-c", f"echo needs a GPU and CUDA kernels, cpo_kernels/_cuda; exit {NOTHING_TO_DO}"]
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    watched = [sys.executable, "tests/support/small_run.py", "cuda"]
    # Blocks that torch's allocator hands out again would hide accesses beyond their ends.
    caching = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
    return [*caching, program or "compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), *watched]


def measured(settings: Settings, module: str, file: str = "") -> list[str]:
    """Run a module of the benchmarks that writes as it goes: of the suite, or a table until the limit is near."""
    command = [sys.executable, "-m", *f"benchmarks.{module}".split(), "--out", str(settings.out / file)]
    command += ["--device", settings.device, *["--quick"] * settings.quick]
    return [*command, *(["--seconds", str(settings.limit - 20)] if file else [])]


# Of the suite those that decide bars first.
SUITE_ORDER = ("heads", "lengths", "filters", "negatives", "sharing", "steps", "growth", "adapters", "liger")
PARTS: dict[str, Command] = {
    "build": build,
    "tests-1": partial(tests, shard=1),
    "bench": partial(measured, module="suite gpu"),
    **{f"sanitizer-{tool}": partial(sanitizer, tool=tool) for tool in TOOLS},
    "tune": partial(measured, module="kernels.tune", file="tuning.json"),
    "choose": partial(measured, module="kernels.choose", file="selection.json"),
    **{f"suite-{name}": partial(measured, module=f"suite {name}") for name in SUITE_ORDER},
    **{f"tests-{shard}": partial(tests, shard=shard) for shard in range(2, SHARDS + 1)},
}
GROUPS = {group: [name for name in PARTS if name.startswith(f"{group}-")] for group in ("tests", "sanitizer", "suite")}
NAMES = (*GROUPS, *PARTS)


def run_part(name: str, settings: Settings) -> Record:
    """Run a part in a process group that is ended at the limit; its output is appended to gpu-check.log as it comes."""
    path, started, status = settings.out / "gpu-check.log", time.monotonic(), "passed"
    try:
        command = PARTS[name](settings)
        with path.open("ab") as sink:
            sink.write(f"\n$ {shlex.join(command)}\n".encode())
            sink.flush()
            start = sink.tell()
            given: dict[str, Any] = {"cwd": ROOT, "env": settings.environment(), "start_new_session": True}
            process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, **given)
            try:
                code = process.wait(max(settings.limit, 1.0))
                status = {0: "passed", NOTHING_TO_DO: "nothing to do"}.get(code, "failed")
            except subprocess.TimeoutExpired:
                code, status = 0, "timed out"
            finally:
                end_group(process.pid)
                process.wait()
        output = path.read_bytes()[start:].decode(errors="replace")
        note = count_tests(output) if name.startswith("tests-") else ""
        note = note or (f"ended by {signal.Signals(-code).name}" if code < 0 else "")
        note = note or (output.splitlines()[-1] if status == "nothing to do" else "")
        tail = "" if status in GOOD else "\n".join(output.splitlines()[-TAIL:])
    except OSError as error:  # a program that is not there
        status, note, tail = "failed", str(error), ""
    log(f"{name}: {status} after {time.monotonic() - started:.0f} s; {note}")
    return Record(name, "", {"seconds": time.monotonic() - started}, {"status": status, "tail": tail}, note)


def count_tests(output: str) -> str:
    """Count who passed, failed and was skipped, in the lines of a verbose run, which may have been cut short."""
    words = ("PASSED", "FAILED", "ERROR", "SKIPPED")
    counts = [len(set(re.findall(rf"(?:{word} (tests/\S+))|(tests/\S+.*) {word}\b", output))) for word in words]
    found = [", ".join(f"{count} {word.lower()}" for count, word in zip(counts, words, strict=True))]
    skipped = re.findall(r"^SKIPPED \[(\d+)\] (\S+?): (.+)$", output, re.MULTILINE)
    return "; ".join(found + [f"skipped {count}: {where}: {why}" for count, where, why in skipped])


def expand(names: Sequence[str]) -> list[str]:
    """Return the parts of a command line, each once; `tests`, `sanitizer` and `suite` stand for all of their parts."""
    return list(dict.fromkeys(part for name in names for part in GROUPS.get(name, [name])))


def run_parts(names: Sequence[str], settings: Settings, argv: list[str]) -> list[Record]:
    """Run parts in order, a build first where there is none; earlier ones of the same code stay in the files."""
    names = list(names) if "build" in names or extension("_cpu") else ["build", *names]
    described = environment.describe(["gpu_check", *argv], settings.device)
    earlier = records.load(settings.out / "gpu-check.json").get("gpu-check", Part("gpu-check", {}))
    kept = earlier.records if alike(earlier.environment, described) else []
    part = Part("gpu-check", described, [record for record in kept if record.case not in names])
    own = []
    for name in names:
        log(f"{name} ...")
        own.append(run_part(name, settings))
        part.records.append(own[-1])
        records.save({part.name: part}, settings.out / "gpu-check.json")
        write_whole(settings.out / "gpu-check.md", page(part, decided(settings.out, described)))
    return own


def alike(found: Mapping[str, object], described: Mapping[str, object]) -> bool:
    """Return whether results come from the same code, device and versions as this run's."""
    same = ("commit", "sources", "device", "gpu", "python", "versions")
    return all(found.get(key) == described.get(key) for key in same)


def decided(folder: Path, described: Mapping[str, object]) -> list[bars.Bar]:
    """Return every bar, by what is in the folder from the same code and device."""
    parts: Parts = {}
    for name in SUITE_PARTS:
        parts |= records.load(folder / f"{name}.json")
    return bars.verdicts({name: part for name, part in parts.items() if alike(part.environment, described)})


def page(part: Part, found: list[bars.Bar]) -> str:
    """Return every bar and every part as Markdown, then the end of the output of what failed."""
    rows = [[r.case, r.conditions["status"], f"{r.values['seconds']:.0f}", r.note] for r in part.records]
    dry = [] if "gpu" in part.environment else ["A dry run on the CPU, at sizes whose times mean nothing."]
    met = [bar.met for bar in found]
    counts = f"{met.count(True)} met, {met.count(False)} missed, {met.count(None)} not measured"
    lines = ["# GPU check", *dry, "## Bars", counts, bars.table(found), "## Parts"]
    parts = markdown(["part", "status", "seconds", ""], rows, left=(0, 1, 3))
    lines += [parts, environment.in_a_line(part.environment)]
    tails = {record.case: record.conditions["tail"] for record in part.records}
    lines += [f"## {name}\n\n```\n{tail}\n```" for name, tail in tails.items() if tail]
    return "\n\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the parts; 0 if none failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help_, default = ", ".join(NAMES), list(PARTS)
    parser.add_argument("--parts", nargs="+", choices=NAMES, default=default, metavar="PART", help=help_)
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
    failed = [result.case for result in outcomes if result.conditions["status"] not in GOOD]
    print(f"failed: {', '.join(failed)}" if failed else "every part passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
